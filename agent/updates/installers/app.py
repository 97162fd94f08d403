"""Installer `app`: a program in slots below one folder; see `agent.updates.slots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.host.threads import to_end
from agent.updates.manifest import Manifest
from agent.updates.slots import Slots
from agent.updates.states import Slot
from agent.updates.trust import Installed


class App:
    """The slots below `root`, a folder on one file system that only the agent writes to."""

    restarts = frozenset({"none", "unit", "reboot"})

    def __init__(self, root: Path) -> None:
        self.slots = Slots(root)

    async def check(self, manifest: Manifest) -> None:
        """Whatever was signed for it can be installed."""

    async def probe(self, manifest: Manifest) -> Slot:
        return await to_end(self.slots.probe, manifest.sha256)

    async def running(self) -> tuple[str | None, Installed | None]:
        """What was never committed is not known: nothing may be measured by it, nor gone back to."""
        link, installed = await to_end(self.slots.running)
        if installed and not await to_end(self.slots.committed, installed.sha256):
            return link, None
        return link, installed

    async def previous(self) -> tuple[str | None, Installed | None]:
        return await to_end(self.slots.previous)

    async def install(
        self,
        artifact: Path,
        manifest: Manifest,
        envelope: Mapping[str, Any],  # noqa: ARG002
        tell: Callable[[str], None],  # noqa: ARG002
    ) -> None:
        await to_end(self.slots.install, artifact, manifest)

    async def arm(self, manifest: Manifest) -> None:
        await to_end(self.slots.arm, manifest.sha256)

    async def verify_running(self, manifest: Manifest) -> bool:
        return await to_end(self.slots.verify_running, manifest.sha256)

    async def why_not_running(self) -> str:
        return ""

    async def count_anew(self, manifest: Manifest) -> None:
        """Nothing counts its starts."""

    async def commit(self, manifest: Manifest, previous: str | None) -> None:
        await to_end(self.slots.commit, manifest, previous)

    async def roll_back(self, previous: str | None) -> None:
        await to_end(self.slots.roll_back, previous)

    async def step_back(self, previous: str) -> None:
        await self.roll_back(previous)

    async def stay(self) -> None:
        """Nothing would take it back."""

    async def clean_up(self, keep: frozenset[str]) -> None:
        await to_end(self.slots.clean_up, keep)

    async def forget(self, manifest: Manifest) -> None:
        await to_end(self.slots.forget, manifest.sha256)

    def needs(self, manifest: Manifest) -> Mapping[Path, int]:
        return {self.slots.slots: manifest.installed_size}
