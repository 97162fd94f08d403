"""Puts settings and files in force, component by component, and back again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from agent.config import targets
from agent.config.desired import Problem, pointer
from agent.config.targets import Units
from agent.errors import AgentError, FailedError
from agent.logs import get_logger
from agent.settings import ConfigTarget, Settings

log = get_logger("config")

Files = Mapping[str, bytes | None]


class Components:
    """The agent itself, by `apply_agent`, and the files of the configured targets with the units that read them.

    `settings` is what the agent runs with; None while it is not known, because applying it did not end.
    """

    def __init__(
        self,
        settings: Settings,
        units: Units,
        apply_agent: Callable[[Settings], Awaitable[None]],
    ) -> None:
        self.settings: Settings | None = settings
        self.targets: Mapping[str, ConfigTarget] = settings.config.targets
        self._units = units
        self._apply_agent = apply_agent

    async def apply(self, settings: Settings, files: Files, touched: set[str]) -> list[Problem]:
        """All of it in order, up to the first failure; the names of files that may have changed are added to `touched`."""
        where = "/agent"
        try:
            await self.put_settings(settings)
            for name, content in files.items():
                where = pointer("targets", name)
                touched.add(name)
                await self._put_file(name, content)
        except AgentError as error:
            return [Problem(where, error.message, error.code)]
        return []

    async def restore(self, settings: Settings, files: Files) -> list[Problem]:
        """As much of it as can be done; what failed comes back as problems `revert_failed`."""
        failed: list[Problem] = []
        try:
            await self.put_settings(settings)
        except AgentError as error:
            failed.append(Problem("/agent", f"taking it back failed: {error.message}", "revert_failed"))
        for name, content in files.items():
            try:
                await self._put_file(name, content)
            except AgentError as error:
                words = f"taking it back failed: {error.message}"
                failed.append(Problem(pointer("targets", name), words, "revert_failed"))
        return failed

    async def put_settings(self, settings: Settings) -> None:
        """Make the agent run with `settings`. Raises AgentError; a fault in a component becomes FailedError too."""
        if settings == self.settings:
            return
        self.settings = None
        try:
            await self._apply_agent(settings)
        except AgentError:
            raise
        except Exception as error:
            log.exception("a component did not take its new settings")
            raise FailedError("internal_error", f"a component did not take its new settings: {error}") from error
        self.settings = settings

    async def contents(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """Each target's file as it is now, None where there is none. Raises FailedError."""
        return {name: await targets.read(self.targets[name]) for name in names}

    async def restarts(self, names: Iterable[str]) -> dict[str, int]:
        """How often systemd has restarted the units behind the named targets, by unit. Raises FailedError."""
        watched = [self.targets[name] for name in names]
        units = [target.unit for target in watched if target.apply in ("reload", "restart")]
        return {unit: (await self._units.state(unit)).restarts for unit in units}

    async def complaints(self, before: Mapping[str, int]) -> list[str]:
        """Units that are not active now, or were restarted since `before`, in words. Raises FailedError."""
        words = []
        for unit, restarts in before.items():
            state = await self._units.state(unit)
            if state.active not in ("active", "reloading"):
                words.append(f"{unit} is {state.active}")
            elif state.restarts > restarts:
                words.append(f"{unit} restarted {state.restarts - restarts} times")
        return words

    def remove_leftovers(self) -> None:
        """Remove candidate files that a cut left behind. Blocking."""
        for name, target in self.targets.items():
            try:
                targets.remove_leftovers(target)
            except OSError as error:
                log.warning("can't remove a left-over candidate file", target=name, reason=str(error))

    async def _put_file(self, name: str, content: bytes | None) -> None:
        target = self.targets[name]
        await targets.put(target, content)
        await targets.activate(target, self._units)
