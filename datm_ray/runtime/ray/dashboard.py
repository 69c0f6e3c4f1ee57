"""Client of a cluster's dashboard over HTTP, through proxies and gateways, which explains failures.

Ray's own client may wait for ever, follows redirects to login pages, and takes every answer for Ray's. This client
limits the time of every request. A failure, or an answer of another server, becomes a `ClusterError` with its cause.
To do this, it overrides a private method of Ray's client. If a version of Ray lacks this method, time limits and causes
are lost, but requests work. The client uses no websockets: many gateways do not pass them, and Ray's client sends them
past a proxy.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import BadStatusLine, HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.parse import urldefrag, urlsplit

import ray.exceptions
import requests
from ray.job_submission import JobSubmissionClient
from requests.utils import get_environ_proxies, select_proxy

from datm_ray.errors import ClusterError
from datm_ray.monitor import logs
from datm_ray.runtime.ray.cluster import first_line
from datm_ray.runtime.ray.compat import hush, use_token

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's first answer."""
ANSWER_TIMEOUT = 60.0
"""Seconds to wait for later answers of a cluster."""
AUTHORITIES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
"""Environment variables that may name a file of certificates. The first one that is set is used."""
OWN_ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's environment variable for the dashboard's address."""
PORT = 8265
"""Default port of a dashboard."""
OTHER_PORTS = ("6379", "10001")
"""Default ports of Ray that do not speak HTTP: the drivers' port and Ray Client's port."""
VERSION = "/api/version"
"""URL path of a client's first request, which any Ray cluster answers."""
ESCAPES = "with %40, %2F and %3A for @, / and : in a password"
_CREDENTIALS = re.compile(r"(\w+://)[^\s'\"]*@|^[^\s:@/]+:[^\s@]*@")


def masked(text: str) -> str:
    """Replace what logs hide, and user names and passwords in the text's URLs, by placeholders."""
    return _CREDENTIALS.sub(r"\1USER:PASSWORD@", logs.masked(text))


class Dashboard(JobSubmissionClient):
    """Ray's client for jobs, with time limits for requests and with errors that name their cause."""

    def __init__(self, address: str) -> None:
        """Connect to a dashboard.

        Args:
            address: URL such as http://127.0.0.1:8265, or http://HOST/PATH of a gateway. The part after a # is ignored,
                so that the URL may be copied from a browser.

        Raises:
            ClusterError: no cluster answers at the address.
        """
        _require_web_address(address)
        self._url = address = urldefrag(address).url.rstrip("/")
        authorities = _authorities(address)
        use_token()
        try:
            with _instead_of_variables(address):
                super().__init__(address, verify=authorities)
        except getattr(ray.exceptions, "AuthenticationError", ()) as failure:  # old versions of Ray have no such error
            raise _no_token(address, first_line(failure)) from None
        except ssl.SSLError as failure:  # the file holds no certificate
            raise _unreachable(address, failure, 0) from None
        except (ValueError, TypeError, KeyError):
            raise _stranger(address, "200 OK and no version of Ray") from None
        except (OSError, RuntimeError) as failure:
            raise _stranger(address, first_line(failure)) from None
        hush()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        """Send a request. Ray's client sends all its requests by this method."""
        seconds = CONNECT_TIMEOUT if endpoint == VERSION else ANSWER_TIMEOUT
        if _is_this_machine(self._url):  # a proxy on another machine would connect to itself
            options["proxies"] = {"http": None, "https": None, "all": None}
        try:
            hooks = {"response": self._require_ray}
            return super()._do_request(method, endpoint, timeout=seconds, hooks=hooks, **options)
        except (OSError, ValueError) as failure:
            raise _unreachable(self._url, failure, seconds) from None

    def _require_ray(self, answer: requests.Response, **_: object) -> None:
        """Raise an error if the answer comes from a proxy, a gateway or another server, not from Ray.

        Ray answers with JSON, or with plain text that explains a refusal. Called before a redirect is followed.
        """
        status, is_page = answer.status_code, "html" in answer.headers.get("Content-Type", "").lower()
        detail = answer.text if status in (401, 403) and not is_page else answer.headers.get("Location", "")
        failure = _refused(self._url, status, answer.reason, detail)
        if failure is None and (is_page or (status != 200 and answer.url.endswith(VERSION))):
            failure = _stranger(self._url, f"{status} {answer.reason}{' and a web page' if is_page else ''}")
        if failure is not None:
            answer.close()
            raise failure


@contextmanager
def _instead_of_variables(address: str) -> Iterator[None]:
    """Set two environment variables to `address` while the block runs: Ray's client prefers them to its argument."""
    names = (OWN_ADDRESS, "RAY_ADDRESS")  # old versions of Ray read RAY_ADDRESS only
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, address))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _require_web_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and not parts.query and not re.search(r"\s", address)
    except ValueError:
        good = False
    if not good:
        given = next((name for name in (OWN_ADDRESS, "RAY_ADDRESS") if os.environ.get(name) == address), "--address")
        host = re.fullmatch(r"(?:\w+://|(?!\w+://))([\w.-]+)(?::(\w*))?(?:[/?].*)?", address)
        name, port = host.groups() if host and host[1] != "auto" else ("127.0.0.1", None)
        port = port if port and port.isdigit() and port not in ("0", *OTHER_PORTS) else str(PORT)
        raise ClusterError(
            f"{given} {masked(address)!r} is not the address of a dashboard",
            remedy=f"write it like http://{name}:{port}",
        )


def _authorities(address: str) -> str | bool:
    """File of accepted certificate authorities, from the first variable of `AUTHORITIES` that is set.

    True means the authorities that `requests` accepts by default.
    """
    name = next((name for name in AUTHORITIES if os.environ.get(name)), None)
    if name is None or urlsplit(address).scheme != "https":
        return True
    if not os.path.exists(os.environ[name]):
        raise ClusterError(
            f"{name} is {os.environ[name]!r}, and there is no such file",
            remedy="set it to the file of the certificate of the dashboard's authority, in PEM, or unset it",
        )
    return os.environ[name]


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_of(address: str) -> str | None:
    """Text about the proxy of requests: its address without credentials, and its variable; `None` without a proxy."""
    proxy = None if _is_this_machine(address) else select_proxy(address, get_environ_proxies(address))
    if proxy is None:
        return None
    scheme = urlsplit(address).scheme
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    name = next((name for name in names if os.environ.get(name) == proxy), "this system's settings")
    return f"the proxy {masked(proxy)} (of {name})"


def _no_answer(address: str, what: str, cause: str, remedy: str) -> ClusterError:
    return ClusterError(f"no Ray cluster answers at {masked(address)} ({masked(what)})", cause, remedy)


def _refused(address: str, status: int, reason: str, detail: str = "") -> ClusterError | None:
    """Error for an HTTP status with which a proxy, a gateway or Ray's token check refuses a request.

    Returns `None` for other statuses.

    Args:
        detail: text of the answer, or the target of a redirect.
    """
    proxy = _proxy_of(address)
    between = f"{proxy}, or a gateway behind it," if proxy else "a gateway on the way"
    around = f"reach the dashboard without it, such as through `ssh -L {PORT}:127.0.0.1:{PORT} HOST`"
    if status == 407:
        return _no_answer(
            address,
            f"{status} {reason}",
            f"{proxy or 'a proxy'} requires a user name and a password, or does not accept those it was given",
            f"write them into that variable, like http://USER:PASSWORD@PROXY:PORT, {ESCAPES}",
        )
    if 300 <= status < 400:
        return _no_answer(
            address,
            f"{status} {reason} to {detail.partition('?')[0] or 'nowhere'}",
            f"{between} requires a login, or the dashboard has another address",
            f"give that address if it is the dashboard's, or {around}",
        )
    if status in (401, 403) and "authentication token" in detail:  # Ray's own words
        return _no_token(address, first_line(detail))
    if status in (401, 403):
        return _no_answer(
            address,
            f"{status} {reason}",
            f"{between} requires a login, or does not accept this one",
            f"write it into the address, like http://USER:PASSWORD@HOST, where that is enough, or {around}",
        )
    if status in (429, 502, 503, 504):
        return _no_answer(
            address,
            f"{status} {reason}",
            f"{between} {'has had too many requests' if status == 429 else 'cannot reach the dashboard'}",
            "check the address, and whether the head node is up, or try again in a minute",
        )
    return None


def _no_token(address: str, detail: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {masked(address)} asks for an authentication token ({detail})",
        "no token was given, or that of another cluster",
        "put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


def _stranger(address: str, detail: str) -> ClusterError:
    """Error for an answer that does not come from Ray; `detail` describes the answer."""
    parts, proxy = urlsplit(address), _proxy_of(address)
    return _no_answer(
        address,
        detail,
        f"another server answers there, or the login page of {proxy or 'a gateway'}",
        f"a dashboard's usual port is {PORT}: {parts.scheme}://{parts.hostname}:{PORT}"
        if parts.port is None
        else "give the address at which a browser shows the dashboard, up to the #",
    )


def _unreachable(address: str, failure: Exception, seconds: float) -> ClusterError:
    """Error for a request without any answer within `seconds`, with its likely cause."""
    chain = list(_chain(failure))
    first, proxy, parts = chain[-1], _proxy_of(address), urlsplit(address)
    detail = getattr(first, "strerror", None) or first_line(first)
    if "Tunnel connection failed: " in detail:  # a proxy refused https
        status, _, reason = detail.partition("failed: ")[2].partition(" ")
        if status.isdigit() and (refused := _refused(address, int(status), reason)):
            return refused
    if isinstance(failure, requests.Timeout):
        detail = f"no answer in {seconds:.0f} s"
    certificate = next((each for each in chain if isinstance(each, ssl.SSLCertVerificationError)), None)
    detail = detail if certificate is None else certificate.verify_message
    variable = next((name for name in AUTHORITIES if os.environ.get(name)), None)
    if certificate is not None and certificate.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, IP_ADDRESS
        cause, remedy = "the certificate is that of another host name", "give the address with the name that is in it"
    elif certificate is not None and certificate.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
        cause, remedy = "the certificate is too old, or this machine's clock wrong", "have it renewed"
    elif certificate is not None or "certificate or crl" in detail:
        known = f"not in {os.environ[variable]}, the file of {variable}" if variable else "unknown here"
        cause = f"the certificate is of an authority that is {known}, such as a company's own"
        remedy = "set REQUESTS_CA_BUNDLE or SSL_CERT_FILE to the file of the authority's certificate, in PEM"
    elif isinstance(first, ssl.SSLError):
        cause = "the port does not speak https"
        remedy = f"write http:// if the dashboard has no certificate: {masked(address).replace('https:', 'http:', 1)}"
    elif proxy and isinstance(failure, requests.exceptions.InvalidURL):
        detail = "no request can be sent"  # the failure's own text contains parts of the password
        cause, remedy = (
            f"the address of {proxy} cannot be read",
            f"write it like http://USER:PASSWORD@PROXY:PORT, {ESCAPES}",
        )
    elif proxy:
        cause = f"the request went through {proxy}"
        remedy = f"check that variable, or set no_proxy={parts.hostname} to reach the address directly"
    elif isinstance(first, socket.gaierror):
        cause = f"there is no host {parts.hostname!r}, or its name is known in another network only"
        remedy = "check the spelling, or go through a tunnel or a VPN"
    elif isinstance(first, (HTTPException, ConnectionResetError)):
        detail = "it answers in something else than HTTP" if type(first) is BadStatusLine else detail
        cause = "the port speaks https, or is another one of Ray's" if parts.scheme == "http" else "a gateway closed it"
        remedy = f"write https:// if the dashboard has a certificate; its usual port is {PORT}"
    else:
        cause = "the address is wrong, the head node is down, or its port cannot be reached from here"
        port = f"{parts.scheme}://{parts.hostname}:{PORT}" if parts.port is None else f"http://127.0.0.1:{PORT}"
        remedy = f"give the address of its dashboard, such as {port}, through a tunnel if need be"
    return _no_answer(address, detail, cause, remedy)


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that led to it. The original one comes last."""
    seen: list[BaseException | None] = [None]
    following: object = failure
    while isinstance(following, BaseException) and following not in seen:
        yield following
        seen.append(following)
        inside = [getattr(following, "reason", None), *following.args, following.__cause__, following.__context__]
        following = next((each for each in inside if isinstance(each, BaseException) and each not in seen), None)
