"""Log file of a run whose output folder is in an object store, where no file can grow.

The lines are kept in memory, and the whole file is written again every minute and at the end. Tests:
tests/monitor/test_uploaded_log.py.
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import nullcontext

from datm_ray.monitor.logs import LARGEST, LOG, LineFormatter
from datm_ray.store.files.filesystem import Location
from datm_ray.words import one_line

INTERVAL = 60.0
"""Seconds between two uploads of a log with new lines. A killed process loses the lines since its last upload."""
CLOSE_TIMEOUT = 10.0
"""Seconds for which the end of a command waits for the last upload. A job that is stopped has little more time."""


class UploadedLog(logging.Handler):
    """Log handler that uploads a run's log from a thread of its own, so that no upload delays the run.

    Lines are added to the log of earlier commands. A log above `LARGEST` bytes becomes `log.txt.1`. After a failed
    upload, the next one has all lines. Only the first failure is printed, and the run continues.
    """

    def __init__(self, folder: Location) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self._place, self._older_place = folder / LOG, folder / f"{LOG}.1"
        self._text, self._older = bytearray(), b""
        """_text: content of `log.txt`. _older: content of `log.txt.1` that is not uploaded yet."""
        self._logged, self._uploaded = 0, 0
        """Numbers of lines that this process has logged, and of these, uploaded."""
        self._has_read_earlier, self._has_failed, self._ended = False, False, threading.Event()
        self._thread = threading.Thread(target=self._upload_regularly, name="log upload", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line for the next upload."""
        line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        if self._text and len(self._text) + len(line) > LARGEST:
            self._older, self._text = bytes(self._text), bytearray()
        self._text += line
        self._logged += 1

    def close(self) -> None:
        """Upload the remaining lines, but wait for at most `CLOSE_TIMEOUT` seconds."""
        self._ended.set()
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._report(f"no answer within {CLOSE_TIMEOUT:g} s")
        super().close()

    def _upload_regularly(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._upload()
        self._upload()

    def _upload(self) -> None:
        """Upload the log if it has new lines. No lock is held during the upload, because uploads log lines too."""
        try:
            self._read_earlier()
            with self.lock or nullcontext():
                text, older, logged = bytes(self._text), self._older, self._logged
            if older:
                self._older_place.write_atomic(older)
            if logged > self._uploaded:
                self._place.write_atomic(text)
            with self.lock or nullcontext():
                self._uploaded, self._older = logged, b"" if self._older is older else self._older
        except Exception as error:  # whatever it is, a log ends no run
            self._report(str(error))

    def _read_earlier(self) -> None:
        """Insert the lines that earlier commands have uploaded before those of this command, at the first call only."""
        if self._has_read_earlier:
            return
        earlier = self._place.read_bytes() if self._place.exists() else b""
        with self.lock or nullcontext():
            if not self._older:  # else this command alone has logged more than is kept
                if len(earlier) + len(self._text) > LARGEST:
                    self._older = earlier
                else:
                    self._text[:0] = earlier
        self._has_read_earlier = True

    def _report(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            text = f"cannot write {self._place.uri} ({one_line(reason)}); the run continues"
            print(text, file=sys.stderr, flush=True)
