"""The trainers whose own loaders the tests use, and what each needs to be imported on a machine without a GPU.

A trainer is installed without its dependencies; what loading a model needs follows, in versions that it allows. What
plays no part in loading (flash attention, Ray, vLLM, DeepSpeed) is stood in for by the probe, see
its `probe_common.py`. Torch and packages whose version makes no difference are installed once, in `core`.
"""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "torch==2.13.0"

CORE = (
    TORCH, "numpy==2.4.6", "PyYAML", "requests", "regex", "tqdm", "packaging", "filelock", "psutil", "einops",
    "sentencepiece", "dill", "pandas", "pyarrow", "pydantic", "Jinja2", "protobuf",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """One trainer in one version.

    Attributes:
        trainer: what `verify --for` calls it.
        bare: installed without dependencies.
        stack: installed with their dependencies, as far as `core` lacks them.
    """

    name: str
    trainer: str
    bare: tuple[str, ...]
    stack: tuple[str, ...]


ENVIRONMENTS = {
    each.name: each
    for each in (
        Environment(
            "openrlhf",
            "openrlhf",
            ("openrlhf==0.11.2",),
            ("transformers==5.15.0", "peft==0.21.2", "accelerate==1.15.0", "pylatexenc", "sympy"),
        ),
        Environment(  # its saver, under a DeepSpeed that trains on a CPU
            "openrlhf-zero",
            "openrlhf",
            ("openrlhf==0.11.2", "deepspeed==0.19.8", "torchdata==0.11.0"),
            ("transformers==5.15.0", "peft==0.21.2", "accelerate==1.15.0", "pylatexenc", "sympy", "hjson",
             "py-cpuinfo", "msgpack", "ninja"),
        ),
        Environment(
            "openrlhf-0.5.5",
            "openrlhf@0.5.5",
            ("openrlhf==0.5.5", "peft==0.13.2"),
            ("transformers==4.47.1", "accelerate==1.1.1", "datasets==3.2.0"),
        ),
        Environment(
            "trl",
            "trl@1.12.0",
            ("trl==1.12.0", "peft==0.21.2"),
            ("transformers==5.15.0", "accelerate==1.15.0", "datasets==4.8.4"),
        ),
        Environment(
            "trl-0.28",
            "trl-valuehead@0.28",
            ("trl==0.28.0",),
            ("transformers==4.57.6", "accelerate==1.15.0", "datasets==4.8.4"),
        ),
        Environment(
            "verl",
            "verl",
            ("verl==0.9.1", "trl==1.12.0", "tensordict==0.10.0", "pyvers==0.1.0"),
            ("transformers==5.5.4", "peft==0.18.1", "accelerate==1.15.0", "datasets==4.8.4", "orjson", "cloudpickle",
             "importlib_metadata", "omegaconf", "hydra-core", "codetiming"),
        ),
        Environment(
            "llamafactory",
            "llamafactory",
            ("llamafactory==0.9.5", "trl==0.24.0", "peft==0.18.1"),
            ("transformers==5.5.4", "accelerate==1.11.0", "datasets==4.0.0", "omegaconf", "fire"),
        ),
        Environment(
            "ms-swift",
            "ms-swift",
            ("ms-swift==4.6.0", "trl==0.28.0", "peft==0.20.0"),
            ("transformers==4.57.6", "accelerate==1.15.0", "datasets==4.8.4", "modelscope", "json-repair", "dacite",
             "safetensors", "Pillow", "simplejson", "sortedcontainers", "addict", "attrdict", "scipy", "matplotlib"),
        ),
        Environment(
            "skyrl",
            "skyrl",
            ("skyrl==0.3.0", "peft==0.18.1"),
            ("transformers==5.8.0", "accelerate==1.15.0", "loguru", "jaxtyping", "omegaconf"),
        ),
        Environment(
            "rewardbench",
            "safe-rlhf",
            ("rewardbench==0.1.4",),
            ("transformers==4.51.0", "accelerate==1.15.0", "datasets==3.2.0", "tabulate"),
        ),
        Environment(
            "torchtune",
            "torchtune",
            ("torchtune==0.6.1", "torchao==0.10.0"),
            ("torchdata==0.11.0", "datasets==3.2.0", "huggingface_hub<1", "safetensors",
                "tokenizers", "tiktoken", "blobfile",
             "omegaconf", "Pillow", "kagglehub"),
        ),
    )
}  # fmt: skip
