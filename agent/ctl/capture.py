"""`agentctl capture`: how each camera's images are doing now; `--watch` follows them, one JSON object a line in a pipe."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from agent.ctl import output
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED

Json = dict[str, Any]

HEADINGS = ("SOURCE", "IMAGES/S", "WANTED", "LAST", "CORRUPT", "BRIGHT", "SHARP", "STATE")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="follow once a second, until Ctrl-C")


def run(arguments: Namespace, client: Client) -> int:
    if arguments.watch:
        return _watch(arguments, client)
    reply = client.get("/v1/capture", sources=dict)
    if arguments.json:
        output.show_json(reply)
    else:
        output.show(describe(reply, time.time()))
    return ANSWERED


def describe(reply: Json, now: float) -> list[str]:
    """The sources in a table, then what is wrong with them."""
    sources = reply.get("sources", {})
    if not sources:
        return ["no source is set, see [capture.sources] of agent.toml"]
    conditions = reply.get("conditions") or []
    troubled = {condition.get("source") for condition in conditions}
    rows: list[list[output.Cell]] = [[(heading, "quiet") for heading in HEADINGS]]
    rows += [[(name, "bad" if name in troubled else "good"), *_cells(live)] for name, live in sources.items()]
    lines = output.table(rows)
    if conditions:
        from agent.ctl.conditions import describe_condition

        for condition in conditions:
            lines += ["", *describe_condition(condition, now)]
    return lines


def summary(live: Json) -> str:
    """A source in a few words."""
    wanted = _wanted(live)
    of = f" of {output.number(wanted)}" if wanted is not None else ""
    parts = [f"{output.number(live.get('rate_hz'))}{of}/s"]
    age = live.get("last_image_age_s")
    parts.append("no image yet" if age is None else f"last {output.duration(age)} ago")
    for label, key, digits in (("bright", "luma", 0), ("sharp", "sharpness", 2)):
        if (value := _middle(live.get(key))) is not None:
            parts.append(f"{label} {value:.{digits}f}")
    return ", ".join(parts)


def _cells(live: Json) -> list[output.Cell]:
    age = live.get("last_image_age_s")
    return [
        output.number(live.get("rate_hz")),
        output.number(_wanted(live)),
        "never" if age is None else f"{output.duration(age)} ago",
        str(live.get("corrupt", "-")),
        output.number(_middle(live.get("luma")), 0),
        output.number(_middle(live.get("sharpness"))),
        ", ".join([str(live.get("state") or "-"), *map(str, live.get("conditions") or [])]),
    ]


def _wanted(live: Json) -> float | None:
    """Images a second that are expected."""
    interval_s = live.get("interval_s")
    return 1 / interval_s if interval_s else None


def _middle(value: Any) -> float | None:
    """A measure, or the median of its spread."""
    found = value.get("p50") if isinstance(value, dict) else value
    return float(found) if isinstance(found, (int, float)) else None


def _watch(arguments: Namespace, client: Client) -> int:
    live = sys.stdout.isatty() and not arguments.json
    for frame in client.lines("/v1/capture/stream"):
        if not live:
            if not output.show_json(frame, line=True):
                break
            continue
        now = time.time()
        lines = [f"capture, {output.moment(now)} (Ctrl-C ends)", "", *describe(frame, now)]
        output.show_frame(lines)
    return ANSWERED
