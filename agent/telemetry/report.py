"""From a window to the documents that are sent. Pure.

Numbers are rounded to what they mean, keys with nothing to say are left out, and the text has no blanks: AWS meters
messages in steps of 5 KB, and a report of one camera with a few sources fits into the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

METERING_STEP_BYTES = 5 * 1024
SIGNIFICANT_DIGITS = 5
TIMES = ("start", "end", "at", "since")


def report(
    *,
    thing_name: str,
    boot_id: str,
    seq: int,
    window: tuple[float, float],
    host: Mapping[str, Any],
    capture: Mapping[str, Any],
    conditions: list[str],
    agent: Mapping[str, Any],
    outbox: Mapping[str, Any],
    labels: Mapping[str, str],
) -> bytes:
    """The report of one window as JSON.

    `window` is its begin and end in epoch seconds; `host` maps OpenTelemetry names to values; `capture` maps source names
    to their windows; `conditions` names those that are set; `labels` are the owner's. (`boot_id`, `seq`) tells duplicates and gaps: `seq` rises by
    one with each report, across restarts too.
    """
    begin, end = window
    body = {
        "schema": 1,
        "thing": thing_name,
        "boot_id": boot_id,
        "seq": seq,
        "labels": labels,
        "start": round(begin, 3),
        "end": round(end, 3),
        "agent": agent,
        "host": host,
        "capture": capture,
        "conditions": conditions,
        "outbox": outbox,
    }
    return encode(body)


def event(*, thing_name: str, boot_id: str, seq: int, labels: Mapping[str, str], change: Mapping[str, Any]) -> bytes:
    """A condition that was set or cleared, or the truth about a job that ended (`job`), as JSON."""
    return encode({"schema": 1, "thing": thing_name, "boot_id": boot_id, "seq": seq, "labels": labels, **change})


def presence(*, thing_name: str, boot_id: str, session: str, connected: bool) -> bytes:
    """That the connection is up, or, as the last will, that it was lost, as JSON.

    Both carry the same `session`, so that a will that comes late is not taken for the end of the next session.
    """
    connection = "up" if connected else "lost"
    return encode({"schema": 1, "thing": thing_name, "boot_id": boot_id, "session": session, "connection": connection})


def encode(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON of `body` without empty parts; numbers that are not finite are left out."""
    return json.dumps(_compact(body), separators=(",", ":"), ensure_ascii=False).encode()


def _compact(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        parts = {str(k): _compact(v, str(k)) for k, v in value.items()}
        return {k: v for k, v in parts.items() if v is not None and v not in ({}, [])}
    if isinstance(value, (list, tuple)):
        return [_compact(item) for item in value]
    if isinstance(value, float):
        if (key in TIMES or key.endswith("_at")) and math.isfinite(value):
            return value
        rounded = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        if not math.isfinite(rounded):
            return None
        return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
    return value
