"""Claims: small files that name their only owner, so that a worker or command left over from earlier writes nothing.

A `Claim` is taken by replacing its file. Whoever was named before finds out before its next write. A `lease` is a claim
with a heartbeat: one command at a time holds a folder. A command that died loses its lease to the next one. On the same
machine that is at once. Elsewhere it is once the file has not changed for `DEAD_AFTER` seconds of the reader's own
clock; clocks of two machines are never compared. Tests: tests/store/test_claims.py.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from datm_ray.errors import DatmError, OvertakenError, RunDirectoryError
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, MissingFileError, unguarded
from datm_ray.store.sealed import rejecting_nonsense

HEARTBEAT, DEAD_AFTER = 10.0, 60.0
"""Seconds between two heartbeats, and without one until a command on another machine counts as dead."""
POLL, SETTLE = 1.0, 0.5
"""Seconds between two looks at another's lease, and from taking over a dead one until nobody else can have done so."""


class Claim:
    """A file that names one owner, by a random token."""

    def __init__(self, place: Location) -> None:
        self.place, self.token = place, secrets.randbits(48)
        host, since = socket.gethostname(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.owner: dict[str, Any] = {"token": self.token, "host": host, "process": os.getpid(), "since": since}

    def take(self, guard: Callable[[], None] = unguarded) -> None:
        """Become the owner, whoever was before, unless the guard raises an error at the last moment."""
        replace(self.place, guard=guard).write_json(self.owner)

    def read(self) -> dict[str, Any]:
        """The present owner; empty where there is none."""
        try:
            found = self.place.read_json()
        except MissingFileError:
            return {}
        with rejecting_nonsense(self.place):
            return {**found, "token": int(found["token"]), "process": int(found["process"])}

    def is_mine(self) -> bool:
        """True if this is the present owner."""
        return bool(self.read().get("token") == self.token)

    def require(self) -> None:
        """Raise an `OvertakenError` unless this is the present owner."""
        if not self.is_mine():
            raise self.overtaken()

    def overtaken(self) -> OvertakenError:
        """The error of one who is no longer the owner."""
        owner = self.read()
        return OvertakenError(
            f"{self.place.parent.uri} was taken over by {in_words(owner)}" if owner else f"{self.place.uri} is missing",
            "this process was unreachable for a while and counted as lost" if owner else "the folder was moved",
            "let the other one finish; this one writes nothing more" if owner else "run the same command again",
        )


def in_words(owner: dict[str, Any]) -> str:
    """Process, host and start of an owner."""
    return f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"


@contextmanager
def lease(place: Location, wait: float, say: Callable[[str], object], on_loss: Callable[[], object]) -> Iterator[None]:
    """Hold the folder of a file in the block, against other commands.

    Args:
        place: file of the lease.
        wait: seconds to wait for another command that holds it.
        say: shows a message to the user.
        on_loss: called every `HEARTBEAT` seconds from another thread, from when another command has taken over until
            the block ends.

    Raises:
        RunDirectoryError: another command holds it.
        OvertakenError: another command took over, and the block ended by `KeyboardInterrupt`.
    """
    claim, ended, is_lost = Claim(place), threading.Event(), False
    claim.owner |= {"machine": _machine(), "started": _start_of(os.getpid()), "heartbeats": 0}
    created = _missing_folders(place.parent.local_path)
    _acquire(claim, wait, say)

    def beat() -> None:
        nonlocal is_lost
        while not ended.wait(HEARTBEAT):
            claim.owner["heartbeats"] += 1
            try:
                claim.take(claim.require)
            except OvertakenError:
                is_lost = True
                on_loss()
            except DatmError:  # nobody else can take over while the place does not answer
                continue

    beating = threading.Thread(target=beat, name="lease", daemon=True)
    beating.start()
    try:
        yield
    except KeyboardInterrupt:
        if is_lost:
            raise claim.overtaken() from None
        raise
    finally:
        ended.set()
        beating.join()
        with suppress(DatmError):  # the lease counts as dead after a while
            if claim.is_mine():
                place.remove()
        with suppress(OSError):  # a folder holds files
            for folder in created:
                os.rmdir(folder)


def _acquire(claim: Claim, wait: float, say: Callable[[str], object]) -> None:
    until, say_once = time.monotonic() + wait, cache(say)
    while True:
        holder = claim.read()
        if not holder:
            with suppress(AlreadyExistsError), claim.place.create(replace=False) as file:
                file.write(json.dumps(claim.owner).encode())
        elif _is_dead(claim, holder, say_once):

            def require_unchanged(holder: dict[str, Any] = holder) -> None:
                if claim.read() != holder:
                    raise AlreadyExistsError(claim.place.uri)

            with suppress(AlreadyExistsError):
                claim.take(require_unchanged)
            time.sleep(SETTLE)  # of several commands that take it at one moment, the last one is the owner
        elif time.monotonic() < until:
            say_once(f"waiting up to {wait:.0f} s for {in_words(holder)}, which works on {claim.place.parent.uri}")
            time.sleep(POLL)
        elif claim.read().get("token") == holder["token"]:
            raise RunDirectoryError(
                f"{claim.place.parent.uri} is in use by {in_words(holder)}",
                "another command works on the same run",
                "let it finish, or stop it (`datm-ray job list` shows jobs); or wait with "
                "--set cluster.wait_for_run=3600, or give another --out",
            )
        if claim.is_mine():
            return


def _is_dead(claim: Claim, holder: dict[str, Any], say: Callable[[str], object]) -> bool:
    """True if the process of a lease has ended; see the module for how that is known of other machines."""
    if holder.get("machine") == _machine():
        return _start_of(holder["process"]) != holder.get("started")
    say(f"{claim.place.parent.uri} is in use by {in_words(holder)}; checking up to {DEAD_AFTER:.0f} s for a heartbeat")
    until = time.monotonic() + DEAD_AFTER
    while time.monotonic() < until:
        time.sleep(POLL)
        if claim.read() != holder:
            return False
    return True


def _machine() -> str:
    """Name of what shares process ids with this process: a container, or a machine since it was started.

    Another name each time where that is unknown.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex()


def _start_of(process: int) -> str:
    """Start of a process in the kernel's ticks, which tells it from a later one of that id; "" if it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _missing_folders(path: str | None) -> list[str]:
    """A local folder and its parents, from the inside out, until one that exists."""
    missing = []
    while path is not None and not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing
