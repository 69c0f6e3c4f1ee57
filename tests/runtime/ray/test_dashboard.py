"""Tests dashboards behind proxies and gateways; a failure is one line with the reason and without a password.

Run with `pytest tests/runtime/ray/test_dashboard.py`; the servers are in this process.
"""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datm_ray.errors import ClusterError
from datm_ray.runtime.ray.jobs import Jobs
from tests.conftest import CommandLine
from tests.processes import free_port
from tests.runtime.dashboard import LOST, Answer, Asked, Dashboard, make_certificate, page, serving

SECRET = "no-line-shows-this"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the environment's proxies, certificates, addresses and tokens."""
    files = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    for name in (*VARIABLES, *map(str.upper, VARIABLES), *files):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("datm_ray.runtime.ray.dashboard.use_token", lambda: None)


@pytest.fixture
def there() -> Iterator[Dashboard]:
    """A dashboard, which may also be a proxy or a gateway."""
    with serving(log="Experts: 2 tasks to run\n") as there:
        yield there


def refusal(address: str) -> str:
    """Error line for an address where no cluster answers; it contains no password."""
    with pytest.raises(ClusterError) as caught:
        Jobs(address)
    line = str(caught.value)
    assert SECRET not in line
    return line


def all_commands(datm_ray: CommandLine, address: str, folder: Path) -> None:
    """Run every job command at an address."""
    there = ("--address", address)
    assert "here  running" in datm_ray("job", "list", *there)[1]
    code, out, _ = datm_ray("job", "status", "here", *there)
    assert (code, out.splitlines()[0]) == (0, "here: running")
    assert datm_ray("job", "logs", "here", *there)[1] == "Experts: 2 tasks to run\n"
    assert datm_ray("job", "stop", "here", *there)[1] == "Job here is being stopped\n"
    code, out, err = datm_ray("job", "submit", "digits-ipc1", "--out", str(folder / "out"), *there)
    assert (code, err) == (0, "")
    assert out.startswith("Job datm-ray-")
    number = out.split()[1]
    assert SECRET not in out
    code, out, err = datm_ray("job", "logs", number, "--follow", *there)
    assert (code, out, err) == (0, f"Experts: 2 tasks to run\nJob {number} succeeded\n", "")


def test_every_command_works_through_proxies_and_gateways(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every command works through a proxy with password, a gateway with path or login, and with certificates."""
    certificate = make_certificate(tmp_path / "company.pem")

    def ending(asked: Asked, there: Dashboard) -> None:
        there.status = "SUCCEEDED" if there.job.get("submission_id") else "RUNNING"

    def login(header: str) -> Callable[[Asked, Dashboard], Answer | None]:
        wanted = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        return lambda asked, there: (
            ending(asked, there) if asked.headers.get(header) == wanted else page(407 if "Proxy" in header else 401)
        )

    cases: dict[str, tuple[dict[str, object], dict[str, str], Callable[[str], str], Callable[..., Answer | None]]] = {
        "plain": ({}, {}, lambda url: url, ending),
        "copied from a browser": ({}, {}, lambda url: f"{url}/#/jobs", ending),
        "a variable of Ray's that leads elsewhere": ({}, {"RAY_ADDRESS": "http://127.0.0.1:1"}, str, ending),
        "a needed proxy with a password": (
            {},
            {"http_proxy": "http://me:{SECRET}@{host}"},
            lambda url: "http://head.example:8265",
            login("Proxy-Authorization"),
        ),
        "a gateway with a path": ({"prefix": "/ray"}, {}, lambda url: f"{url}/", ending),
        "a gateway with a login": (
            {},
            {},
            lambda url: url.replace("://", f"://me:{SECRET}@"),
            login("Authorization"),
        ),
        "a company's certificate": ({"certificate": certificate}, {"SSL_CERT_FILE": str(certificate)}, str, ending),
        "the same by the other variable": (
            {"certificate": certificate},
            {"REQUESTS_CA_BUNDLE": str(certificate), "SSL_CERT_FILE": "/none"},
            str,
            ending,
        ),
    }
    for number, (given, variables, address, plan) in enumerate(cases.values()):
        with serving(log="Experts: 2 tasks to run\n", **given) as there, monkeypatch.context() as patched:
            there.plan = lambda asked, there=there, plan=plan: plan(asked, there)  # type: ignore[misc]
            host = there.address.partition("://")[2]
            for name, value in variables.items():
                patched.setenv(name, value.format(SECRET=SECRET, host=host))
            all_commands(datm_ray, address(there.address), tmp_path / str(number))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_address_on_this_machine_goes_around_the_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address on this machine bypasses the proxy, which could not reach it and must not see it."""
    with serving() as proxy, serving(host) as there:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.address)
        assert Jobs(there.address).job("here").status == "running"
        assert proxy.asked == []
        assert Jobs("http://head.example").job("here").status == "running"
        assert len(proxy.asked) == 3


def test_an_answer_of_somebody_else_is_not_taken_for_rays(there: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server's answer is reported by its status and the proxy; a token is requested in Ray's words only."""
    text = {"Content-Type": "text/plain"}
    gateway = {
        "200 OK and a web page": page(200),
        r"302 Found to https://sso\.example/login\)": page(302, Location=f"https://sso.example/login?state={SECRET}"),
        "401 Unauthorized and a web page": page(401),
        "404 Not Found and a web page": page(404),
        r"404 Not Found\)": (404, text, "404: Not Found"),
        "407 ": page(407),
        "500 .*web page": page(500),
        "502 Bad Gateway": page(502),
        r"503 Service Unavailable\)": (503, text, "no"),
        "200 OK and no version of Ray": (200, text, "OK"),
        "no version of Ray": (200, {"Content-Type": "application/json"}, "[]"),
        "no version of Ray ": (200, {"Content-Type": "application/json"}, '{"version": 1}'),
        "closed connection": LOST,
    }
    for expected, answer in gateway.items():
        there.plan = lambda _, answer=answer: answer  # type: ignore[misc]
        line = refusal(there.address)
        assert re.search(rf"no Ray cluster answers at {there.address} \(.*{expected.strip()}", line), (expected, line)
    there.plan = lambda _: (401, text, "Unauthorized: Missing authentication token")
    assert "asks for an authentication token" in refusal(there.address)
    there.plan = lambda _: page(407)
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", there.address.replace("://", f"://me:{SECRET}@"))
        line = refusal(f"{scheme}://head.example:8265")
        assert re.search(r"through the proxy http://USER:PASSWORD@127\.0\.0\.1:\d+ \(.*407", line)


def test_an_answer_of_another_server_is_one_line_for_every_command(
    datm_ray: CommandLine, there: Dashboard, tmp_path: Path
) -> None:
    """Another server's answer is one line and exit code 2, also after the cluster has answered."""
    commands = (["list"], ["status", "here"], ["logs", "here"], ["stop", "here"])
    for command in (*commands, ["submit", "digits-ipc1", "--out", str(tmp_path / "out")]):
        there.plan = lambda asked: None if asked.path == "/api/version" else page(502)
        code, out, err = datm_ray("job", *command, "--address", there.address)
        assert (code, out, len(err.splitlines())) == (2, "", 1), command
        assert "502 Bad Gateway" in err, command
        there.plan = lambda asked: None if asked.path == "/api/version" else (200, {}, "3")
        code, out, err = datm_ray("job", *command, "--address", there.address)
        assert (code, out, len(err.splitlines())) == (2, "", 1), command
        assert "unexpected" not in err, command


def test_an_unreachable_dashboard_is_reported_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, there: Dashboard, tmp_path: Path
) -> None:
    """The line has the reason, the likely causes, and the variables of proxies and certificates, without a password."""
    monkeypatch.setattr("datm_ray.runtime.ray.dashboard.CONNECT_TIMEOUT", 0.2)
    (text := tmp_path / "text.pem").write_text("no certificate")
    nobody = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    with (
        serving(certificate=make_certificate(tmp_path / "company.pem")) as safe,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        cases: list[tuple[str, str, dict[str, str]]] = [
            ("Connection refused", "http://127.0.0.1", {}),
            ("no answer in 0 s", f"http://127.0.0.1:{silent.getsockname()[1]}", {}),
            ("head.invalid", "http://head.invalid:8265", {}),
            ("SSL", there.address.replace("http:", "https:"), {}),
            ("closed", safe.address.replace("https:", "http:"), {}),
            ("at http://USER:PASSWORD@127.* .Connection refused", nobody, {}),
            (r"the proxy http://USER:PASSWORD@127\S+ \(.*refused", "http://h:1", {"http_proxy": nobody}),
            ("SOCKS", "http://h:1", {"all_proxy": "socks5://127.0.0.1:1080"}),
            ("no request can be sent", "http://h:1", {"http_proxy": f"http://me:{SECRET}/@127.0.0.1:1"}),
            ("no request can be sent", "http://h:1", {"http_proxy": f"me:{SECRET}@127.0.0.1:1"}),
            ("self-signed certificate", safe.address, {}),
            ("no certificate", safe.address, {"SSL_CERT_FILE": str(text)}),
            ("/none", safe.address, {"SSL_CERT_FILE": "/none"}),
        ]
        for expected, address, variables in cases:
            with monkeypatch.context() as patched:
                for name, value in variables.items():
                    patched.setenv(name, value)
                line = refusal(address)
            assert re.search(expected, line), (expected, line)
            assert "head node is down, or a proxy, a login or a certificate is between. Give the address" in line
            assert "(host, port, http or https)" in line
            assert all(each in line for each in ("https_proxy", "SSL_CERT_FILE", "USER:PASSWORD@HOST")), line


def test_a_port_that_speaks_no_http_is_named() -> None:
    """What such a port, as one of Ray's others, answers in bytes is not shown."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            while True:
                try:
                    asked, _ = other.accept()
                except OSError:
                    return
                with asked:
                    asked.recv(1000)
                    asked.sendall(b"\x00\x01 no HTTP\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        line = refusal(f"http://127.0.0.1:{other.getsockname()[1]}")
    assert "(it answers in something else than HTTP)" in line


@pytest.mark.parametrize(
    "address",
    [
        *("head:8266", "head:0", "head", "ray://head:10001", "http://head:x", "http://head?job=1", "auto", "http://"),
        *("http://[::1", "http://a b", f"me:{SECRET}@head:8265", f"http://me:{SECRET}@"),
    ],
)
def test_an_invalid_address_is_refused(address: str) -> None:
    """An invalid address is refused, with an example of a valid one."""
    line = refusal(address)
    assert "is not the address of a dashboard" in line
    assert line.endswith("Write it like http://HOST:8265.")


def test_an_address_of_the_environment_is_blamed_on_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad address from Ray's variable names that variable, which stays unchanged."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head:8265")
    assert refusal("head:8265").startswith("RAY_API_SERVER_ADDRESS 'head:8265' is not the address")
    with serving() as there:
        Jobs(there.address)
    assert refusal("head:8265").startswith("RAY_API_SERVER_ADDRESS")
