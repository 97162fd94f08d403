"""The apply locks: a capture pipeline takes one, for a time it names, while no update and no configuration may disturb it.

Each ends by itself. They are kept in a file with the boot they belong to, so that a restart of the agent keeps them and a
reboot does not.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent.errors import FailedError, RefusedError
from agent.host import files
from agent.host.clock import boot_id
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.maintenance import SHORTEST_LOOK_S, Hold, Maintenance, Noun, together

Json = dict[str, Any]

MAX_LOCKS = 32
MAX_HOLDER = 64
MAX_REASON = 200
FILE_LIMIT = 256 * 1024
log = get_logger("updates")


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Lock:
    """One lock: `expires` in seconds since boot, sleep included; `by` is who took it, such as `local:pipeline`."""

    holder: str
    reason: str
    by: str
    expires: float

    def words(self, left_s: float) -> str:
        """Who holds it, for how long, and why."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.holder} holds the apply lock for {math.ceil(left_s)} s more{why}"


class ApplyLocks:
    """All locks; `load` first.

    `switching` says what is just being switched to or on trial, empty when nothing is: then a lock would come too late. `max_s` is the
    longest time for which one can be taken at once.
    """

    def __init__(
        self,
        file: Path,
        max_s: float,
        *,
        switching: Callable[[], str] = str,
        now: Callable[[], float] = _boottime,
        boot: Callable[[], str] = boot_id,
    ) -> None:
        self.max_s = max_s
        self._file = file
        self._switching = switching
        self._now = now
        self._boot = boot
        self._locks: dict[str, Lock] = {}
        self._writing = asyncio.Lock()
        self._wake: list[Callable[[], None]] = []

    def on_change(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on the loop, whenever a lock ends before its time."""
        self._wake.append(wake)

    async def load(self) -> None:
        """Take over what an agent of this boot has kept; a file that can't be read is no lock, and is logged."""
        try:
            entries = await to_end(_read, self._file, self._boot)
            locks = [_as_lock(entry, self._now() + self.max_s) for entry in entries]
            self._locks = {lock.holder: lock for lock in locks[:MAX_LOCKS]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            log.warning(
                "the apply locks kept can't be read, there are none now", file=str(self._file), error=str(error)
            )

    def held(self) -> list[tuple[Lock, float]]:
        """Every lock that holds now with the seconds it has left, the first to end first."""
        now = self._now()
        self._locks = {holder: lock for holder, lock in self._locks.items() if lock.expires > now}
        return [(lock, lock.expires - now) for lock in sorted(self._locks.values(), key=lambda lock: lock.expires)]

    def listing(self) -> list[Json]:
        """`held` as JSON."""
        return [
            {"holder": lock.holder, "reason": lock.reason, "by": lock.by, "expires_in_s": left}
            for lock, left in self.held()
        ]

    async def take(self, holder: str, seconds: float, reason: str, *, by: str, admin: bool = False) -> Json:
        """Hold off updates and configurations for `seconds` from now; the lock as JSON. A lock of the same holder is renewed.

        Raises RefusedError: bad_request; switching, and then nothing is held off; lock_of_another, unless `admin`;
        too_many_locks. Raises FailedError apply_lock_failed when a restart of the agent would forget it.
        """
        self._check(holder, seconds, reason)
        self._refuse_while_switching()
        before = next((lock for lock, _ in self.held() if lock.holder == holder), None)
        if before:
            _check_owner(before, by, admin=admin)
        elif len(self._locks) >= MAX_LOCKS:
            raise RefusedError("too_many_locks", f"{MAX_LOCKS} apply locks are held already", "release some")
        lock = Lock(holder, reason, before.by if before else by, self._now() + seconds)
        self._locks[holder] = lock
        try:
            await self._save()
            self._refuse_while_switching()
        except OSError as error:
            self._put_back(lock, before)
            raise FailedError(
                "apply_lock_failed", f"{self._file}: {error.strerror}", "see that runtime_dir has room"
            ) from error
        except RefusedError:
            self._put_back(lock, before)
            await self._save_if_possible()
            raise
        log.info("apply lock taken", holder=holder, seconds=seconds, reason=reason, by=by)
        return {"holder": holder, "reason": reason, "by": lock.by, "expires_in_s": max(0.0, lock.expires - self._now())}

    async def release(self, holder: str, *, by: str, admin: bool = False) -> None:
        """End a lock before its time. Raises RefusedError: no_such_lock; lock_of_another, unless `admin`."""
        lock = next((lock for lock, _ in self.held() if lock.holder == holder), None)
        if lock is None:
            raise RefusedError("no_such_lock", f"{holder} holds no apply lock", "it was released, or its time is over")
        _check_owner(lock, by, admin=admin)
        del self._locks[holder]
        self._tell()
        log.info("apply lock released", holder=holder, by=by)
        await self._save_if_possible()

    def _check(self, holder: str, seconds: float, reason: str) -> None:
        if not holder.strip() or len(holder) > MAX_HOLDER or not holder.isprintable():
            raise RefusedError("bad_request", f"holder must be a name of 1 to {MAX_HOLDER} printable characters")
        if len(reason) > MAX_REASON or not reason.isprintable():
            raise RefusedError("bad_request", f"reason must be at most {MAX_REASON} printable characters on one line")
        if not 1 <= seconds <= self.max_s:
            raise RefusedError(
                "bad_request",
                f"seconds must be a number from 1 to {self.max_s:g}",
                "renew the lock for a longer time; updates.apply_lock_max_s of agent.toml is the most at once",
            )

    def _refuse_while_switching(self) -> None:
        if words := self._switching():
            raise RefusedError(
                "switching",
                f"the lock comes too late, a change is under way: {words}",
                "expect a restart, and try again after it; agentctl update status",
            )

    def _put_back(self, lock: Lock, before: Lock | None) -> None:
        """Undo taking `lock`, unless its holder has since taken another."""
        if self._locks.get(lock.holder) is lock:
            del self._locks[lock.holder]
            if before:
                self._locks[lock.holder] = before
            self._tell()

    def _tell(self) -> None:
        for wake in self._wake:
            wake()

    async def _save_if_possible(self) -> None:
        """A lock that is released only here would at worst come back until its end, after a restart of the agent."""
        try:
            await self._save()
        except OSError as error:
            log.warning("can't keep the apply locks", file=str(self._file), error=str(error))

    async def _save(self) -> None:
        async with self._writing:
            await to_end(_write, self._file, self._boot, [asdict(lock) for lock, _ in self.held()])


def lock_hold(held: Sequence[tuple[Lock, float]]) -> Hold | None:
    """What the locks that are `held`, each with its seconds left, say."""
    if not held:
        return None
    words = "; ".join(lock.words(left) for lock, left in held)
    return Hold("apply_lock", words, max(SHORTEST_LOOK_S, min(left for _, left in held)))


async def changes_hold(maintenance: Maintenance, locks: ApplyLocks, subject: str, noun: Noun) -> Hold | None:
    """What any change has to wait for, whatever it is: the window, its turn in it, and apply locks; None: nothing."""
    window = await maintenance.hold(subject, noun)
    return together([window, lock_hold(locks.held())])


def _check_owner(lock: Lock, by: str, *, admin: bool) -> None:
    if lock.by != by and not admin:
        raise RefusedError("lock_of_another", f"{lock.holder}'s lock was taken by {lock.by}", "use another holder name")


def _write(file: Path, boot: Callable[[], str], locks: list[Json]) -> None:
    kept = {"schema": 1, "boot_id": boot(), "locks": locks}
    files.write_atomic(file, json.dumps(kept).encode(), 0o640)


def _read(file: Path, boot: Callable[[], str]) -> list[Json]:
    """The locks kept in this boot. Raises what comes of a file that isn't built as it should be."""
    try:
        with file.open("rb") as opened:
            kept = json.loads(opened.read(FILE_LIMIT))
    except FileNotFoundError:
        return []
    return list(kept["locks"]) if kept["boot_id"] == boot() else []


def _as_lock(entry: Json, latest: float) -> Lock:
    """A kept lock; none may last beyond `latest`."""
    lock = Lock(str(entry["holder"]), str(entry["reason"]), str(entry["by"]), float(entry["expires"]))
    if not math.isfinite(lock.expires):
        raise ValueError("expires is not a time")
    return replace(lock, expires=min(lock.expires, latest))
