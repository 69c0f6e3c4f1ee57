"""An HTTP or HTTPS proxy in front of an S3 server: it counts what goes over the wire, and fails requests on purpose."""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUSY, LOST_REQUEST, LOST_ANSWER = "503", "lost request", "lost answer"
FAULTS = (BUSY, LOST_REQUEST, LOST_ANSWER)

Plan = Callable[[str, str], str | None]
"""Function of a request's method and path that returns its fault, one of FAULTS or a `refusal`, or `None`."""


def refusal(status: int, code: str, message: str = "") -> str:
    """A fault: the server refuses a request with this code of S3."""
    return f"{status} {code} {message}".strip()


@dataclass(frozen=True)
class Exchange:
    """One request that reached the proxy."""

    method: str
    path: str
    sent: int
    """Bytes of the answer on the wire, headers included."""

    fault: str | None

    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the request, by names in lower case."""


class Proxy:
    """Forwards to `upstream`; `plan` decides which requests fail."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.plan: Plan = lambda method, path: None
        self.plan_by_headers: Callable[[str, Mapping[str, str]], str | None] = lambda method, headers: None
        self.exchanges: list[Exchange] = []
        self.lock = threading.Lock()
        self.url = ""

    def count(self, method: str) -> int:
        """Requests of a method so far."""
        return sum(exchange.method == method for exchange in self.exchanges)

    @property
    def faults(self) -> Counter[str]:
        """How often requests failed in each way."""
        return Counter(exchange.fault for exchange in self.exchanges if exchange.fault)


def every_fifth(seed: int) -> Plan:
    """Plan that fails a random fifth of all requests, with each of FAULTS in turn."""
    draw = random.Random(seed)
    kinds = iter(FAULTS * 10_000)
    return lambda method, path: next(kinds) if draw.random() < 0.2 else None


@contextmanager
def serving(upstream: str, certificate: str | None = None) -> Iterator[Proxy]:
    """A proxy on a free port during the block; over TLS if a file with certificate and key is given."""
    proxy = Proxy(upstream)

    class Handler(_Handler):
        shared = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    proxy.url = f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _refused(method: str, status: str, code: str, message: str = "") -> bytes:
    """S3's answer to a failed request, whose body says why; to HEAD it has no body."""
    text = f"<Message>{message}</Message>" if message else ""
    body = f"<Error><Code>{code}</Code>{text}</Error>".encode()
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body * (method != "HEAD")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: Proxy

    def _serve(self) -> None:
        proxy = self.shared
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        with proxy.lock:
            fault = proxy.plan(self.command, self.path) or proxy.plan_by_headers(self.command, headers)
        answer = b""
        if fault and fault not in FAULTS:
            answer = _refused(self.command, *fault.split(" ", 2))
        elif fault == BUSY:
            answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
        elif fault != LOST_REQUEST:
            answer = self._forward(body)
        if fault == LOST_ANSWER:
            answer = b""
        with proxy.lock:
            proxy.exchanges.append(Exchange(self.command, self.path, len(answer), fault, headers))
        if answer:
            self.wfile.write(answer)
        else:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Transfer-Encoding"]
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _forward(self, body: bytes) -> bytes:
        host = urlsplit(self.shared.upstream).netloc
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        kept = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        length = response.getheader("Content-Length", str(len(content)))
        lines = [f"HTTP/1.1 {response.status} {response.reason}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in kept]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: the exchanges are the log."""
