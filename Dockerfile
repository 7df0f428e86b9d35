# rlhf-convert without a GPU: torch's CPU build. docker build -t rlhf-convert . && docker run --rm -v "$PWD:/work" rlhf-convert doctor ./rm
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
# torch first, from the index that has builds without CUDA, which are a tenth of the size.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.6" \
    && /opt/venv/bin/pip install --no-cache-dir ".[parquet,report,watch]" \
    && /opt/venv/bin/pip uninstall --yes pip \
    && find /opt/venv -depth -type d \( -name tests -o -name test \) -path '*/site-packages/*' -exec rm -rf {} + \
    && rm -rf /opt/venv/lib/python3.12/site-packages/torch/include /opt/venv/lib/python3.12/site-packages/torch/share

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /work
ENV PATH=/opt/venv/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1
ENTRYPOINT ["rlhf-convert"]
CMD ["--help"]
