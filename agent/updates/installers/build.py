"""Which installer does what for the targets of agent.toml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.host.systemd import Units
from agent.settings import Settings, UpdateTarget
from agent.updates.installers import Installer


def build(settings: Settings, *, config_file: Path, version: str, units: Units) -> Mapping[str, Installer]:
    """An installer for each target, of which only those needed are loaded; `version` is the agent's own, `config_file` its agent.toml."""
    state_dir = settings.paths.state_dir

    def one(name: str, target: UpdateTarget) -> Installer:
        if target.installer == "rauc":
            from agent.updates.installers.rauc import Rauc

            return Rauc(state_dir / "rauc", name)
        if target.installer == "deb":
            from agent.updates.installers.deb import Deb, ThroughUnit

            return Deb(name, target.package, ThroughUnit(units, state_dir))
        assert target.root
        if target.installer == "agent":
            from agent.updates.installers.agent import AgentInstaller, started_by_loader

            return AgentInstaller(target.root, config_file=config_file, version=version, started=started_by_loader())
        from agent.updates.installers.app import App

        return App(target.root)

    return {name: one(name, target) for name, target in settings.updates.targets.items()}
