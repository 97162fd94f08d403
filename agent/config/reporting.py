"""Keeps `reported` of the shadow equal to what is in force, by updates that hold only what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agent.config.reported import LEAST_BYTES, difference, size, trimmed
from agent.errors import CloudError
from agent.logs import get_logger

CONFLICTS = 3
CONFLICT, MALFORMED, TOO_LARGE = "409", "400", "413"
NESTING = "levels of nesting"
"""In the message of a 400 about depth; which depth that is AWS IoT tells in two ways."""

log = get_logger("config")


class ShadowDocument(Protocol):
    """The shadow as the service holds it; a section that is absent there may be None or empty here."""

    @property
    def version(self) -> int: ...
    @property
    def desired(self) -> Any: ...
    @property
    def reported(self) -> Mapping[str, Any] | None: ...


class ShadowService(Protocol):
    """The named shadow `config`; `get` is None when there is no shadow. Raises CloudError.

    A callback is told the version and all that is desired and not reported yet; version 0 is a shadow that was deleted.
    """

    async def get(self) -> ShadowDocument | None: ...
    async def report(self, reported: dict[str, Any], /) -> int: ...
    def on_delta(self, callback: Callable[[int, dict[str, Any]], None], /) -> Any: ...


class Reporter:
    """Knows what the shadow holds as reported, and what was sent last: the same content is not sent twice in a row."""

    def __init__(self, shadow: ShadowService) -> None:
        self._shadow = shadow
        self.version = 0
        """Of the shadow, by our last report: the delta that it makes is no news."""
        self._there: Mapping[str, Any] | None = None
        self._sent: dict[str, Any] | None = None
        self._malformed: dict[str, Any] | None = None

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
        if shadow is None:
            self._sent = None
        self._there = (shadow.reported if shadow else None) or {}
        return shadow

    async def send(self, full: dict[str, Any], smallest: Callable[[], dict[str, Any]], *, resend: bool = False) -> None:
        """Bring the shadow to `full`; where the service finds it too large, to less of it, in the end to `smallest`.

        The same content is compared and sent again only on `resend`, and never when it was malformed to the service. A
        refusal for good is logged. Raises CloudError where trying again may help.
        """
        if full == self._malformed or (full == self._sent and not resend):
            return
        try:
            await self._fit(full, smallest)
        except CloudError as error:
            if error.retryable:
                raise
            self._refused(full, error)
        self._sent = full

    async def acknowledge(self, full: dict[str, Any]) -> None:
        """Send `full`, its status in any case: returning proves that the service was reached, be it that it refuses.

        Raises CloudError where it was not, or where trying again may help.
        """
        try:
            await self._fit(full, lambda: trimmed(full, 0), {"status": full["status"]})
        except CloudError as error:
            if error.retryable or not error.code.isdigit():
                raise
            self._refused(full, error)
        self._sent = full

    def _refused(self, full: dict[str, Any], error: CloudError) -> None:
        log.error("the shadow refused the report", code=error.code, reason=error.message)
        if error.code == MALFORMED:
            self._malformed = full

    async def _fit(
        self, full: dict[str, Any], smallest: Callable[[], dict[str, Any]], always: Mapping[str, Any] | None = None
    ) -> None:
        """Update with `full`, then with half of it, a quarter and so on, until it is not too large for the service."""
        wanted, room = full, size(full)
        while True:
            try:
                return await self._update(wanted, always)
            except CloudError as error:
                too_deep = error.code == MALFORMED and NESTING in error.message
                if room <= LEAST_BYTES or not (too_deep or error.code == TOO_LARGE):
                    raise
                log.warning("the shadow can't hold the report, it is cut", bytes=size(wanted), reason=error.message)
            room = LEAST_BYTES if too_deep else max(size(wanted) // 2, LEAST_BYTES)
            wanted, always = trimmed(full, room) if room > LEAST_BYTES else smallest(), None

    async def _update(self, wanted: dict[str, Any], always: Mapping[str, Any] | None = None) -> None:
        for conflict in range(1, CONFLICTS + 1):
            if self._there is None:
                await self.read()
            patch = {**(always or {}), **difference(self._there or {}, wanted)}
            self.forget()  # until the service has answered
            try:
                if patch:
                    self.version = await self._shadow.report(patch)
            except CloudError as error:
                if error.code != CONFLICT:
                    raise
                if conflict == CONFLICTS:
                    raise CloudError(error.code, error.message, error.hint, retryable=True) from error
            else:
                self._there = wanted
                return
