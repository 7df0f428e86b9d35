"""A server of S3 on loopback: moto's, for the real clients, with faults between them and it.

What a client was sent and asked is counted. Faults are planned with `Fault`: an HTTP status, or `cut`, where the
connection ends within the answer.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_hub_state import Fault, due

__all__ = ["BUCKET", "SECRET", "Fault", "Store", "running"]

BUCKET = "models"
SECRET = "this-is-the-secret-key-of-a-test"


class Store:
    """The server; `url` is what AWS_ENDPOINT_URL is set to."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.sent_bytes = 0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """What the clients need in their environment."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "AKIAABCDEFGHIJKLMNOP", "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        said = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        said += f" {environ.get('HTTP_RANGE', '')}"
        with self._lock:
            self.log.append(said)
            fault = due(self.faults, said)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if fault is not None and fault.kind.isdigit():
                start(f"{fault.kind} Fault", [("Content-Length", "0")])
                return [b""]
            content = b"".join(self._app(environ, start))
        finally:
            with self._lock:
                self.in_flight -= 1
        if fault is not None:
            return self._cut(content)
        with self._lock:
            self.sent_bytes += len(content)
        return [content]

    def _cut(self, content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise ConnectionAbortedError("a test cuts the connection")

    def requests(self, pattern: str) -> list[str]:
        """The requests that came and match."""
        return [r for r in self.log if re.search(pattern, r)]

    def client(self) -> Any:
        """Amazon's own client of it."""
        import boto3

        given = self.environment()
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRET,
        )  # fmt: skip

    def put(self, folder: Path, name: str) -> None:
        """A folder's files below a name."""
        client = self.client()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.put_object(Bucket=BUCKET, Key=f"{name}/{path.relative_to(folder)}", Body=path.read_bytes())

    def files(self, name: str) -> dict[str, bytes]:
        """What lies below a name."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{name}/")
        keys = [o["Key"] for page in pages for o in page.get("Contents", [])]
        return {k.removeprefix(f"{name}/"): client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for k in keys}


@contextmanager
def running() -> Iterator[Store]:
    """A server with an empty bucket; the environment names it."""
    store = Store()
    before = dict(os.environ)
    os.environ.update(store.environment())
    store._thread.start()
    try:
        store.client().create_bucket(Bucket=BUCKET)
        yield store
    finally:
        store._server.shutdown()
        store._server.server_close()
        os.environ.clear()
        os.environ.update(before)
