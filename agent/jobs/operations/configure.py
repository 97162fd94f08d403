"""Operation `configure`: what the fleet sets for a group of cameras, tried like everything that comes by the shadow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from agent.errors import FailedError, RefusedError
from agent.jobs.operations.execution import Job

FIRST_TELL_S, TELL_EVERY_S = 2.0, 30.0
MOST_WORDS = 600


class Problem(Protocol):
    """Why a configuration is not in force."""

    @property
    def pointer(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def code(self) -> str: ...


class Outcome(Protocol):
    """What became of a change: `state` applied, rejected or reverted."""

    @property
    def state(self) -> str: ...
    @property
    def problems(self) -> Sequence[Problem]: ...


class SetFleet(Protocol):
    """Changes the fleet layer for the execution `job`, and tells what became of it; may be called again after a restart."""

    async def __call__(
        self,
        job: str,
        patch: Mapping[str, Any],
        *,
        whole: bool,
        cancelled: asyncio.Event,
        tell: Callable[[str], None],
    ) -> Outcome: ...


class Judge(Protocol):
    """What is wrong with such a change, and what it would do, in words; nothing is touched."""

    async def __call__(self, patch: Mapping[str, Any], *, whole: bool) -> tuple[Sequence[Problem], list[str]]: ...


class Configure:
    """REJECTED with nothing touched, FAILED when it was taken back, SUCCEEDED when it is in force and proven."""

    name = "configure"
    lasting = True
    """It may wait for days for a window, and each trial limits its own attempts."""

    def __init__(self, set_fleet: SetFleet, judge: Judge) -> None:
        self._set_fleet = set_fleet
        self._judge = judge

    def check(self, document: Mapping[str, Any]) -> None:
        if not (document["agent"] or document["targets"] or document["replace"]):
            raise RefusedError(
                "bad_document", "it sets nothing: neither agent nor targets", "name what to set, or use replace"
            )

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What `run` would do, in words. Raises RefusedError for what would be rejected."""
        problems, words = await self._judge(_patch(document), whole=document["replace"])
        if problems:
            raise _refused(problems)
        return words

    async def run(self, job: Job) -> dict[str, str]:
        """Raises RefusedError, FailedError; when cancelled on trial, what was on trial is taken back first."""
        words: list[str] = []
        told = asyncio.create_task(_tell(job, words))
        try:
            outcome = await self._set_fleet(
                f"{job.id}/{job.execution_number}",
                _patch(job.document),
                whole=job.document["replace"],
                cancelled=job.cancelled,
                tell=words.append,
            )
        finally:
            told.cancel()
            await asyncio.wait({told})
        if outcome.state == "applied":
            hidden = f"; but for {_words(outcome.problems)}" if outcome.problems else ""
            return {"message": f"the configuration is in force and has proven itself{hidden}"}
        code = outcome.problems[0].code
        if outcome.state == "rejected":
            if code == "cancelled":
                raise FailedError(code, "the job was cancelled, nothing was changed")
            raise _refused(outcome.problems)
        if any(problem.code in ("revert_failed", "reboot_failed") for problem in outcome.problems):
            why = f"taking it back failed in part: {_words(outcome.problems)}"
            raise FailedError("rollback_failed", why, "see to the camera")
        raise FailedError(code, f"taken back: {_words(outcome.problems)}", "send other values")


async def _tell(job: Job, words: list[str]) -> None:
    """Keep the latest of `words`, for the cloud to see what the job waits for, not more often than it is worth."""
    kept = ""
    while True:
        await asyncio.sleep(FIRST_TELL_S if not kept else TELL_EVERY_S)
        if words and words[-1] != kept:
            kept = words[-1]
            words.clear()
            await job.save({"asked": True}, kept)


def _patch(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"agent": document["agent"], "targets": document["targets"]}


def _refused(problems: Sequence[Problem]) -> RefusedError:
    return RefusedError(problems[0].code, _words(problems), "send a configuration that this camera can take")


def _words(problems: Sequence[Problem]) -> str:
    words = "; ".join(f"{problem.pointer or '/'}: {problem.message}" for problem in problems)
    return words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]} … ({len(problems)} in all)"
