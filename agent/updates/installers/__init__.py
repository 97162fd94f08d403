"""Installers: how software of one kind is staged beside what runs, switched to, proven, and taken back.

All acts are idempotent, so that an act that was cut is simply done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed


class Installer(Protocol):
    """What an update asks of an installer. Every method may be called again after a cut, and raises FailedError or OSError.

    What runs has a name of the installer's own, which `running` gives and `roll_back` takes: a slot, a package and its
    version. None stands for nothing.
    """

    @property
    def restarts(self) -> frozenset[str]:
        """The values of the manifest's `restart` that make sense for it."""

    async def check(self, manifest: Manifest) -> None:
        """Refuse, before anything is fetched, what this camera can't install or could not take back. Raises RefusedError."""

    async def probe(self, manifest: Manifest) -> Slot:
        """How far this version has come."""

    async def running(self) -> tuple[str | None, Installed | None]:
        """What runs, and what is known of it."""

    async def previous(self) -> tuple[str | None, Installed | None]:
        """What `roll_back` could go back to after a commit, and what is known of it."""

    async def install(
        self, artifact: Path, manifest: Manifest, envelope: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        """Stage the artifact, whose digest is right; what runs is not touched. `tell` takes words on how far it is."""

    async def arm(self, manifest: Manifest) -> None:
        """Make the staged version the one that the next start runs."""

    async def verify_running(self, manifest: Manifest) -> bool:
        """Whether that version is the active one."""

    async def why_not_running(self) -> str:
        """Why the armed version is not the active one, as far as it is known; else empty."""

    async def count_anew(self, manifest: Manifest) -> None:
        """The version is proven but for the cloud: what counts its starts, to go back by itself, begins anew."""

    async def commit(self, manifest: Manifest, previous: str | None) -> None:
        """Keep it for good, and of the others only the previous one."""

    async def roll_back(self, previous: str | None) -> None:
        """Make the version before active again; None: there was none."""

    async def step_back(self, previous: str) -> None:
        """Like `roll_back`, but from a version that was kept: it must be able to come back."""

    async def stay(self) -> None:
        """What was stepped back to has been seen to run: it is kept."""

    async def clean_up(self, keep: frozenset[str]) -> None:
        """Remove what is neither active nor in `keep`, what `running` returned."""

    async def forget(self, manifest: Manifest) -> None:
        """Remove a version that is staged or half staged, unless it is active."""

    def needs(self, manifest: Manifest) -> Mapping[Path, int]:
        """Bytes that installing writes, by a path on the file system it writes them to."""
