"""Installers: how software of one kind is staged beside what runs, switched to, proven, and taken back.

All acts are idempotent, so that an act that was cut is simply done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed

SUPPORTED = ("app",)
"""The installers of this version of the agent."""


class Installer(Protocol):
    """What an update asks of an installer. All methods block and raise FailedError or OSError."""

    def probe(self, sha256: str) -> Slot:
        """How far the version with this digest has come."""

    def running(self) -> tuple[str | None, Installed | None]:
        """Where the active version is, in words that `roll_back` takes, and what is known of it."""

    def install(self, artifact: Path, manifest: Manifest) -> None:
        """Stage the artifact; what runs is not touched."""

    def arm(self, sha256: str) -> None:
        """Make the staged version the one that the next start runs."""

    def verify_running(self, sha256: str) -> bool:
        """Whether that version is the active one."""

    def commit(self, sha256: str, previous: str | None, record: dict[str, Any]) -> None:
        """Keep it for good with its `record`, and of the others only the previous one."""

    def roll_back(self, previous: str | None) -> None:
        """Make the version before active again; None: there was none."""

    def clean_up(self, keep: frozenset[str]) -> None:
        """Remove what is neither active nor in `keep`, digests or what `running` returned."""

    def forget(self, sha256: str) -> None:
        """Remove a version that is staged or half staged, unless it is active."""

    def free_space(self) -> Path:
        """A path on the file system that installing writes to."""
