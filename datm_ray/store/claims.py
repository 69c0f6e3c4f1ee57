"""Claims: small files that name the only owner of a folder, so that former owners write nothing more.

An owner is a worker or a command. A new owner replaces the file of a `Claim`; the former owner notices this before its
next write. A `lease` is a claim with a heartbeat: one command at a time holds a folder. If the command dies, the next
one takes the lease over: at once on the same machine; on another machine after the file has not changed for
`DEAD_AFTER` seconds. The waiting machine measures this time alone, so clocks of two machines are never compared.

Tests: tests/store/test_claims.py.
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
"""HEARTBEAT: seconds between two heartbeats of a lease. DEAD_AFTER: seconds without a heartbeat until a command on
another machine counts as dead."""
POLL, SETTLE = 1.0, 0.5
"""POLL: seconds between two reads of another command's lease. SETTLE: seconds to wait after taking a lease over. If
several commands do so at the same moment, all then see that the last one owns it."""


class Claim:
    """Candidate for owning a folder, known by a random token. The file `place` holds the token of the owner."""

    def __init__(self, place: Location) -> None:
        self.place, self.token = place, secrets.randbits(48)
        host, since = socket.gethostname(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.owner: dict[str, Any] = {"token": self.token, "host": host, "process": os.getpid(), "since": since}

    def take(self, guard: Callable[[], None] = unguarded) -> None:
        """Become the owner, in place of any other. `guard` is called just before; if it raises, the old owner stays."""
        replace(self.place, guard=guard).write_json(self.owner)

    def read(self) -> dict[str, Any]:
        """Owner as stored in the file; `{}` if the file does not exist. Raises CorruptFileError for other content.

        Keys: token, host, process (id) and since (time, in UTC); for a lease also machine, started and heartbeats.
        """
        try:
            found = self.place.read_json()
        except MissingFileError:
            return {}
        with rejecting_nonsense(self.place):
            return {**found, "token": int(found["token"]), "process": int(found["process"])}

    def is_mine(self) -> bool:
        """True if the file names this claim as the owner."""
        return bool(self.read().get("token") == self.token)

    def require(self) -> None:
        """Raise an `OvertakenError` unless the file names this claim as the owner."""
        if not self.is_mine():
            raise self.overtaken()

    def overtaken(self) -> OvertakenError:
        """Error for the former owner: another owner has taken over, or the file is missing."""
        owner = self.read()
        return OvertakenError(
            f"{self.place.parent.uri} was taken over by {in_words(owner)}" if owner else f"{self.place.uri} is missing",
            "this process was unreachable for a while and counted as lost" if owner else "the folder was moved",
            "let the other process finish; this one writes nothing more" if owner else "run the same command again",
        )


def in_words(owner: dict[str, Any]) -> str:
    """Text that describes an owner: process id, host and time of the claim."""
    return f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"


@contextmanager
def lease(place: Location, wait: float, say: Callable[[str], object], on_loss: Callable[[], object]) -> Iterator[None]:
    """Own a folder while the block runs, by a lease (a claim with a heartbeat), so that no other command uses it.

    Args:
        place: file of the lease, in that folder. Missing folders are made, and removed at the end if they are empty.
        wait: longest time in seconds to wait while another command holds the lease. If that command runs on another
            machine, up to `DEAD_AFTER` seconds are spent in any case to find out whether it is alive.
        say: shows a message to the user.
        on_loss: called once the file names another owner or is missing, from another thread, and again every
            `HEARTBEAT` seconds until the block ends. It should make the block end, with a `KeyboardInterrupt`.

    Raises:
        RunDirectoryError: another command still holds the lease after the wait.
        OvertakenError: the lease was lost. This error replaces the `KeyboardInterrupt` that ended the block.
        StoreError: the file cannot be read or written at the start.
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
            except DatmError:  # the store does not answer, so no other command can take over either
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
        with suppress(DatmError):  # a lease that cannot be removed is taken over later
            if claim.is_mine():
                place.remove()
        with suppress(OSError):  # folders that hold files stay
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
            time.sleep(SETTLE)  # if several commands take over at the same moment, the last one is the owner
        elif time.monotonic() < until:
            say_once(f"waiting up to {wait:.0f} s for {in_words(holder)}, which uses {claim.place.parent.uri}")
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
    """True if the process that holds a lease has ended. `holder` is the content of the lease's file.

    A process on another machine counts as ended if the file does not change for `DEAD_AFTER` seconds, which this
    function waits for; `say` shows a message about it.
    """
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
    """Name of the container or machine on which this process runs; another name after each boot.

    Two processes with the same name see the same process ids. If the system does not tell, each call returns a new
    random name, which equals no other.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex()


def _start_of(process: int) -> str:
    """Start time of a process in kernel ticks, which differs from that of a later process with the same id.

    Returns "" if the process has ended.
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _missing_folders(path: str | None) -> list[str]:
    """Folders that a local path lacks, innermost first: the path itself and its parents that do not exist.

    Empty if the path exists. `None` stands for a path that is not local, and gives an empty list.
    """
    missing = []
    while path is not None and not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing
