"""Going back to the version before at the word of somebody at the camera, outside any job; it survives cuts as an update does.

What was asked for is a fact in the store until it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from agent.errors import AgentError, FailedError, RefusedError
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.store import Tables
from agent.updates import records
from agent.updates.case import Surroundings
from agent.updates.installers import Installer
from agent.updates.restarts import Kind, Restarts
from agent.updates.trust import Installed

MAX_ATTEMPTS = 3
KEYS = {"from", "from_version", "to", "to_version", "attempts"}
log = get_logger("updates")


def fact_key(target: str) -> str:
    return f"updates.by_hand.{target}"


class ByHand:
    """Going back on one target; `tell` takes words on how far it is."""

    def __init__(
        self,
        name: str,
        target: UpdateTarget,
        installer: Installer,
        around: Surroundings,
        tell: Callable[[str], None],
    ) -> None:
        self._name = name
        self._target = target
        self._installer = installer
        self._around = around
        self._tell = tell

    def words(self, record: dict[str, Any]) -> str:
        """What happens, in a sentence."""
        return f"{self._name} goes back from {record['from_version'] or record['from']} to {_version(record)}"

    async def ask(self) -> str:
        """Keep durably that it is wanted; what will happen, in words. Raises RefusedError."""
        running, now = await self._installer.running()
        to, before = await self._installer.previous()
        if to is None or running is None:
            raise RefusedError("nothing_before", f"{self._name} has no version before to go back to", "send an update")
        if before:
            floor = await self._floor(before)
            if before.security_counter < floor:
                raise RefusedError(
                    "counter_too_low",
                    f"{before.name} {before.version} has security counter {before.security_counter}, below {floor}",
                    "it has known faults and is not started again; send an update",
                )
        record = {
            "from": running,
            "from_version": now.version if now else "",
            "to": to,
            "to_version": before.version if before else "",
            "attempts": 0,
        }
        await self._around.store.write(lambda t: t.set_fact(fact_key(self._name), record))
        return self.words(record)

    async def wanted(self) -> dict[str, Any] | None:
        """What was asked for and has not ended."""
        record = await self._around.store.read(lambda t: t.fact(fact_key(self._name)))
        return record if isinstance(record, dict) and record.keys() >= KEYS else None

    async def run(self, record: dict[str, Any]) -> None:
        """Go back, or go on with it, to its end; where the version before does not run, return to what ran. The outcome is kept."""
        self._tell(f"going back to {_version(record)} was asked for, waits until no other change is under way")
        async with self._around.mutation_lock:
            if outdated := await self._outdated(record):
                await self._end(record, "FAILED", "superseded", f"going back by hand was not done: {outdated}")
                return
            why = await self._tried(record)
            if why and "failed" not in record:
                record = _returning(record, why)
                await self._keep(record)
                why = await self._tried(record)
            if "failed" not in record:
                await self._end(record, "ROLLED_BACK", "by_hand", f"taken back by hand to {_version(record)}")
            else:
                then = f"returning to {_version(record)} failed too: {why}" if why else f"{_version(record)} runs again"
                words = f"going back by hand failed: {record['failed']}; {then}"
                await self._end(record, "FAILED", "rollback_failed", words)

    async def _outdated(self, record: dict[str, Any]) -> str:
        """Why it must not be begun any more: the camera may have got another version since it was asked for."""
        if record["attempts"] or "failed" in record:
            return ""
        running, _ = await self._installer.running()
        to, before = await self._installer.previous()
        if (running, to) != (record["from"], record["to"]):
            return f"{running} runs by now"
        floor = await self._floor(before) if before else 0
        return f"{before.version} is below the floor by now" if before and before.security_counter < floor else ""

    async def _floor(self, software: Installed) -> int:
        return await self._around.store.read(lambda t: records.whole(t.fact(records.floor_key(software.name))))

    async def _restarts(self) -> Restarts:
        """By the restart that the version which runs was installed with."""
        kept = await self._around.store.read(lambda t: t.fact(records.restart_key(self._name)))
        around = self._around
        return Restarts(_kind(self._target, kept), self._target, around.restarter, around.store, self._tell)

    async def _tried(self, record: dict[str, Any]) -> str:
        """Why it failed; empty when it did not."""
        try:
            await self._go_back(record)
        except (AgentError, OSError) as error:
            words = error.message if isinstance(error, AgentError) else str(error)
            log.error("going back by hand failed", target=self._name, to=record["to"], reason=words)
            return words
        return ""

    async def _go_back(self, record: dict[str, Any]) -> None:
        restarts = await self._restarts()
        running, _ = await self._installer.running()
        known = self._target.installer in ("agent", "rauc") or not record["attempts"]  # else it is only switched to
        by_itself = restarts.ends_process and "failed" in record and "undone" not in record and running == record["to"]
        by_itself = by_itself and known
        if not by_itself and not (restarts.ends_process and restarts.happened(record.get("undone"))):
            record["attempts"] += 1
            if record["attempts"] > MAX_ATTEMPTS:
                raise FailedError("interrupted", "it was interrupted too often")
            await self._keep(record)
            self._tell(f"going back to {_version(record)}, asked for at the camera")
            await self._installer.step_back(record["to"])
            record["undone"] = restarts.now()  # only now: a restart before led to the same version again
            await self._keep(record)
            await restarts.restart()
        running, _ = await self._installer.running()
        if running != record["to"]:
            why = await self._installer.why_not_running()
            raise FailedError("fell_back", f"{_version(record)} did not stay" + (f": {why}" if why else ""))
        verdict = await self._around.gate.watch(
            {},
            since=time.monotonic(),
            stable_for_s=self._around.settle_s,
            deadline_s=self._around.settle_deadline_s,
            unit=self._target.unit,
            probe=self._target.probe,
            cloud=False,
            images=False,
        )
        if not verdict.passed:
            raise FailedError(verdict.code, "; ".join(verdict.reasons))
        await self._installer.stay()

    async def _keep(self, record: dict[str, Any]) -> None:
        await self._around.store.write(lambda t: t.set_fact(fact_key(self._name), record))

    async def _end(self, record: dict[str, Any], state: str, code: str, words: str) -> None:
        """Keep the outcome, and in the same transaction that nothing is wanted any more."""
        _, installed = await self._installer.running()
        outcome = {"state": state, "version": record["to_version"], "code": code, "message": words, "at": time.time()}

        def end(tables: Any) -> None:
            tables.delete_fact(fact_key(self._name))
            tables.set_fact(records.outcome_key(self._name), outcome)
            if installed:
                tables.set_fact(records.installed_key(self._name), asdict(installed))
            tables.add_audit("local", "update.rollback", {"target": self._name, **outcome})

        await self._around.store.write(end)


def _version(record: dict[str, Any]) -> str:
    return str(record["to_version"] or record["to"])


def _returning(record: dict[str, Any], why: str) -> dict[str, Any]:
    """The way back to what ran before it was gone back."""
    return {
        "from": record["to"],
        "from_version": record["to_version"],
        "to": record["from"],
        "to_version": record["from_version"],
        "attempts": 0,
        "failed": why,
    }


def drop_others(tables: Tables, targets: Collection[str]) -> None:
    """Forget what was asked for of targets that are gone from agent.toml."""
    for key in tables.facts(fact_key("")):
        if key.removeprefix(fact_key("")) not in targets:
            tables.delete_fact(key)


def _kind(target: UpdateTarget, kept: Any) -> Kind:
    if target.installer == "agent":
        return "agent"
    if target.installer == "rauc" or kept == "reboot":
        return "reboot"
    return "unit" if target.unit or target.restart else "none"
