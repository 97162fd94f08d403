"""`agentctl status`: healthy, attention or bad at the first glance, why and what to do, then a line for each part."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

from agent.ctl import output
from agent.ctl.arguments import seconds
from agent.ctl.client import MALFORMED, Client
from agent.ctl.conditions import by_severity, describe_condition
from agent.ctl.exits import ANSWERED, ATTENTION, BAD, DAEMON_DOWN, TIMED_OUT, Failure

Json = dict[str, Any]

PARTS: dict[str, type] = {"agent": dict, "health": dict, "cloud": dict}
WORDS = {"healthy": "healthy", "degraded": "attention", "unhealthy": "bad"}
COLOURS = {"healthy": "good", "degraded": "attention", "unhealthy": "bad"}
CONFIG_COLOURS = {"rejected": "attention", "reverted": "attention", "trial": "strong"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="exit 10 when something needs attention, 11 when bad")
    parser.add_argument("--wait", choices=["online"], help="wait until the cloud is connected")
    parser.add_argument("--timeout", type=seconds, default=60, metavar="S", help="how long --wait waits [60]")


def run(arguments: Namespace, client: Client) -> int:
    try:
        status = _wait_online(client, arguments.timeout) if arguments.wait else client.get("/v1/status", **PARTS)
    except Failure as failure:
        last_known = None if arguments.json or failure.code == "not_online" else client.last_known()
        if failure.exit_code not in (DAEMON_DOWN, TIMED_OUT) or last_known is None:
            raise
        output.show_error(failure.message, failure.hint)
        try:
            lines = describe_last_known(last_known, down=failure.exit_code == DAEMON_DOWN)
        except MALFORMED:
            lines = ["", "What it last wrote down about itself can't be read."]
        output.show(lines)
        return failure.exit_code
    if arguments.json:
        output.show_json(status)
    else:
        output.show(describe(status, time.time()))
    return exit_code(status) if arguments.check else ANSWERED


def exit_code(status: Json) -> int:
    """0, 10 or 11 for a status that was answered."""
    return {"healthy": ANSWERED, "degraded": ATTENTION}.get(status.get("health", {}).get("state"), BAD)


def describe_last_known(last_known: Json, *, down: bool) -> list[str]:
    """The kept state as lines for a person; where the daemon is `down`, how it ended too, as far as it's known."""
    status, at = last_known["status"], last_known["at"]
    lines = [""]
    if down and status.get("running") is False:
        lines.append(f"It was stopped in good order at {output.moment(at)}.")
    elif down and status.get("running"):
        lines.append("It did not stop by itself: it was killed or crashed, or the power was cut.")
    ago = output.duration(last_known["age_s"])
    return [*lines, f"Last known state, {ago} old ({output.moment(at)}):", "", *describe(status, at)]


def describe(status: Json, now: float) -> list[str]:
    """A status as lines for a person; `now` in epoch seconds is when it was true."""
    health, cloud = status.get("health", {}), status.get("cloud", {})
    state = health.get("state", "unknown")
    connected = cloud.get("state") == "connected"
    agent = status.get("agent", {})
    name = output.clean(agent.get("thing_name") or "camera-agent")
    word = WORDS.get(state, state)
    tail = "" if connected else ", not connected to the cloud"
    lines = [f"{output.paint(name, 'strong')}: {output.paint(output.clean(word), COLOURS.get(state, 'bad'))}{tail}"]
    conditions = by_severity(health.get("conditions") or [])
    for condition in conditions:
        lines += ["", *describe_condition(condition, now)]
    rows = [
        _cloud(cloud, now),
        *_capture(status.get("capture", {})),
        _config(status.get("config", {})),
        *_updates(status.get("updates", {})),
        *_jobs(status.get("jobs", {}), now),
        _outbox(status.get("outbox", {}), now),
        _agent(agent),
    ]
    for row in rows:
        row[0] = (str(row[0]), "quiet")
    lines += ["", *output.table(rows)]
    if not connected and not any(str(c.get("condition", "")).startswith("cloud.") for c in conditions):
        lines[1:1] = _off_line(cloud)
    return lines


def _off_line(cloud: Json) -> list[str]:
    reason = cloud.get("reason") or "no reason is known yet"
    code = f" ({cloud['code']})" if cloud.get("code") else ""
    lines = ["", *output.paragraph("  cloud  ", f"{reason}{code}", 0)]
    return [*lines, *output.paragraph("fix: ", cloud["hint"], 4)] if cloud.get("hint") else lines


def _cloud(cloud: Json, now: float) -> list[output.Cell]:
    state = cloud.get("state", "unknown")
    where = "no endpoint is set"
    if cloud.get("endpoint"):
        via = cloud.get("via") or f"port {cloud.get('port', '')}"
        where = f"{cloud['endpoint']}, {via}"
    since = f"for {output.duration(now - cloud['since'])}, " if cloud.get("since") else ""
    return ["Cloud", (state, "good" if state == "connected" else "attention"), f"{since}{where}"]


def _capture(sources: Json) -> list[list[output.Cell]]:
    from agent.ctl.capture import summary

    rows: list[list[output.Cell]] = [["", name, summary(live)] for name, live in sources.items()]
    if not rows:
        return [["Capture", "-", "no source is set, see [capture.sources] of agent.toml"]]
    rows[0][0] = "Capture"
    return rows


def _config(config: Json) -> list[output.Cell]:
    state = config.get("state") or "none"
    version = config.get("desired_version")
    words = f"version {version}" if version is not None else "the shadow wants nothing"
    errors = [f"{e.get('pointer', '')} {e.get('message', '')}".strip() for e in config.get("errors") or []]
    return ["Config", (state, CONFIG_COLOURS.get(state, "")), "; ".join([words, *errors])]


def _updates(targets: Json) -> list[list[output.Cell]]:
    from agent.ctl.update import summary

    rows: list[list[output.Cell]] = [["", name, summary(target)] for name, target in targets.items()]
    if rows:
        rows[0][0] = "Software"
    return rows


def _jobs(jobs: Json, now: float) -> list[list[output.Cell]]:
    from agent.ctl.jobs import name_of, outcome, outcome_colour, story

    rows: list[list[output.Cell]] = []
    current, last = jobs.get("current"), jobs.get("last")
    if current:
        began = current.get("received_at")
        lasting = f", for {output.duration(now - began)}" if began else ""
        doing = story(current)
        rows.append(["", ("running", "strong"), f"{name_of(current)}{lasting}{': ' if doing else ''}{doing}"])
    if last:
        at = f" at {output.moment(last['ended_at'])}" if last.get("ended_at") else ""
        why = story(last)
        rows.append(["", (outcome(last), outcome_colour(last)), f"{name_of(last)}{at}{': ' if why else ''}{why}"])
    rows = rows or [["", "none", "no job has arrived yet"]]
    rows[0][0] = "Jobs"
    return rows


def _outbox(outbox: Json, now: float) -> list[output.Cell]:
    waiting, dropped = outbox.get("messages") or 0, outbox.get("dropped") or 0
    words = []
    if waiting:
        words.append(output.size(outbox.get("bytes")))
    if outbox.get("oldest_at"):
        words.append(f"oldest {output.duration(now - outbox['oldest_at'])}")
    if dropped:
        reasons = outbox.get("dropped_by_reason") or {}
        words.append(f"{dropped} dropped ({', '.join(f'{reason}: {count}' for reason, count in reasons.items())})")
    if outbox.get("quarantined"):
        words.append(f"{outbox['quarantined']} quarantined")
    return ["Outbox", f"{waiting} waiting" if waiting else "empty", ", ".join(words)]


def _agent(agent: Json) -> list[output.Cell]:
    parts = [f"process {agent.get('pid', '?')}", f"up {output.duration(agent.get('uptime_s'))}"]
    if agent.get("config_file"):
        parts.append(str(agent["config_file"]))
    return ["Agent", str(agent.get("version", "?")), ", ".join(parts)]


def _wait_online(client: Client, timeout_s: float) -> Json:
    """Ask every second until the cloud is connected. Raises Failure at the end of the time, which is a second at least."""
    end = time.monotonic() + timeout_s
    patience_s = client.timeout_s
    while True:
        client.timeout_s = min(patience_s, max(end - time.monotonic(), 1.0))
        seen = "camera-agent is not running"
        try:
            status = client.get("/v1/status", **PARTS)
        except Failure as failure:
            if failure.exit_code == TIMED_OUT:
                seen = "camera-agent does not answer"
            elif failure.code == "busy":
                seen = failure.message
            elif failure.exit_code != DAEMON_DOWN:
                raise
        else:
            cloud = status.get("cloud", {})
            if cloud.get("state") == "connected":
                return status
            seen = cloud.get("reason") or f"the cloud is {cloud.get('state', 'unknown')}"
        if time.monotonic() + 1 > end:
            hint = "find out why: agentctl doctor"
            raise Failure(TIMED_OUT, "not_online", f"not online after {timeout_s:g} s: {seen}", hint)
        time.sleep(1)
