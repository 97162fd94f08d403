"""Keeping tasks alive: a vital one that ends, ends the process; any other starts again after a growing pause."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from agent.logs import get_logger

BACKOFF_S = (1.0, 60.0)
HEALTHY_AFTER_S = 300.0
log = get_logger("supervise")


class VitalTaskError(Exception):
    """A task without which the agent is of no use has ended."""


async def vital(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a task that must not end. Raises VitalTaskError when it does."""
    try:
        await run()
    except Exception as error:
        log.exception("a vital task failed, the agent stops", task=name)
        raise VitalTaskError(name) from error
    raise VitalTaskError(f"{name} ended")


async def restarting(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a task for ever; when it fails or ends, start it again after a pause that grows from one second to a minute."""
    pause = BACKOFF_S[0]
    while True:
        started = time.monotonic()
        try:
            await run()
            log.warning("a task ended, starting it again", task=name, pause_s=pause)
        except Exception:
            log.exception("a task failed, starting it again", task=name, pause_s=pause)
        if time.monotonic() - started > HEALTHY_AFTER_S:
            pause = BACKOFF_S[0]
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311  jitter
        pause = min(pause * 2, BACKOFF_S[1])
