"""Conditions as agentctl shows them: what is wrong, since when, and what to do."""

from __future__ import annotations

from typing import Any

from agent.ctl import output

SEVERITIES = {"critical": "bad", "warning": "attention", "info": "quiet"}
"""Severities, the worst first, and their colours."""


def by_severity(conditions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst first."""
    order = list(SEVERITIES)
    return sorted(conditions, key=lambda c: order.index(c["severity"]) if c.get("severity") in order else 0)


def describe_condition(condition: dict[str, Any], now: float) -> list[str]:
    """One condition in indented lines; `now` in epoch seconds."""
    name = output.clean(condition.get("condition", "?"))
    where = f" {output.clean(condition['source'])}" if condition.get("source") else ""
    since = condition.get("since")
    lasting = f"  for {output.duration(now - since)}, since {output.moment(since)}" if since else ""
    colour = SEVERITIES.get(condition.get("severity", ""), "bad")
    lines = [f"  {output.paint(name, colour)}{where}{lasting}"]
    lines += output.paragraph("", condition.get("message", ""), 4)
    if condition.get("remedy"):
        lines += output.paragraph("fix: ", condition["remedy"], 4)
    return lines
