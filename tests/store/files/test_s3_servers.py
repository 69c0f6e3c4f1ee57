"""Tests S3 servers other than AWS: what they lack, refuse, or lose for a while. Needs moto."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, SSLError

from datm_ray.config import ClusterConfig
from datm_ray.errors import OvertakenError, StoreError, TransientStoreError
from datm_ray.store.claims import Claim
from datm_ray.store.files import patience, s3
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, open_location
from datm_ray.store.files.traffic import traffic
from datm_ray.store.tensors import read_tensors, write_tensors
from tests.store.proxy import BUSY, LOST_ANSWER, LOST_REQUEST, Plan, Proxy, refusal, serving

pytestmark = pytest.mark.s3


@pytest.fixture
def file(bucket: str, s3_proxy: Proxy) -> Location:
    """A place for a file, behind the proxy."""
    return open_location(f"s3://{bucket}/folder/file")


def always(method: str, fault: str) -> Plan:
    return lambda given, path: fault if given == method else None


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a key and a self-signed certificate of 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = built.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        signed.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return str(path)


@pytest.fixture
def tls_proxy(s3_server: str, bucket: str, s3_environment: Callable[[str], None], certificate: str) -> Iterator[Proxy]:
    """A TLS proxy, untrusted by the environment, in front of the server."""
    with serving(s3_server, certificate) as running:
        s3_environment(running.url)
        yield running


# --- checksums and TLS ---


def chunked(proxy: Proxy) -> int:
    """Uploads with checksums in trailers, which many servers do not support."""
    puts = [each.headers for each in proxy.exchanges if each.method == "PUT"]
    return sum("x-amz-trailer" in put or "aws-chunked" in put.get("content-encoding", "") for put in puts)


def test_no_checksum_is_sent_over_tls_unless_asked_for(bucket, tls_proxy, certificate, monkeypatch, tmp_path):
    """Uploads to a given endpoint have no trailers, unless the user's variables or profile ask for them."""
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    file = open_location(f"s3://{bucket}/file")
    file.write_text("content")
    assert file.read_bytes() == b"content"
    with pytest.raises(AlreadyExistsError), file.create(replace=False) as draft:
        draft.write(b"another")
    assert (tls_proxy.count("PUT"), chunked(tls_proxy)) == (2, 0)
    assert not [each for each in tls_proxy.exchanges if "x-amz-checksum-mode" in each.headers]
    (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_supported\n")
    for name, value in {
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            s3.S3.clear_instance_cache()
            before = chunked(tls_proxy)
            open_location(f"s3://{bucket}/file").write_text("content")
            assert chunked(tls_proxy) == before + 1, name


@pytest.mark.parametrize("setting", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL", "profile"])
def test_an_endpoint_is_known_wherever_it_is_given(s3_environment, monkeypatch, tmp_path, setting):
    """Checksums are sent to AWS's own servers only, wherever the endpoint is configured."""
    s3_environment("")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for endpoint, expected in (
        ("https://s3.example.com", "when_required"),
        ("https://s3.eu-west-1.amazonaws.com", "when_supported"),
    ):
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {endpoint}\n")
        options = {"endpoint_url": endpoint} if setting.startswith("FSSPEC") else {}
        variable = ("AWS_CONFIG_FILE", str(tmp_path / "config")) if setting == "profile" else (setting, endpoint)
        monkeypatch.setenv(*variable)
        s3.S3.clear_instance_cache()
        file_system = s3.S3(use_listings_cache=False, **options)
        file_system.connect()
        assert file_system._ready.meta.endpoint_url == endpoint
        assert file_system._ready.meta.config.request_checksum_calculation == expected
        assert file_system._ready.meta.config.response_checksum_validation == expected


def test_an_unknown_certificate_is_one_line_that_names_the_variable(bucket, tls_proxy, monkeypatch, tmp_path):
    """An untrusted certificate, or a missing AWS_CA_BUNDLE file, is one immediate line that names the variable."""
    file, before = open_location(f"s3://{bucket}/file"), traffic()
    with pytest.raises(StoreError, match=r"certificate is not trusted .*Set AWS_CA_BUNDLE to the file") as caught:
        file.write_text("content")
    assert "\n" not in str(caught.value)
    assert (traffic() - before).retries == 0
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    s3.S3.clear_instance_cache()
    with pytest.raises(StoreError, match=r"AWS_CA_BUNDLE"):
        open_location(f"s3://{bucket}/file").write_text("content")


# --- put-once ---


@pytest.fixture
def warnings_of_s3(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Log lines of the store, empty at the start."""
    s3._say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name == s3.__name__]


def refusing_conditions(proxy: Proxy, fault: str) -> None:
    """Let the proxy refuse conditional uploads, as some servers do."""
    proxy.plan_by_headers = lambda method, headers: fault if "if-none-match" in headers else None


@pytest.mark.parametrize(
    "fault",
    [
        refusal(501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
        refusal(400, "InvalidArgument", "Unsupported header If-None-Match"),
    ],
)
def test_write_once_has_a_second_best(file, s3_proxy, warnings_of_s3, fault):
    """Without conditional uploads a file is looked for before and after writing, and one line says so."""
    refusing_conditions(s3_proxy, fault)
    for number in range(2):
        place = file.parent / str(number)
        with place.create(replace=False) as draft:
            draft.write(b"first")
        with pytest.raises(AlreadyExistsError), place.create(replace=False) as draft:
            draft.write(b"second")
        assert place.read_bytes() == b"first"
    (line,) = warnings_of_s3()
    assert "cannot write a file only if it is missing (If-None-Match)" in line
    assert s3_proxy.faults == {fault: 1}  # sent once


def test_of_two_second_best_writers_at_one_moment_one_stores(file, s3_proxy, monkeypatch):
    """Two such writers at once store one file; the one whose file is replaced reports that it exists."""
    refusing_conditions(s3_proxy, refusal(501, "NotImplemented"))
    call, others = s3.S3.call_s3, []

    def overtaken(self, method, *given, **named):
        out = call(self, method, *given, **named)
        if method == "put_object" and "IfNoneMatch" not in named and not others:
            others.append(method)
            file.write_text("another's")
        return out

    monkeypatch.setattr(s3.S3, "call_s3", overtaken)
    with pytest.raises(AlreadyExistsError), file.create(replace=False) as draft:
        draft.write(b"mine")
    assert file.read_bytes() == b"another's"


def test_a_large_file_is_one_upload(file, s3_proxy):
    """A file of 120 MB is one conditional PUT, because some servers ignore conditions of uploads in parts."""
    content = bytes(120 * 2**20)
    with file.create(replace=False) as draft:
        draft.write(content)
    assert [each.method for each in s3_proxy.exchanges if each.method in ("PUT", "POST")] == ["PUT"]
    assert s3_proxy.exchanges[0].headers["if-none-match"] == "*"
    assert file.size() == len(content)


def test_a_file_in_parts_is_looked_for_before_and_after(file, s3_proxy, monkeypatch):
    """A file larger than one upload is stored once, also by a server that ignores its condition."""
    monkeypatch.setattr(s3, "LARGEST_PUT", 10)
    put_file = file.fs.put_file
    with file.create(replace=False) as draft:
        draft.write(b"first" * 3)
    ignoring = lambda data, path, mode, **named: put_file(data, path, mode="overwrite", **named)  # noqa: E731
    monkeypatch.setattr(file.fs, "put_file", ignoring)
    with pytest.raises(AlreadyExistsError), file.create(replace=False) as draft:
        draft.write(b"second" * 3)
    assert file.read_bytes() == b"first" * 3

    def overtaken(data, path, mode, **named):
        put_file(data, path, mode="overwrite", **named)
        file.fs.pipe_file(path, b"another's", mode="overwrite")

    monkeypatch.setattr(file.fs, "put_file", overtaken)
    with pytest.raises(AlreadyExistsError), (file.parent / "new").create(replace=False) as draft:
        draft.write(b"third" * 3)


# --- what is refused ---


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "The server does not know this access key. Check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "The secret key is not that of the access key. Check AWS_"),
        (403, "AccessDenied", "Access is denied (AccessDenied). If the bucket is yours, allow this user s3:"),
        (400, "ExpiredToken", "The session token has expired. Get new credentials and run the same command again"),
        (403, "RequestTimeTooSkewed", "The clocks of this machine and of the server differ too much. Set"),
        (403, "QuotaExceeded", "The quota of the bucket or its user is used up. Raise it or free some space"),
        (404, "NoSuchBucket", "The bucket does not exist. Check its spelling"),
        (400, "IllegalLocationConstraintException", "The bucket is in another region. Set AWS_DEFAULT_REGION"),
    ],
)
def test_each_refusal_has_its_own_cause_and_remedy(file, s3_proxy, status, code, words):
    """Each refusal gives its own cause and remedy, also by HEAD, whose answer has no code or message."""
    s3_proxy.plan = lambda method, path: refusal(status, code)
    for action in (file.read_bytes, file.exists, file.size, file.parent.list, lambda: file.write_text("content")):
        with pytest.raises(StoreError) as caught:
            action()
        assert words in str(caught.value)
        assert "None" not in str(caught.value)


def test_the_missing_permission_is_named(file, s3_proxy):
    """A refused action names the permission it needs; without s3:ListBucket a missing key is 403."""
    denied = refusal(403, "AccessDenied", "Access Denied")
    for method, action, permission in (
        ("HEAD", file.exists, "s3:ListBucket on the bucket, without which a missing file is denied too"),
        ("GET", file.read_bytes, "s3:GetObject"),
        ("GET", file.parent.list, "s3:ListBucket"),
        ("PUT", lambda: file.write_text("x"), "s3:PutObject"),
        ("DELETE", file.remove, "s3:DeleteObject"),
    ):
        s3_proxy.plan = lambda *_: None
        file.write_text("content")
        s3_proxy.plan = always(method, denied)
        with pytest.raises(StoreError, match=permission):
            action()


# --- servers that do not answer for a while ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale minutes of waiting to tenths of seconds, in proportion."""
    monkeypatch.setattr(patience, "LONGEST", patience.LONGEST / 100)
    for name in ("FIRST_PATIENCE", "FIRST_PAUSE", "LONGEST_PAUSE", "LINE_AFTER", "LINE_EVERY"):
        monkeypatch.setattr(s3, name, getattr(s3, name) / 100)


def until(moment: float, fault: str) -> Plan:
    """Fails every request before a moment of the monotonic clock."""
    return lambda *_: fault if time.monotonic() < moment else None


@pytest.mark.parametrize("fault", [BUSY, LOST_REQUEST, LOST_ANSWER])
def test_a_server_that_restarts_is_waited_for(file, s3_proxy, quick, warnings_of_s3, fault):
    """Reads, writes, listings and deletions wait for a restarting server, log it at intervals and count retries."""
    file.write_text("content")
    before = traffic()
    for action, expected in (
        (file.read_bytes, b"content"),
        (file.exists, True),
        (file.parent.list, ["file"]),
        (lambda: file.write_text("new"), None),
        (file.remove, None),
    ):
        s3_proxy.plan = until(time.monotonic() + 0.5, fault)  # 50 seconds, that is
        assert action() == expected
    lines = warnings_of_s3()
    assert 3 <= len(lines) <= 12
    bucket = file.path.partition("/")[0]
    assert lines[0].startswith(f"s3://{bucket} does not answer (")
    assert "trying again for up to " in lines[0]
    assert (traffic() - before).retries > 10


def test_a_server_that_stays_away_ends_the_run_after_minutes(file, s3_proxy, quick):
    """A server that stays away ends the run after minutes with one error that says so."""
    file.write_text("content")
    s3_proxy.plan = lambda *_: LOST_REQUEST
    began = time.monotonic()
    with pytest.raises(StoreError, match="The server does not answer"):
        file.read_bytes()
    assert 2 < time.monotonic() - began < 6  # a hundredth of 300 s


def test_a_server_that_is_busy_when_a_process_starts_is_waited_for(file, s3_proxy, quick):
    """A server whose first answers to a process are "busy" (503) is waited for longer than a wrong address."""
    s3.S3.clear_instance_cache()
    place = open_location(file.uri)
    s3_proxy.plan = until(time.monotonic() + 0.5, BUSY)  # 50 seconds, that is
    place.write_text("content")
    assert place.read_bytes() == b"content"


@pytest.fixture
def machine(bucket: str, s3_server: str, s3_environment: Callable[[str], None], monkeypatch) -> Iterator[list[float]]:
    """A machine that hands out credentials, from a moment of the monotonic clock on that the list holds."""
    moment = [0.0]
    rights = dict.fromkeys(("AccessKeyId", "SecretAccessKey", "Token"), "x") | {"Expiration": "2099-01-01T00:00:00Z"}

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500 if time.monotonic() < moment[0] else 200)
            self.end_headers()
            self.wfile.write(json.dumps(rights).encode() if self.path.endswith("/role") else b"role")

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        s3_environment(s3_server)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield moment
        server.shutdown()


def test_credentials_that_a_machine_hands_out_late_are_waited_for(bucket, machine, quick, warnings_of_s3, monkeypatch):
    """A worker whose machine fails to hand out credentials for a while waits for them; a command says so at once."""
    monkeypatch.setattr(patience, "_rights_are_there", False)  # another test may have made a worker
    machine[0] = time.monotonic() + 3600
    place = open_location(f"s3://{bucket}/file")
    with pytest.raises(StoreError, match="No credentials were found") as caught:
        place.write_text("content")
    assert not isinstance(caught.value, TransientStoreError)
    monkeypatch.setattr(patience, "_rights_are_there", True)
    machine[0] = time.monotonic() + 0.5  # 50 seconds, that is
    before = traffic()
    place.write_text("content")
    assert (traffic() - before).retries
    assert warnings_of_s3()[0].startswith(f"s3://{bucket} has no credentials yet (Unable to locate credentials); try")
    machine[0] = time.monotonic() + 3600
    assert place.read_bytes() == b"content", "the client keeps what it has"


def test_credentials_that_cannot_be_renewed_are_waited_for_once_there_were_some(bucket, machine, quick, monkeypatch):
    """Credentials that end in mid-run and are not renewed at once cost attempts, and not the run."""
    monkeypatch.setattr(patience, "_rights_are_there", False)
    place = open_location(f"s3://{bucket}/file")
    failures = [CredentialRetrievalError(provider="iam-role", error_msg="timed out"), NoCredentialsError()]
    words = r"could not be fetched .*timed out.* AWS_METADATA_SERVICE_NUM_ATTEMPTS"
    with pytest.raises(StoreError, match=words), place.explaining("read"):
        place.fs.patiently(place.path, lambda: raise_next(failures[:1]))
    place.write_text("content")
    assert place.fs.patiently(place.path, lambda: raise_next(failures) or place.read_bytes()) == b"content"
    assert failures == []


def raise_next(failures: list[Exception]) -> None:
    """Raise the last error of a list and take it from there; return if there is none left."""
    if failures:
        raise failures.pop()


@pytest.fixture
def deadline() -> Iterator[Callable[[float], None]]:
    """A function that sets the seconds after which this process counts as lost, until the test ends."""
    yield patience.end_within
    patience.end_within()


@pytest.mark.parametrize("seconds", [60.0, 100.0, ClusterConfig().peer_timeout, 600.0, 86_400.0])
def test_a_worker_gives_a_server_up_before_its_peers_give_up_the_worker(file, s3_proxy, deadline, seconds):
    """The error of a silent server comes within four fifths of the time for which peers wait."""
    deadline(seconds)
    assert file.exists() is False  # makes a client
    settings = file.fs._ready.meta.config
    assert settings.connect_timeout + settings.read_timeout >= 5.5, "a healthy server may be slow"
    silence = patience.REQUESTS * (settings.connect_timeout + settings.read_timeout)
    assert patience.patience() + silence <= 0.8 * seconds + 1e-9


@pytest.mark.parametrize("has_conditions", [True, False])
@pytest.mark.parametrize("replace_", [True, False])
@pytest.mark.parametrize("fault", [BUSY, LOST_REQUEST, LOST_ANSWER, "busy later"])
def test_an_attempt_to_write_is_five_requests_at_most(file, s3_proxy, monkeypatch, fault, replace_, has_conditions):
    """An upload, with a claim as its guard, is never more requests than `patience` counts, also if it fails."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.S3.clear_instance_cache()
    place = open_location(file.uri)
    if not has_conditions:
        refusing_conditions(s3_proxy, refusal(501, "NotImplemented"))
        with (place.parent / "another").create(replace=False) as draft:
            draft.write(b"the first upload finds out that the server refuses conditions")
    claim = Claim(place.parent / "claim")
    claim.take()
    del s3_proxy.exchanges[:]
    is_later = fault == "busy later"  # from the moment on when the upload has been stored
    s3_proxy.plan = (lambda *_: BUSY if s3_proxy.count("PUT") else None) if is_later else always("PUT", fault)
    with suppress(TransientStoreError), replace(place, guard=claim.require).create(replace=replace_) as draft:
        draft.write(b"new")
    # The HTTP client sends a request again at once, without a wait, if an idle connection was closed.
    sent = {each.headers["amz-sdk-invocation-id"] for each in s3_proxy.exchanges}
    is_looked_for = not replace_ and not has_conditions  # before and after the upload
    assert len(sent) == (5 if is_looked_for else 3 if is_later else 4)
    assert len(sent) <= patience.REQUESTS


def test_a_second_best_upload_finds_its_own_file_again(file, s3_proxy, quick):
    """If the look after an upload fails, the next attempt finds the file that this upload has stored."""
    refusing_conditions(s3_proxy, refusal(501, "NotImplemented"))
    with (file.parent / "another").create(replace=False) as draft:
        draft.write(b"the first upload finds out that the server refuses conditions")
    uploads = s3_proxy.count("PUT")
    s3_proxy.plan = lambda *_: BUSY if s3_proxy.count("PUT") > uploads and s3_proxy.faults[BUSY] < 3 else None
    with file.create(replace=False) as draft:
        draft.write(b"mine")
    assert (s3_proxy.count("PUT"), s3_proxy.faults[BUSY], file.read_bytes()) == (uploads + 1, 3, b"mine")


def test_a_worker_whose_peers_wait_repeats_requests_for_a_shorter_time(file, s3_proxy, quick, deadline):
    """A guarded upload to a busy server ends within a share of the deadline, and waits longer without one."""
    file.write_text("content")
    s3_proxy.plan = lambda *_: BUSY
    place = replace(file, guard=lambda: file.exists() and None)
    deadline(2.0)
    assert patience.patience() == pytest.approx(2.0 * patience.SHARE)
    with pytest.raises(TransientStoreError, match="Cannot look for"):
        place.write_text("new")
    deadline(float("inf"))
    assert patience.patience() == patience.LONGEST


def test_an_upload_asks_its_guard_before_each_attempt(file, s3_proxy, quick):
    """An upload that waits for a busy server ends without another attempt once somebody else may write."""
    file.write_text("old")
    s3_proxy.plan = always("PUT", BUSY)

    def guard() -> None:
        if s3_proxy.faults:
            raise OvertakenError("another one came")

    with pytest.raises(OvertakenError):
        replace(file, guard=guard).write_text("new")
    assert s3_proxy.faults == {BUSY: 1}
    assert file.read_bytes() == b"old"


def test_only_what_may_pass_is_worth_another_attempt(file, s3_proxy, quick, deadline):
    """An error says whether another attempt may help: a busy or silent server, not a denial, and that at once."""
    file.write_text("content")
    asked = list[str]()

    def failing(fault, path):
        asked.append(path)
        if len(asked) > 3:
            deadline(0.0)  # after some requests, so that the error does not depend on the speed of this machine
        return fault

    for fault, kind in {
        BUSY: TransientStoreError,
        LOST_REQUEST: TransientStoreError,
        refusal(503, "SlowDown"): TransientStoreError,
        refusal(403, "AccessDenied"): StoreError,
        refusal(400, "ExpiredToken"): StoreError,
        refusal(404, "NoSuchBucket"): StoreError,
    }.items():
        asked.clear()
        deadline(60.0)
        s3_proxy.plan, before = lambda _, path, fault=fault: failing(fault, path), traffic()
        with pytest.raises(StoreError) as caught:
            file.read_bytes()
        assert type(caught.value) is kind, fault
        assert bool((traffic() - before).retries) == (kind is TransientStoreError), fault


def test_an_address_where_nobody_answers_is_given_up_within_seconds(s3_environment, warnings_of_s3):
    """An address that never answered is an error within seconds, without a log line."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, so that nobody listens there
        s3_environment(f"http://127.0.0.1:{unused.getsockname()[1]}")
        before = traffic()
        with pytest.raises(StoreError, match=r"The server does not answer .*Check the network and AWS_ENDPOINT_URL"):
            open_location("s3://bucket/file").exists()
    assert (traffic() - before).retries < 12  # 20 or more if it were repeated for minutes
    assert warnings_of_s3() == []


@pytest.mark.parametrize("answer", ["a web page", "no HTTP"])
def test_another_server_than_s3_is_given_up_within_seconds(s3_environment, warnings_of_s3, answer):
    """A server that is no S3, such as a web console, is an error within seconds that blames the address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer == "a web page":
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<html>hello</html>")
            else:
                self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    s3_environment(f"http://127.0.0.1:{server.server_port}")
    before = traffic()
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
        open_location("s3://bucket/folder").list()
    server.shutdown()
    server.server_close()
    assert (traffic() - before).retries < 12  # 20 or more if it were repeated for minutes
    assert warnings_of_s3() == []


def test_tls_that_fails_for_a_while_is_waited_for_and_a_certificate_is_not():
    """TLS alerts of a restarting gateway are retried; an untrusted certificate is not."""
    address = "https://127.0.0.1"
    fs = s3.S3()
    assert fs.passes(SSLError(endpoint_url=address, error="[SSL: TLSV1_ALERT_INTERNAL_ERROR] internal error"))
    assert not fs.passes(SSLError(endpoint_url=address, error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"))


def test_a_second_best_writer_that_cannot_look_writes_nothing(file, s3_proxy):
    """A writer that may neither use a condition nor look writes nothing."""
    file.write_text("first")
    refusing_conditions(s3_proxy, refusal(501, "NotImplemented"))
    conditions = s3_proxy.plan
    s3_proxy.plan = lambda method, path: refusal(403, "AccessDenied") if method == "HEAD" else conditions(method, path)
    with pytest.raises(StoreError, match="s3:"), file.create(replace=False) as draft:
        draft.write(b"second")
    s3_proxy.plan = lambda *_: None
    assert file.read_bytes() == b"first"


def test_a_file_that_becomes_shorter_is_read_again(file, s3_proxy, monkeypatch):
    """A file that is replaced by a shorter one during a read is read again."""
    write_tensors(file, {"x": np.zeros(100_000, np.float32)}, kind="test", metadata={})
    read_ranges = Location.read_ranges
    left = [1]

    def replaced(location, ranges):
        if left:
            left.pop()
            write_tensors(file, {"x": np.ones(3, np.float32)}, kind="test", metadata={})
        return read_ranges(location, ranges)

    monkeypatch.setattr(Location, "read_ranges", replaced)
    assert read_tensors(file, kind="test").arrays["x"].tolist() == [1, 1, 1]


def test_a_folder_is_no_file(file):
    """Reading a folder is an error that calls it a folder, as on a disk, not a damaged file."""
    file.write_text("content")
    with pytest.raises(StoreError, match="Is a directory"):
        file.parent.size()


def test_attempts_are_the_users_to_choose(file, s3_proxy, monkeypatch):
    """AWS_MAX_ATTEMPTS sets the number of attempts, in place of minutes."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    s3.S3.clear_instance_cache()
    place = open_location(file.uri)
    s3_proxy.plan = lambda *_: BUSY
    with pytest.raises(StoreError):
        place.exists()
    assert s3_proxy.count("HEAD") == 3
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "0")
    s3.S3.clear_instance_cache()
    with pytest.raises(StoreError):
        open_location(file.uri).exists()
    assert s3_proxy.count("HEAD") == 4


def test_a_slow_upload_is_not_given_up(s3_environment, monkeypatch):
    """A slow upload succeeds, for an answer's time limit starts after it; no second copy is in memory meanwhile."""
    monkeypatch.setattr(s3.S3, "read_timeout", 1)
    monkeypatch.setattr(patience, "LONGEST", 1.0)
    content = bytes(50 * 2**20)

    def take_slowly(server: socket.socket) -> None:  # silent until the end
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as request:
            while request.readline().strip():
                pass
            for _ in range(50):
                request.read(len(content) // 50)
                time.sleep(0.05)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        taking = threading.Thread(target=take_slowly, args=(server,), daemon=True)
        taking.start()
        s3_environment(f"http://127.0.0.1:{server.getsockname()[1]}")
        before = traffic()
        tracemalloc.start()
        open_location("s3://bucket/file").write_atomic(content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        taking.join()
    assert (traffic() - before).retries == 0
    assert peak < len(content) / 2
