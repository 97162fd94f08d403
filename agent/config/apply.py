"""Puts settings and files in force, component by component, and back again."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from agent.config import targets
from agent.config.deliveries import Deliveries
from agent.config.desired import Problem, pointer
from agent.config.formats import render
from agent.config.records import Place
from agent.config.targets import Units
from agent.errors import AgentError, FailedError
from agent.logs import get_logger
from agent.settings import ConfigTarget, Settings

log = get_logger("config")

CONFIRM_BACK_S = 30.0
"""For a program to confirm what it had before."""

Contents = Mapping[str, bytes | None]
"""What targets are to have: the content of a file, or for a program that asks the local API the document in JSON."""


class Components:
    """The agent itself, by `apply_agent`, and the configured targets: their files with the units that read them, and `deliveries`.

    `settings` is what the agent runs with; None while it is not known, because applying it did not end.
    """

    def __init__(
        self,
        settings: Settings,
        units: Units,
        apply_agent: Callable[[Settings], Awaitable[None]],
        deliveries: Deliveries,
    ) -> None:
        self.settings: Settings | None = settings
        self.targets: Mapping[str, ConfigTarget] = settings.config.targets
        self._units = units
        self._apply_agent = apply_agent
        self._deliveries = deliveries

    async def apply(self, settings: Settings, contents: Contents, touched: set[str]) -> list[Problem]:
        """All of it in order, up to the first failure; the names of targets that may have changed are added to `touched`."""
        where = "/agent"
        try:
            await self.put_settings(settings)
            for name, content in contents.items():
                where = pointer("targets", name)
                touched.add(name)
                await self._put(name, content, "trial", settings.config.trial_s)
        except AgentError as error:
            return [Problem(where, error.message, error.code)]
        except OSError as error:
            return [Problem(where, f"{error.filename or ''}: {error.strerror}", "apply_failed")]
        return []

    async def restore(self, settings: Settings, contents: Contents) -> dict[str, Problem]:
        """As much of it as can be done; what failed comes back as `revert_failed`, by target, "" for the agent."""
        failed: dict[str, Problem] = {}
        try:
            await self.put_settings(settings)
        except AgentError as error:
            failed[""] = Problem("/agent", f"taking it back failed: {error.message}", "revert_failed")
        return failed | await self.put_back(contents)

    async def put_back(self, contents: Contents) -> dict[str, Problem]:
        """Give targets what they had; by target, what could not be done."""
        failed: dict[str, Problem] = {}
        for name, content in contents.items():
            try:
                await self._put(name, content, "applied", CONFIRM_BACK_S)
            except AgentError as error:
                words = f"taking it back failed: {error.message}"
                failed[name] = Problem(pointer("targets", name), words, "revert_failed")
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

    def place(self, name: str) -> Place | None:
        """How agent.toml configures a target now; None: there is no such target."""
        target = self.targets.get(name)
        return Place(str(target.path or ""), target.format) if target else None

    async def leave(self, place: Place, content: bytes | None) -> None:
        """Put a file back at a place where agent.toml does not have the target any more."""
        if place.path:
            try:
                await targets.put(ConfigTarget(path=Path(place.path)), content)
            except AgentError as error:
                log.error("the site's own file can't be put back", path=place.path, reason=error.message)

    async def contents(self, names: Iterable[str], documents: Mapping[str, dict[str, Any]]) -> dict[str, bytes | None]:
        """What each target has now, None where there is nothing; `documents` are in force. Raises FailedError."""
        found: dict[str, bytes | None] = {}
        for name in names:
            if self.targets[name].apply != "api":
                found[name] = await targets.read(self.targets[name])
            else:
                found[name] = render(documents[name], "json") if name in documents else None
        return found

    def content(self, name: str, document: dict[str, Any]) -> bytes:
        """`document` as the target is to have it. Raises RefusedError."""
        return render(document, self.targets[name].format)

    def offer(self, documents: Mapping[str, dict[str, Any]]) -> None:
        """Tell the programs that ask what is in force now."""
        for name in self.targets:
            self._deliveries.offer(name, documents.get(name), "applied")

    async def restarts(self, names: Iterable[str]) -> dict[str, int]:
        """How often systemd has restarted the units behind the named targets, by unit. Raises FailedError."""
        units = [target.unit for name in names if (target := self.targets[name]).unit and target.apply != "reboot"]
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
            if target.apply == "api":
                continue
            try:
                targets.remove_leftovers(target)
            except OSError as error:
                log.warning("can't remove a left-over candidate file", target=name, reason=str(error))

    async def _put(
        self, name: str, content: bytes | None, state: Literal["trial", "applied"], confirm_s: float
    ) -> None:
        target = self.targets[name]
        if target.apply != "api":
            await targets.put(target, content)
            await targets.activate(target, self._units)
            return
        try:
            document = None if content is None else json.loads(content)
        except ValueError:  # it was a file of another format before
            document = None
        self._deliveries.offer(name, document, state)
        if problem := await self._deliveries.confirmed(name, confirm_s):
            raise FailedError(problem.code, problem.message)
