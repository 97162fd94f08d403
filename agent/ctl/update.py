"""`agentctl update`: what is installed, what an update does and waits for; go back by hand; hold changes off for a while."""

from __future__ import annotations

import json
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any

from agent.ctl import output
from agent.ctl.arguments import name, seconds
from agent.ctl.client import Client
from agent.ctl.exits import (
    ANSWERED,
    BAD,
    DAEMON_DOWN,
    ERROR,
    NO_SUCH_THING,
    TIMED_OUT,
    USAGE,
    Failure,
)

Json = dict[str, Any]

PASSING = ("words", "opens_at", "closes_at")
"""What of a window changes by the mere passing of time."""
IDLE = ("", "idle")
ON_TRIAL = ("ARMED", "RESTARTING", "TRIAL")
NEXT = {
    "VERIFIED": "go by the signed manifest",
    "PREFLIGHT": "check that there is room",
    "DOWNLOADING": "download",
    "DOWNLOADED": "check the digest",
    "WAITING": "wait for its time",
    "INSTALLING": "install beside what runs",
    "ARMED": "switch to it",
    "RESTARTING": "restart",
    "TRIAL": "the trial: it must run, and images flow as before",
    "COMMITTING": "keep it",
    "COMMITTED": "done",
}
COLOURS = {"COMMITTED": "good", "FAILED": "bad", "ROLLED_BACK": "attention"}


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="status|rollback|lock|unlock")

    def action(word: str, does: str) -> ArgumentParser:
        return actions.add_parser(word, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=parser.epilog)

    status = action("status", "what is installed and what an update waits for (without an action: this)")
    status.add_argument("target", nargs="?", type=name, metavar="TARGET", help="only this [all]")
    for command, default in ((parser, False), (status, SUPPRESS)):
        command.add_argument("--watch", action="store_true", default=default, help="follow it until Ctrl-C")
    back = action("rollback", "go back to the version before, and follow that to its end; exit 11 if it fails")
    back.add_argument("target", type=name, metavar="TARGET", help="see agentctl update status")
    back.add_argument("--yes", action="store_true", help="do not ask")
    back.add_argument("--timeout", type=seconds, default=900, metavar="S", help="follow it for so long, exit 6 [900]")
    lock = action(
        "lock", "let no update and no configuration change the camera for a while; again: for so long from now"
    )
    lock.add_argument("--for", dest="for_s", type=seconds, required=True, metavar="SECONDS", help="for how long")
    lock.add_argument("--reason", default="", metavar="TEXT", help="shown to who asks why a change waits")
    unlock = action("unlock", "end a lock before its time")
    for command in (lock, unlock):
        command.add_argument("--holder", type=name, metavar="NAME", help="whose lock it is [your user name]")


def run(arguments: Namespace, client: Client) -> int:
    match arguments.action:
        case "rollback":
            return _roll_back(arguments, client)
        case "lock":
            return _lock(arguments, client)
        case "unlock":
            return _unlock(arguments, client)
        case _ if arguments.watch:
            return _watch(arguments, client)
        case _:
            return _status(arguments, client)


def summary(target: Json) -> str:
    """A target in a few words."""
    parts = [_installed(target)]
    if target.get("state") not in (None, *IDLE):
        waits = f": {target['waits_for']}" if target.get("waits_for") else ""
        parts.append(f"{target['state']}{waits}")
    return ", ".join(parts)


def describe(reply: Json, now: float) -> list[str]:
    """What `GET /v1/updates` answered as lines for a person; `now` in epoch seconds."""
    lines: list[str] = []
    for target, status in reply["targets"].items():
        lines += [
            *output.table([[(target, "strong"), _installed(status)]]),
            *output.table(_rows(status, now), indent=2),
        ]
    if not lines:
        return ["no update target is set, see [updates.targets] of agent.toml"]
    window, rows = reply.get("window"), list[list[output.Cell]]()
    if window:
        spans = ", ".join(map(str, window.get("windows") or []))
        zone = f" {window.get('time_zone', '')}" if spans else ""
        closes = f" until {output.moment(window['closes_at'])}" if window.get("closes_at") else ""
        rows.append([("Window", "quiet"), f"{spans}{zone}{': ' if spans else ''}{window.get('words', '')}{closes}"])
    rows += [[("Lock", "quiet"), _lock_words(lock)] for lock in reply.get("locks") or []]
    return [*lines, "", *output.table(rows)] if rows else lines


def _rows(status: Json, now: float) -> list[list[output.Cell]]:
    rows: list[list[output.Cell]] = []

    def row(label: str, value: output.Cell) -> None:
        rows.append([(label, "quiet"), value])

    if status.get("previous"):
        row("before", f"{status['previous']}, there to go back to")
    state = status.get("state") or ""
    if state not in IDLE:
        lasting = f" for {output.duration(now - status['since'])}" if status.get("since") else ""
        percent = f", {status['percent']} %" if status.get("percent") is not None else ""
        row("now", (f"{state}{lasting}{percent}", "strong"))
        if status.get("waits_for"):
            row("", str(status["waits_for"]))
    if status.get("next"):
        row("next", NEXT.get(status["next"], str(status["next"])))
    last = status.get("last")
    if last:
        row("last", _outcome(last))
        if last.get("message"):
            row("", str(last["message"]))
    for kept in status.get("quarantined") or []:
        words = f"{kept.get('version') or '?'} ({str(kept.get('sha256'))[:12]}), taken back twice: {kept.get('code')}"
        row("refused", words)
    return rows


def _outcome(last: Json) -> tuple[str, str]:
    code = f" ({last['code']})" if last.get("code") else ""
    at = f" at {output.moment(last['at'])}" if last.get("at") else ""
    state = str(last.get("state") or "?")
    return f"{state} {last.get('version') or ''}".rstrip() + f"{at}{code}", COLOURS.get(state, "")


def _installed(status: Json) -> str:
    version = str(status.get("version") or "nothing installed by an update yet")
    return f"{version}, slot {str(status['slot'])[:12]}" if status.get("slot") else version


def _lock_words(lock: Json) -> str:
    why = f": {lock['reason']}" if lock.get("reason") else ""
    return f"{lock.get('holder', '?')} holds off changes for {output.duration(lock['expires_in_s'])} more{why}"


def _ask(arguments: Namespace, client: Client) -> Json:
    """How updates stand; of one target, where one is named. Raises Failure for one that is not there."""
    reply = client.get("/v1/updates", targets=dict)
    wanted = getattr(arguments, "target", None)
    if wanted is None:
        return reply
    if wanted not in reply["targets"]:
        known = ", ".join(reply["targets"]) or "none"
        raise Failure(NO_SUCH_THING, "no_such_target", f"there is no update target {wanted}", f"its targets: {known}")
    return {**reply, "targets": {wanted: reply["targets"][wanted]}}


def _status(arguments: Namespace, client: Client) -> int:
    from agent.ctl.jobs import listing

    reply = _ask(arguments, client)
    latest = [job for job in client.get("/v1/jobs?limit=50", jobs=list)["jobs"] if job.get("operation") == "update"][:5]
    if arguments.json:
        output.show_json({**reply, "jobs": latest})
        return ANSWERED
    jobs = listing(latest) if latest else ["no update has been asked for yet"]
    output.show([*describe(reply, time.time()), "", *jobs])
    return ANSWERED


def _watch(arguments: Namespace, client: Client) -> int:
    """Once a second; the agent may be away meanwhile, since updates restart it. In a pipe one object a line when it changes."""
    live = sys.stdout.isatty() and not arguments.json
    shown, reply = None, _ask(arguments, client)
    while True:
        now = time.time()
        if live:
            output.show_frame([f"updates, {output.moment(now)} (Ctrl-C ends)", "", *describe(reply, now)])
        elif (seen := _lasting(reply)) != shown:
            shown = seen
            if not output.show_json(reply, line=True):
                return ANSWERED
        time.sleep(1)
        try:
            reply = _ask(arguments, client)
        except Failure as failure:
            if not _may_come_back(failure):
                raise
            if live:
                output.show_frame([f"updates, {output.moment(now)}: {output.clean(failure.message)} (Ctrl-C ends)"])


def _lasting(reply: Json) -> str:
    """What of an answer does not change by the mere passing of time."""
    locks = [{**lock, "expires_in_s": 0} for lock in reply.get("locks") or []]
    window = {key: value for key, value in (reply.get("window") or {}).items() if key not in PASSING}
    return json.dumps({**reply, "locks": locks, "window": window})


def _may_come_back(failure: Failure) -> bool:
    """Whether the agent only seems to be restarting."""
    return failure.exit_code in (DAEMON_DOWN, TIMED_OUT) or failure.code == "busy"


def _roll_back(arguments: Namespace, client: Client) -> int:
    target = arguments.target
    reply = _ask(arguments, client)
    status = reply["targets"][target]
    words = _intention(target, status)
    warnings = [f"it does not wait for this: {_lock_words(lock)}" for lock in reply.get("locks") or []]
    if not arguments.yes:
        _confirm([words, *warnings])
    begun = client.post(f"/v1/updates/{_quoted(target)}/rollback", rollback=dict)["rollback"]
    if not arguments.json:
        output.show([str(output.clean(begun.get("message"))), "(Ctrl-C ends only the watching)"])
    return _follow(arguments, client, (status.get("last") or {}).get("at"))


def _intention(target: str, status: Json) -> str:
    """What a roll-back would do, in words. Raises Failure when there is nothing to go back to."""
    version = status.get("version")
    if status.get("state") in ON_TRIAL:
        return f"the update of {target} that is on trial is ended, and {version or 'the version before'} comes back"
    if not status.get("previous"):
        raise Failure(ERROR, "nothing_before", f"{target} has no version before to go back to", "send an update")
    return (
        f"{target} goes back from {version or 'what runs'} to {status['previous']}. What runs it is restarted, the whole "
        f"camera where {target} is its system: images pause"
    )


def _confirm(lines: list[str]) -> None:
    """Ask a person. Raises Failure where there is none, or when they say no."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise Failure(USAGE, "not_confirmed", "nobody is there to be asked", f"{lines[0]}; if that is wanted: --yes")
    for line in lines:
        output.say("\n".join(output.paragraph("", line, 0)))
    output.say("Go back? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failure(ERROR, "not_confirmed", "nothing was changed")


def _quoted(target: str) -> str:
    from urllib.parse import quote

    return quote(target, safe="", errors="surrogateescape")


def _follow(arguments: Namespace, client: Client, before: float | None) -> int:
    """Wait for another outcome than the one of `before`, and say it. Raises Failure at the end of the time."""
    end, said = time.monotonic() + arguments.timeout, ""
    while True:
        try:
            status = _ask(arguments, client)["targets"][arguments.target]
        except Failure as failure:
            if not _may_come_back(failure):
                raise
            words = "camera-agent is away, as it is when it restarts"
        else:
            last = status.get("last") or {}
            if last.get("at") is not None and last["at"] != before:
                return _end(arguments, last)
            words = str(status.get("waits_for") or "")
        if words and words != said and not arguments.json:
            said = words
            output.show(f"{output.moment(time.time())}  {output.clean(words)}")
        if time.monotonic() + 1 > end:
            raise Failure(
                TIMED_OUT,
                "still_running",
                f"{arguments.target} has not gone back after {arguments.timeout:g} s",
                "it goes on; agentctl update status",
            )
        time.sleep(1)


def _end(arguments: Namespace, last: Json) -> int:
    good = last.get("state") != "COMMITTED" and last.get("code") != "rollback_failed"
    if arguments.json:
        output.show_json({"target": arguments.target, "went_back": good, "outcome": last})
    else:
        verdict = output.paint("it went back", "good") if good else output.paint("it did not go back", "bad")
        output.show([verdict, *output.paragraph("", f"{_outcome(last)[0]}: {last.get('message') or ''}", 2)])
    return ANSWERED if good else BAD


def _lock(arguments: Namespace, client: Client) -> int:
    wanted = {"seconds": arguments.for_s, "reason": arguments.reason}
    body = json.dumps(wanted | ({"holder": arguments.holder} if arguments.holder else {}))
    reply = client.post("/v1/updates/lock", body.encode(), lock=dict)
    if arguments.json:
        output.show_json(reply)
    else:
        until = output.moment(time.time() + reply["lock"]["expires_in_s"])
        output.show(f"{output.clean(_lock_words(reply['lock']))}\nuntil {until}; sooner: agentctl update unlock")
    return ANSWERED


def _unlock(arguments: Namespace, client: Client) -> int:
    body = json.dumps({"holder": arguments.holder}) if arguments.holder else ""
    reply = client.post("/v1/updates/unlock", body.encode(), locks=list)
    if arguments.json:
        output.show_json(reply)
    else:
        output.show(["released", *(output.clean(_lock_words(lock)) for lock in reply["locks"])])
    return ANSWERED
