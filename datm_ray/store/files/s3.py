"""S3: settings of its client, retries, and files that are written only once.

A request that fails temporarily is repeated for minutes (see `patience`), and a log line reports it. AWS_MAX_ATTEMPTS
sets a number of attempts instead. Until an S3 server has answered this process for the first time, a request is
repeated for seconds only, because the address is probably wrong; but after the answer "busy" it is repeated for
minutes. If a machine or pod fails to give credentials, requests are repeated too, in workers and in processes that had
credentials before.

The header If-None-Match tells a server to write a file only if the file is missing. A file of up to 5 GiB is written
only once if the server respects this header. Larger files are sent in parts, for which some servers ignore the header,
and some servers refuse the header for all files. In these cases the file is looked for before and after the upload. If
two writers then upload at the same moment, the later one replaces the earlier one's file, and only the writer whose
file is stored reports success. If a server silently ignores the header, the later writer wins.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import botocore.session
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
    SSLError,
)
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from datm_ray.store.files.causes import code_of, lacks_certificates, reason, status_of
from datm_ray.store.files.patience import answer_timeout, connect_timeout, patience, rights_expected
from datm_ray.store.files.traffic import count_retry
from datm_ray.words import duration

T = TypeVar("T")

FIRST_PATIENCE = 5.0
"""Seconds for which a failed request is repeated while no S3 server has answered yet."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""First and longest pause in seconds between two attempts at a request; each is shortened at random, by up to half."""
LINE_AFTER, LINE_EVERY = 3.0, 30.0
"""LINE_AFTER: seconds of failed attempts until a log line reports them. LINE_EVERY: seconds between two such lines."""
LARGEST_PUT = 5 * 2**30
"""Largest size in bytes, inclusive, of a file that is sent in one piece. Larger files are sent in parts."""
PARTS_AT_A_TIME = 2
"""Largest number of parts of a file above `LARGEST_PUT` in memory at the same time; a part has 50 MB or more."""

_WRITER = "datm-ray-writer"
_AWS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")
_UNREACHABLE = (NoConnectionError, ConnectionError)
_WITHOUT_RIGHTS = (NoCredentialsError, CredentialRetrievalError)
"""Errors about credentials that a machine or pod should give. botocore alone gives up after a second."""
_BROKEN = (HTTPClientError, IncompleteReadError, ResponseParserError, ResponseStreamingError, TimeoutError)
_PASSING = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
    "XAmzContentSHA256Mismatch",
}
_log = logging.getLogger(__name__)
_began: ContextVar[float | None] = ContextVar("_began", default=None)
"""Time at which this thread's outermost `patiently` began, in seconds of the monotonic clock; `None` outside of it."""


class S3(S3FileSystem):  # type: ignore[misc]
    """Filesystem of s3fs for S3, in which s3fs repeats no failed request, and botocore none by default.

    `put` repeats its own requests. Call other methods by `patiently`, which repeats them.
    """

    retries = 1  # attempts by s3fs itself

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._has_answered, self._last_line = False, -LINE_EVERY
        self._takes_conditions = True
        self._attempts: int | None = None
        self._ready: Any = None  # the client that was set up last
        self._timeouts = (0.0, 0.0)  # connect_timeout and read_timeout of this client

    @property
    def connect_timeout(self) -> float:
        """Time limit in seconds for connecting to the server. s3fs reads it when it makes a client."""
        return connect_timeout()

    @property
    def read_timeout(self) -> float:
        """Time limit in seconds for the server's answer. s3fs reads it when it makes a client."""
        return answer_timeout()

    async def set_session(self, refresh: bool = False, kwargs: Any = None) -> Any:
        """Return the S3 client. Make one if there is none, if its time limits have changed, or if `refresh` is True.

        s3fs calls this before every request. `kwargs` belongs to s3fs and is not read.
        """
        timeouts = (self.connect_timeout, self.read_timeout)
        refresh, self._timeouts = refresh or timeouts != self._timeouts, timeouts
        if self._s3 is None or refresh:
            settings = botocore.session.Session(**self.kwargs)
            self._attempts = settings.get_config_variable("max_attempts")
            self.config_kwargs.setdefault("retries", {"total_max_attempts": 1})
        client = await super().set_session(refresh=refresh)
        if client is not self._ready:
            # botocore's `Expect: 100-continue` waits for ever for a silent server.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            client.meta.events.register("before-parse.s3", _refuse_page)
            self._leave_out_checksums(client)
            self._ready = client
        return client

    connect = sync_wrapper(set_session)

    def _leave_out_checksums(self, client: Any) -> None:
        """Use checksums only where S3 requires them, unless the server is AWS's or the user has configured checksums.

        Many other servers do not support the trailers (HTTP headers after the content) that carry checksums.
        """
        if (urlsplit(client.meta.endpoint_url).hostname or "").endswith(_AWS):
            return
        profile = self.session.get_scoped_config()
        for name in _CHECKSUMS:
            if not (self.config_kwargs.get(name) or os.environ.get(f"AWS_{name.upper()}") or profile.get(name)):
                setattr(client.meta.config, name, "when_required")

    def patiently(self, path: str, call: Callable[[], T]) -> T:
        """Return the result of `call`, which is repeated after temporary failures and must be safe to repeat.

        Repeating ends at a time limit, which nested calls share with the outermost one, or after the AWS setting
        max_attempts if there is one. The last error is then raised. Long waits are logged with the bucket of `path`.
        """
        began = _began.get() or time.monotonic()
        outermost = _began.set(began)
        try:
            return self._repeated(path, call, began)
        finally:
            _began.reset(outermost)

    def _repeated(self, path: str, call: Callable[[], T], began: float) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                found = call()
            except Exception as error:
                self._has_answered = self._has_answered or _is_of_s3(error)
                pause = self._pause(path, error, attempt, time.monotonic() - began)
                if pause is None:
                    raise
                time.sleep(pause)
                if isinstance(error, _WITHOUT_RIGHTS):
                    self._ask_for_rights()
                count_retry()
                continue
            self._has_answered = True
            return found

    def _ask_for_rights(self) -> None:
        """Make a new client, because a client keeps the credentials, or their absence, with which it was made."""
        with suppress(Exception):  # the next attempt raises the error again
            self.connect(refresh=True)

    def _pause(self, path: str, error: Exception, attempt: int, waited: float) -> float | None:
        """Seconds until the next attempt; `None` to give up. Long waits are logged, at most every `LINE_EVERY` seconds.

        Args:
            path: path in the failed request, whose bucket the warning names.
            error: error of the last attempt.
            attempt: number of attempts made so far.
            waited: seconds since the first attempt began.
        """
        if not self.passes(error) or (self._attempts is not None and attempt >= self._attempts):
            return None
        is_waited_for = status_of(error) in (429, 503) or isinstance(error, _WITHOUT_RIGHTS)
        is_first = not self._has_answered and not is_waited_for
        pause: float = min(FIRST_PAUSE * 2.0 ** min(attempt - 1, 10), LONGEST_PAUSE) * random.uniform(0.5, 1)
        left = (FIRST_PATIENCE if is_first else patience()) - waited
        if self._attempts is None and pause > left:
            return None
        now = time.monotonic()
        if waited + pause > LINE_AFTER and now - self._last_line > LINE_EVERY and not is_first:
            self._last_line = now
            until = f"for up to {duration(left)}" if self._attempts is None else "as AWS_MAX_ATTEMPTS says"
            what = "has no credentials yet" if isinstance(error, _WITHOUT_RIGHTS) else "does not answer"
            _log.warning("%s %s (%s); trying again %s", _bucket(path), what, reason(error), until)
        return pause

    def passes(self, error: Exception) -> bool:
        """True if the same request may succeed later; False if it was wrong or denied, or a file is missing."""
        if isinstance(error, _WITHOUT_RIGHTS):
            return self._has_answered or rights_expected()
        status, code = status_of(error), code_of(error)
        if status or code:
            return status in (429, 500, 502, 503, 504) or code in _PASSING or "Throttl" in code
        if isinstance(error, SSLError):
            return "CERTIFICATE" not in str(error)
        if lacks_certificates(error):
            return False
        return isinstance(error, (*_UNREACHABLE, *_BROKEN)) or type(error).__module__.startswith("aiohttp")

    def put(self, path: str, content: BinaryIO, *, replace: bool, guard: Callable[[], None]) -> None:
        """Write `content` to the file `path` as a whole, and repeat this after a temporary failure.

        Args:
            content: open file to send; only a few parts of it are in memory at a time.
            replace: True to replace an existing file; False to keep it.
            guard: called before each attempt. If it raises, this attempt uploads nothing, and the error is passed on.

        Raises:
            FileExistsError: `replace` is False and the file exists.
        """
        writer = uuid.uuid4().hex

        def upload() -> None:
            guard()
            try:
                is_certain = self._upload(path, content, writer, replace=replace)
            except Exception as error:
                # If the answer to an upload is lost, the next attempt finds this upload's own file. So the writer id
                # of the stored file decides, whatever the error says.
                owner = None
                with suppress(Exception):  # the error of the upload is the one to report
                    owner = self._writer_of(path)
                if owner == writer:
                    return
                if owner is not None and not replace:
                    raise FileExistsError(path) from None
                if not replace and self._takes_conditions and _refuses_conditions(error):
                    self._takes_conditions = False
                    upload()
                    _say_once(
                        f"{_bucket(path)} cannot write a file only if it is missing (If-None-Match). Instead, the file "
                        "is looked for before and after the upload. If two commands write it at the same moment, the "
                        "later one wins"
                    )
                    return
                raise
            if not is_certain and self._writer_of(path) != writer:
                raise FileExistsError(path)

        self.patiently(path, upload)

    def _upload(self, path: str, content: BinaryIO, writer: str, *, replace: bool) -> bool:
        """Upload a whole file once. `writer` is a random id that is stored with the file.

        Returns:
            True if the file has been written as asked; False if another writer may have replaced it at the same
            moment, so that the caller must read the writer id of the stored file.
        """
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        only_if_missing = not replace and self._takes_conditions
        is_certain = replace or (only_if_missing and size <= LARGEST_PUT)
        if not is_certain and self._writer_of(path) is not None:
            raise FileExistsError(path)
        options: dict[str, Any] = {"Metadata": {_WRITER: writer}}
        if size <= LARGEST_PUT:
            condition = {"IfNoneMatch": "*"} if only_if_missing else {}
            bucket, key, _ = self.split_path(path)
            self.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **options, **condition)
        else:
            mode = "create" if only_if_missing else "overwrite"
            parts = {"max_concurrency": PARTS_AT_A_TIME, "mode": mode}
            self.put_file(f"/dev/fd/{content.fileno()}", path, **parts, **options)
        return is_certain

    def _writer_of(self, path: str) -> str | None:
        """Writer id in the metadata of a file: "" if it has none, `None` if the file is missing."""
        try:
            return str(self.metadata(path).get(_WRITER, ""))
        except FileNotFoundError:
            return None

    def clearer(self, error: Exception, path: str) -> Exception:
        """Error with S3's error code, in place of an error that has only an HTTP status, 400 or 403.

        Answers to HEAD requests have no code. So the server is asked again, by a request that is answered with a code.
        Returns `error` itself for other errors, and if the second request gives no code.
        """
        if code_of(error) not in ("400", "403"):
            return error
        bucket, key, _ = self.split_path(path)
        try:
            self.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        except Exception as listing:
            return listing if code_of(listing) not in ("", "400", "403") else error
        return error


def _refuse_page(response_dict: Any, **_: object) -> None:
    """Raise a ResponseParserError if a server's answer is a web page, which botocore would take for an empty folder."""
    body = response_dict["body"]  # a stream, not bytes, if it is a file's content
    if isinstance(body, bytes) and re.match(rb"(?i)\s*<(!doctype|html)", body):
        raise ResponseParserError("a web page")


def _is_of_s3(error: Exception) -> bool:
    """True if an S3 server reported this error, not a proxy or web server: only S3 has error codes in letters."""
    code = code_of(error)
    return isinstance(error, FileNotFoundError) or (code != "" and not code.isdigit())


def _refuses_conditions(error: Exception) -> bool:
    """True if an upload failed because the server does not support the header If-None-Match."""
    code = code_of(error)
    return code in ("NotImplemented", "501") or (
        400 <= status_of(error) < 500 and "if-none-match" in str(error).lower()
    )


def _bucket(path: str) -> str:
    return f"s3://{path.partition('/')[0]}"


@cache
def _say_once(text: str) -> None:
    """Log a warning, unless this process has logged it before."""
    _log.warning(text)
