"""A local S3 server over HTTP, and an environment that leads to it as a user's would."""

from __future__ import annotations

import logging
import urllib.request
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.store import proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of moto's server. On a free port, for two test runs may share a machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for every request
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that points the environment to a server; credentials and region are set, files are ignored.

    s3fs keeps its filesystems, each with the environment it was made in, so they are forgotten before and after.
    """
    from s3fs import S3FileSystem

    def use(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        S3FileSystem.clear_instance_cache()

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield use
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_server: str, s3_environment: Callable[[str], None]) -> str:
    """The name of a fresh bucket; the environment leads to its server."""
    name = f"bucket-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    s3_environment(s3_server)
    return name


@pytest.fixture
def s3_proxy(s3_server: str, bucket: str, s3_environment: Callable[[str], None]) -> Iterator[proxy.Proxy]:
    """A proxy between the environment and the server."""
    with proxy.serving(s3_server) as running:
        s3_environment(running.url)
        yield running
