"""What the engine asks of an operation; each one is a file in operations/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Operation(Protocol):
    """What a job can ask for."""

    @property
    def name(self) -> str:
        """The `operation` of its documents."""

    def check(self, document: Mapping[str, Any]) -> None:
        """Refuse, before anything is touched, what can't be done here. Called in a thread. Raises RefusedError."""

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What run() would do with a document that check() took, step by step in words. Raises RefusedError."""

    async def run(self, job: Any) -> dict[str, str]:
        """Do it, or go on with it after a restart; the status details of SUCCEEDED.

        Raises RefusedError (nothing was touched: REJECTED) or FailedError (FAILED).
        """
