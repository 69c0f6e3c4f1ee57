"""A dashboard in this process that answers over HTTP like Ray's about one job, or like a proxy or gateway."""

from __future__ import annotations

import datetime
import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

JOB = "here"
Answer = tuple[int, dict[str, str], str]
"""Status, headers and body."""
LOST: Answer = (0, {}, "")
"""Answer in whose place the connection is closed."""


def page(status: int, **headers: str) -> Answer:
    """Answer of a gateway: a page of HTML that asks for a login, with this status."""
    return status, {"Content-Type": "text/html; charset=utf-8", **headers}, "<html><form>Please log in</form></html>"


@dataclass
class Asked:
    """A received request."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Dashboard:
    """State of the dashboard, and the requests that it has received."""

    log: str = ""
    status: str = "RUNNING"
    exit_code: int | None = None
    prefix: str = ""
    """Path of a gateway, which comes before Ray's paths."""
    plan: Callable[[Asked], Answer | None] = lambda asked: None
    """Function that returns an answer in place of Ray's; `None` gives Ray's."""
    asked: list[Asked] = field(default_factory=list)
    packages: list[bytes] = field(default_factory=list)
    """Zip files that were sent for jobs, in the order of their arrival."""
    job: dict[str, Any] = field(default_factory=lambda: {"metadata": {"datm_ray": "tiny", "out": "s3://bucket/runs"}})
    address: str = ""

    def paths(self) -> list[str]:
        """Paths of the requests, without Ray's queries for its version."""
        return [asked.path for asked in self.asked if not asked.path.endswith("/api/version")]

    def _job(self) -> dict[str, Any]:
        given = {"type": "SUBMISSION", "submission_id": JOB, "entrypoint": "", "driver_exit_code": self.exit_code}
        return {**given, "status": self.status, "message": f"Job is {self.status}.", **self.job}

    def answer(self, asked: Asked, body: bytes) -> Answer:
        """Answer of Ray's dashboard, in its words."""
        path = asked.path.removeprefix(self.prefix)
        if self.prefix and path == asked.path:
            return page(404)
        if path == "/api/version":
            return _json({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
        if path.startswith("/api/packages/"):
            self.packages += [body] if asked.method == "PUT" else []
            return (200, {}, "") if asked.method == "PUT" else (404, {}, "Package does not exist")
        if path == "/api/jobs/" and asked.method == "POST":
            given = json.loads(body)
            self.job = {key: given[key] for key in ("submission_id", "metadata", "entrypoint", "runtime_env")}
            return _json({"job_id": given["submission_id"], "submission_id": given["submission_id"]})
        if path == "/api/jobs/":
            return _json([self._job()])
        number, _, what = path.removeprefix("/api/jobs/").partition("/")
        if number != self._job()["submission_id"]:
            return 404, {"Content-Type": "text/plain"}, f"Job {number} does not exist"
        return _json({"": self._job(), "logs": {"logs": self.log}, "stop": {"stopped": True}}[what])


def _json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value)


@contextmanager
def serving(host: str = "127.0.0.1", certificate: Path | None = None, **fields: Any) -> Iterator[Dashboard]:
    """A dashboard during the block; over https if a certificate is given."""
    dashboard = Dashboard(**fields)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path if self.command == "CONNECT" else urlsplit(self.path).path  # a proxy gets whole addresses
            asked = Asked(self.command, path, dict(self.headers.items()))
            dashboard.asked.append(asked)
            status, headers, text = dashboard.plan(asked) or dashboard.answer(asked, body)
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_CONNECT = handle_any

        def log_message(self, format: str, *arguments: object) -> None:
            """Log nothing."""

    class Server(ThreadingHTTPServer):
        address_family = 10 if ":" in host else 2
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Report nothing, because some clients fail on purpose."""

    with Server((host, 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme, shown = "http" if certificate is None else "https", f"[{host}]" if ":" in host else host
        dashboard.address = f"{scheme}://{shown}:{server.server_port}{dashboard.prefix}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield dashboard
        finally:
            server.shutdown()
            thread.join()


def make_certificate(file: Path) -> Path:
    """A self-signed certificate of this machine with its key in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A company's authority")])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternative = x509.IPAddress(ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return file
