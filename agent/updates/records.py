"""What updates keep in the store: the trusted root, floors, what is installed, failures of a digest, the last believable time.

All are facts, so that they are written in the transaction of the decision they belong to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from agent.errors import RefusedError
from agent.host.clock import clock_synchronised
from agent.store import Store
from agent.updates.manifest import Manifest
from agent.updates.trust import Installed, Root

ROOT = "updates.root"
LAST_TIME = "updates.last_time"
MAX_FAILURES = 2


def floor_key(name: str) -> str:
    return f"updates.floor.{name}"


def installed_key(target: str) -> str:
    return f"updates.installed.{target}"


def failures_key(sha256: str) -> str:
    return f"updates.failures.{sha256}"


def restart_key(target: str) -> str:
    return f"updates.restart.{target}"


def whole(fact: Any) -> int:
    """A kept number; 0 for what is none."""
    return fact if isinstance(fact, int) and fact >= 0 else 0


def outcome_key(target: str) -> str:
    return f"updates.outcome.{target}"


@dataclass(frozen=True)
class Kept:
    """What the store knew when an update began; `now` is epoch seconds, None while the clock can't be believed."""

    root: Any
    floor: int
    installed: Installed | None
    failures: dict[str, Any]
    now: float | None


async def read(store: Store, target: str, manifest: Manifest) -> Kept:
    """Everything kept that bears on one update."""
    found = await store.read(
        lambda t: (
            t.fact(ROOT),
            t.fact(floor_key(manifest.name), 0),
            t.fact(installed_key(target)),
            t.fact(failures_key(manifest.sha256), {}),
            t.fact(LAST_TIME, 0.0),
        )
    )
    root, floor, installed, failures, last = found
    last = last if isinstance(last, int | float) else 0.0
    failures = failures if isinstance(failures, dict) else {}
    now = believable_time(time.time(), last, clock_synchronised)
    return Kept(root, whole(floor), as_installed(installed), failures, now)


def believable_time(now: float, last: float, synchronised: Callable[[], bool | None]) -> float | None:
    """`now` when the clock is disciplined by NTP and not before the last time that was believed, else None."""
    return now if now >= last and synchronised() else None


def as_installed(fact: Any) -> Installed | None:
    """A kept fact as Installed; None for nothing or another form."""
    try:
        return Installed(str(fact["name"]), str(fact["version"]), str(fact["sha256"]), whole(fact["security_counter"]))
    except (TypeError, KeyError):
        return None


def is_newer(root: Root, kept: Any) -> bool:
    """Whether `root` is another than the kept one, which `load_root` has made sure is older."""
    return bool(kept != dict(root.source))


def seen_time(now: float | None) -> dict[str, Any]:
    """The fact of the time, once a manifest was verified, if it can be believed."""
    return {LAST_TIME: now} if now is not None else {}


def committed(target: str, manifest: Manifest, floor: int) -> dict[str, Any]:
    """Facts of a kept update. The floor never falls, also not by a permitted downgrade."""
    installed = Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter)
    return {
        installed_key(target): asdict(installed),
        floor_key(manifest.name): max(floor, manifest.security_counter),
        failures_key(manifest.sha256): {},
        restart_key(target): manifest.restart,
        outcome_key(target): {"state": "COMMITTED", "version": manifest.version, "at": time.time()},
    }


def failed(
    target: str, manifest: Manifest, job_id: str, failures: dict[str, Any], reason: dict[str, str]
) -> dict[str, Any]:
    """Facts of an update that was tried and did not stay."""
    count = whole(failures.get("count")) if failures.get("job") == job_id else 0
    code, why = reason["code"], reason["message"]
    return {
        failures_key(manifest.sha256): {
            "job": job_id,
            "count": count + 1,
            "code": code,
            "target": target,
            "version": manifest.version,
        },
        outcome_key(target): {
            "state": "FAILED",
            "version": manifest.version,
            "code": code,
            "message": why,
            "at": time.time(),
        },
    }


def check_quarantine(failures: dict[str, Any], job_id: str, sha256: str) -> None:
    """Raises RefusedError quarantined when executions of this job failed with this digest twice."""
    if failures.get("job") == job_id and whole(failures.get("count")) >= MAX_FAILURES:
        raise RefusedError(
            "quarantined",
            f"the artifact {sha256[:12]}… was tried {failures['count']} times by this job and taken back each time",
            "create a new job if it is to be tried again",
        )


def quarantined(failures: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """The digests that `target` will not try again for the same job, with version and code; `failures` are facts by their keys."""
    prefix = failures_key("")
    return [
        {"sha256": key.removeprefix(prefix), "version": kept.get("version"), "code": kept.get("code")}
        for key, kept in sorted(failures.items())
        if isinstance(kept, dict) and kept.get("target") == target and whole(kept.get("count")) >= MAX_FAILURES
    ]
