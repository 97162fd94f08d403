"""By which settings to connect: those in force, and in turns agent.toml's own once those in force have failed for long. Pure.

A proxy that the cloud set and that was proven may die months later, when the cloud can't reach the camera to mend it. So no
setting of the connection keeps a camera off-line for ever that agent.toml's own settings would bring on-line.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from agent.cloud.offline import Diagnosis
from agent.settings import Cloud

FALLBACK_AFTER_S = 6 * 3600.0
"""Without a connection, until agent.toml's own settings are tried too."""
LONG_TURN_S, SHORT_TURN_S = 3600.0, 600.0


def turn(unreached_s: float, *, own_reached: bool = False) -> tuple[bool, float]:
    """Whether agent.toml's own settings have their turn after `unreached_s` without a connection, and for how many seconds yet.

    They come first after six hours. From then on the settings that connected last, which at first are those in force, have
    an hour at a time and the others ten minutes; `own_reached`: the last connection was made with agent.toml's own.
    """
    cycle = LONG_TURN_S + SHORT_TURN_S
    if own_reached:
        into = unreached_s % cycle
        return (True, LONG_TURN_S - into) if into < LONG_TURN_S else (False, cycle - into)
    if unreached_s < FALLBACK_AFTER_S:
        return False, FALLBACK_AFTER_S - unreached_s
    into = (unreached_s - FALLBACK_AFTER_S) % cycle
    return (True, SHORT_TURN_S - into) if into < SHORT_TURN_S else (False, cycle - into)


def way(cloud: Cloud) -> str:
    """Port and proxy in words, without user and password."""
    proxy = proxy_address(cloud.proxy_url)
    return f"port {cloud.port}" + (f", proxy {proxy}" if proxy else "")


def proxy_address(url: str) -> str:
    """Host and port of a proxy's URL, without user and password; empty when there is none."""
    return urlsplit(url).netloc.rpartition("@")[2]


class Route:
    """The settings in force, `cloud`, beside agent.toml's `own`, and for how long which have not connected.

    Times are monotonic seconds; `unreached_s` is what an earlier process ended with.
    """

    def __init__(self, cloud: Cloud, own: Cloud, unreached_s: float = 0.0) -> None:
        self.cloud, self.own = cloud, own
        self._before_s = unreached_s
        self._since: float | None = None
        self._connected = self._own_reached = False

    def to(self, cloud: Cloud) -> Route:
        """Other settings come in force; what passed before the first attempt of this process still counts."""
        return Route(cloud, self.own, self._before_s if self._since is None else 0.0)

    def choose(self, now: float) -> Cloud:
        """The settings for the next attempt; the first call starts the clock."""
        if self._since is None:
            self._since = now
        return self.own if self._turn(now)[0] else self.cloud

    def left_s(self, now: float) -> float:
        """For how long these settings are tried yet, in seconds."""
        return float("inf") if self.own == self.cloud else self._turn(now)[1]

    def reached(self, cloud: Cloud) -> None:
        """There is a connection, made with `cloud`."""
        self._connected, self._own_reached = True, cloud == self.own != self.cloud

    def lost(self, now: float) -> None:
        """There is no connection any more."""
        if self._connected:
            self._connected, self._since, self._before_s = False, now, 0.0

    def unreached_s(self, now: float) -> float:
        """For how long the settings in force have not connected, in seconds; no more than six hours if others did since."""
        if self._own_reached:
            return FALLBACK_AFTER_S
        return 0.0 if self._connected else self._waited_s(now)

    def told(self, now: float) -> Diagnosis | None:
        """That and why agent.toml's own settings are used, or tried in turns; None while those in force count alone."""
        if self.own == self.cloud or self.unreached_s(now) < FALLBACK_AFTER_S:
            return None
        used = "is connected by" if self._connected else "also tries"
        return Diagnosis(
            "fallback",
            f"the cloud was not reached by the settings in force ({way(self.cloud)}), "
            f"so the camera {used} agent.toml's own ({way(self.own)})",
            "correct the connection's settings in the shadow, or mend what they need",
        )

    def _turn(self, now: float) -> tuple[bool, float]:
        if self.own == self.cloud:
            return False, float("inf")
        return turn(self._waited_s(now), own_reached=self._own_reached)

    def _waited_s(self, now: float) -> float:
        return self._before_s + (0.0 if self._since is None else now - self._since)
