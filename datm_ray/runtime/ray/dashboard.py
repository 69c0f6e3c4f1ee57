"""Client of a cluster's dashboard over HTTP, through proxies and gateways.

Ray's own client may wait for ever, follows redirects to login pages, and takes every answer for Ray's. This client
limits the time of every request. A failure, or an answer of another server, becomes a `ClusterError` with its reason.
To do this, it overrides a private method of Ray's client. If a version of Ray lacks this method, time limits and such
errors are lost, but requests work. The client uses no websockets: many gateways do not pass them, and Ray's client
sends them past a proxy.
"""

from __future__ import annotations

import os
import re
from http.client import BadStatusLine
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
from datm_ray.runtime.variables import variables

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's first answer."""
ANSWER_TIMEOUT = 60.0
"""Seconds to wait for later answers of a cluster."""
OWN_ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's environment variable for the dashboard's address."""
PORT = 8265
"""Default port of a dashboard."""
VERSION = "/api/version"
"""URL path of a client's first request, which any Ray cluster answers."""
_CREDENTIALS = re.compile(r"(\w+://)[^\s'\"]*@|^[^\s:@/]+:[^\s@]*@")


def masked(text: str) -> str:
    """Text with *** for passwords, tokens and values given to `logs.hide`, and USER:PASSWORD for logins in URLs."""
    return _CREDENTIALS.sub(r"\1USER:PASSWORD@", logs.masked(text))


class Dashboard(JobSubmissionClient):
    """Ray's client for jobs, with time limits for requests and with errors that name their cause."""

    def __init__(self, address: str) -> None:
        """Connect to a dashboard.

        Args:
            address: URL such as http://127.0.0.1:8265, or http://HOST/PATH of a gateway. The part after a # is ignored,
                so that the URL may be copied from a browser.

        Raises:
            ClusterError: no such URL, no cluster answers, or the cluster's authentication token is missing or wrong.
        """
        _require_web_address(address)
        self._url = address = urldefrag(address).url.rstrip("/")
        use_token()
        try:
            # Ray's client would use these variables instead of its argument; old versions read RAY_ADDRESS only.
            with variables({OWN_ADDRESS: address, "RAY_ADDRESS": address}, replaces=True):
                super().__init__(address, verify=_authorities(address))
        except getattr(ray.exceptions, "AuthenticationError", ()) as failure:  # old versions of Ray have no such error
            raise _no_token(address, first_line(failure)) from None
        except (ValueError, TypeError, KeyError):
            raise _no_answer(address, "200 OK and no version of Ray") from None
        except (OSError, RuntimeError) as failure:
            raise _no_answer(address, first_line(failure)) from None
        hush()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        """Send a request with a time limit. Ray's client sends all its requests by this method.

        Raises:
            ClusterError: no answer came in time, or it is not Ray's.
        """
        seconds = CONNECT_TIMEOUT if endpoint == VERSION else ANSWER_TIMEOUT
        if _is_this_machine(self._url):  # a proxy on another machine would connect to itself
            options["proxies"] = {"http": None, "https": None, "all": None}
        try:
            hooks = {"response": self._require_ray}
            return super()._do_request(method, endpoint, timeout=seconds, hooks=hooks, **options)
        except (OSError, ValueError) as failure:
            raise _no_answer(self._url, _reason(failure, seconds)) from None

    def _require_ray(self, answer: requests.Response, **_: object) -> None:
        """Raise a `ClusterError` if the answer is not Ray's but that of a proxy, a gateway or another server.

        Also raise it if Ray asks for an authentication token. Ray answers with JSON, or with plain text that explains a
        refusal. Called before a redirect is followed.
        """
        status, is_page = answer.status_code, "html" in answer.headers.get("Content-Type", "").lower()
        is_refused = 300 <= status < 400 or status in (401, 403, 407, 429, 502, 503, 504)
        if is_refused or is_page or (status != 200 and answer.url.endswith(VERSION)):
            if status in (401, 403) and not is_page and "authentication token" in answer.text:  # Ray's own words
                raise _no_token(self._url, first_line(answer.text))
            answer.close()
            target = answer.headers.get("Location", "").partition("?")[0]
            more = f" to {target}" if target else " and a web page" if is_page else ""
            raise _no_answer(self._url, f"{status} {answer.reason}{more}")


def _require_web_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and not parts.query and not re.search(r"\s", address)
    except ValueError:
        good = False
    if not good:
        given = next((name for name in (OWN_ADDRESS, "RAY_ADDRESS") if os.environ.get(name) == address), "--address")
        raise ClusterError(
            f"{given} {masked(address)!r} is not the address of a dashboard",
            remedy=f"write it like http://HOST:{PORT}",
        )


def _authorities(address: str) -> str | bool:
    """Value for the argument `verify` of `requests`: path of a file of certificate authorities, or True.

    For an https address, the path is that in SSL_CERT_FILE, unless REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE is set.
    Otherwise True, which leaves the choice to `requests`: the file in these two variables, else its own list.
    """
    is_known = any(map(os.environ.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")))
    return True if is_known or not address.startswith("https:") else os.environ.get("SSL_CERT_FILE") or True


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _no_answer(address: str, reason: str) -> ClusterError:
    """Error for an address at which no cluster answers.

    The remedy names the environment variables for proxies and certificates.

    Args:
        reason: text about the answer if another server answered, otherwise why there is no answer.
    """
    proxy = None if _is_this_machine(address) else select_proxy(address, get_environ_proxies(address))
    through = f" through the proxy {masked(proxy)}" if proxy else ""
    return ClusterError(
        f"no Ray cluster answers at {masked(address)}{through} ({masked(reason)})",
        "the address is wrong (host, port, http or https), the head node is down, or a proxy, a login or a certificate "
        "is between",
        f"give the address at which a browser shows the dashboard, usually http://HOST:{PORT}, or a tunnel "
        f"(ssh -L {PORT}:127.0.0.1:{PORT} HOST). Proxies are in http_proxy, https_proxy and no_proxy, with %40, %2F "
        "and %3A for @, / and : of a password; a gateway's login is part of the address (http://USER:PASSWORD@HOST); "
        "a company's certificate is in the file of REQUESTS_CA_BUNDLE, or of SSL_CERT_FILE if that is not set",
    )


def _no_token(address: str, detail: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {masked(address)} asks for an authentication token ({detail})",
        "no token was given, or that of another cluster",
        "put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


def _reason(failure: Exception, seconds: float) -> str:
    """Why a request has no answer within `seconds`, from the first of the exceptions that led to the failure."""
    if isinstance(failure, requests.Timeout):
        return f"no answer in {seconds:.0f} s"
    if isinstance(failure, requests.exceptions.InvalidURL):
        return "no request can be sent"  # the failure's own text contains parts of the password
    first: BaseException = failure
    while inner := first.__cause__ or first.__context__:
        first = inner
    if type(first) is BadStatusLine:  # its text is what the port answered, in bytes
        return "it answers in something else than HTTP"
    return str(getattr(first, "strerror", None) or first_line(first))
