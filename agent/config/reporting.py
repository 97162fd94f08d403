"""Keeps `reported` of the shadow equal to what is in force, by updates that hold only what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agent.config.reported import difference
from agent.errors import CloudError
from agent.logs import get_logger

log = get_logger("config")


class ShadowDocument(Protocol):
    """The shadow as the service holds it; a section that is absent there may be None or empty here."""

    @property
    def version(self) -> int: ...
    @property
    def desired(self) -> Mapping[str, Any] | None: ...
    @property
    def reported(self) -> Mapping[str, Any] | None: ...


class ShadowService(Protocol):
    """The named shadow `config`; `get` is None when there is no shadow. Raises CloudError."""

    async def get(self) -> ShadowDocument | None: ...
    async def report(self, reported: dict[str, Any], /) -> int: ...
    def on_delta(self, callback: Callable[[int, dict[str, Any]], None], /) -> Any: ...


class Reporter:
    """Knows what the shadow holds as reported, and what was sent last: the same content is not sent twice in a row."""

    def __init__(self, shadow: ShadowService) -> None:
        self._shadow = shadow
        self._there: Mapping[str, Any] | None = None
        self._sent: dict[str, Any] | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether the last report failed, or none was sent yet, so that the shadow has to be read and sent to again."""
        return self._sent is None

    def forget(self) -> None:
        """What the shadow holds is not known."""
        self._there = self._sent = None

    async def read(self) -> ShadowDocument | None:
        """The shadow as it is now. Raises CloudError."""
        shadow = await self._shadow.get()
        self._there = (shadow.reported if shadow else None) or {}
        return shadow

    async def send(self, full: dict[str, Any], smallest: Callable[[], dict[str, Any]], *, resend: bool = False) -> None:
        """Bring the shadow to `full`; where the service finds it too large, to `smallest`.

        The same content is compared and sent again only on `resend`. A refusal for good is logged and not tried again
        with the same content. Raises CloudError where trying again may help.
        """
        if full == self._sent and not resend:
            return
        try:
            await self._update(full)
        except CloudError as error:
            if error.retryable:
                raise
            log.error("the shadow refused the report", code=error.code, reason=error.message)
            if str(error.code) == "413":
                await self._update(smallest())
        self._sent = full

    async def acknowledge(self, full: dict[str, Any]) -> None:
        """Send `full`, its status in any case, so that returning proves that the cloud was reached. Raises CloudError."""
        await self._update(full, always={"status": full["status"]})
        self._sent = full

    async def _update(self, wanted: dict[str, Any], always: Mapping[str, Any] | None = None) -> None:
        if self._there is None:
            await self.read()
        patch = {**(always or {}), **difference(self._there or {}, wanted)}
        self.forget()  # until the service has answered
        if patch:
            await self._shadow.report(patch)
        self._there = wanted
