"""How often a picture may be measured, so that analysis stays within its share of one core. Pure."""

from __future__ import annotations

LONGEST_PAUSE_S = 300.0


class Governor:
    """After an analysis that cost c seconds of CPU the next one waits c × (100 / budget − 1) seconds, at most five minutes.

    The first few after a start or a `grant` go without delay. All times are of one monotonic clock, in seconds.
    """

    def __init__(self, budget_pct: float, free: int = 8) -> None:
        self._budget_pct = budget_pct
        self._free = free
        self._not_before = float("-inf")

    def set_budget(self, budget_pct: float) -> None:
        self._budget_pct = budget_pct

    def grant(self, count: int) -> None:
        """Let the next `count` analyses go without delay."""
        self._free = max(self._free, count)

    def wait_s(self, now: float) -> float:
        """Seconds until an analysis may begin; 0 when it may now."""
        return 0.0 if self._free else max(0.0, self._not_before - now)

    def spent(self, cost_s: float, now: float) -> None:
        """An analysis that took `cost_s` of CPU ended at `now`."""
        self._free = max(0, self._free - 1)
        self._not_before = now + min(LONGEST_PAUSE_S, max(0.0, cost_s) * (100 / self._budget_pct - 1))
