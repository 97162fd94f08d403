"""Going back to the version before at the word of somebody at the camera, outside any job; it survives cuts as an update does.

What was asked for is a fact in the store until it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from agent.errors import AgentError, FailedError, RefusedError
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.updates import records
from agent.updates.case import Surroundings
from agent.updates.installers import Installer
from agent.updates.restarts import Kind, Restarts

MAX_ATTEMPTS = 3
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
        self._restarts = Restarts(_kind(target), target, around.restarter, around.store, tell)

    async def ask(self) -> str:
        """Keep durably that it is wanted; what will happen, in words. Raises RefusedError."""
        running, now = await self._installer.running()
        to, before = await self._installer.previous()
        if to is None or running is None:
            raise RefusedError("nothing_before", f"{self._name} has no version before to go back to", "send an update")
        if before:
            floor = await self._around.store.read(lambda t: t.fact(records.floor_key(before.name), 0))
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
        return f"{self._name} goes back from {record['from_version'] or running} to {record['to_version'] or to}"

    async def wanted(self) -> dict[str, Any] | None:
        """What was asked for and has not ended."""
        record = await self._around.store.read(lambda t: t.fact(fact_key(self._name)))
        return record if isinstance(record, dict) and "to" in record else None

    async def run(self, record: dict[str, Any]) -> None:
        """Go back, or go on with it, to its end; where the version before does not run, return to what ran. The outcome is kept."""
        async with self._around.mutation_lock:
            why = await self._tried(record)
            if why and "failed" not in record:
                record = _returning(record, why)
                why = await self._tried(record)
            if "failed" not in record:
                await self._end(record, "ROLLED_BACK", "by_hand", f"taken back by hand to {_version(record)}")
            else:
                then = f"returning to {_version(record)} failed too: {why}" if why else f"{_version(record)} runs again"
                words = f"going back by hand failed: {record['failed']}; {then}"
                await self._end(record, "FAILED", "rollback_failed", words)

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
        if not (self._restarts.ends_process and self._restarts.happened(record.get("undone"))):
            record["attempts"] += 1
            if record["attempts"] > MAX_ATTEMPTS:
                raise FailedError("interrupted", "it was interrupted too often")
            record.setdefault("undone", self._restarts.now())
            await self._around.store.write(lambda t: t.set_fact(fact_key(self._name), record))
            self._tell(f"going back to {_version(record)}, asked for at the camera")
            await self._installer.roll_back(record["to"])
            await self._restarts.restart()
        running, _ = await self._installer.running()
        if running != record["to"]:
            raise FailedError("fell_back", f"{running or 'nothing'} runs instead of {record['to']}")
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


def _kind(target: UpdateTarget) -> Kind:
    if target.installer == "agent":
        return "agent"
    if target.installer == "rauc":
        return "reboot"
    return "unit" if target.unit or target.restart else "none"
