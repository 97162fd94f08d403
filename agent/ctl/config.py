"""`agentctl config`: the settings in force, where each comes from, how they differ from what the cloud wants, and what the
programs besides the agent should run with.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from agent.ctl import output
from agent.ctl.arguments import name
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED, ATTENTION, DAEMON_DOWN, ERROR, NO_SUCH_THING, TIMED_OUT, USAGE, Failure

Json = dict[str, Any]

CHECK_TIMEOUT_S = 30
FOLLOW_TIMEOUT_S = 90
"""Without an object for so long, of which one comes every 30 s, the stream is taken for dead."""
CLASSES = {
    "live": "the cloud may set it, in force at once",
    "restart-component": "the cloud may set it, that part of the agent is restarted",
    "connectivity": "the cloud may set it, it stays when the cloud is reached over it",
    "reboot": "the cloud may set it, in force after a reboot",
}


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="show|get|explain|diff|check|target")
    shown = actions.add_parser("show", help="all settings with their origins (without an action: this)")
    shown.add_argument("--changed", action="store_true", help="only those that are not the default")
    got = actions.add_parser("get", help="the value of one key, alone")
    got.add_argument("key", type=name, metavar="KEY", help="such as telemetry.interval_s")
    explained = actions.add_parser("explain", help="one key: value, origin, default, unit, meaning")
    explained.add_argument("key", type=name, metavar="KEY", help="such as telemetry.interval_s")
    actions.add_parser("diff", help="what the cloud wants and is not in force for good; exit 10 when there is any")
    checked = actions.add_parser("check", help="whether a file would do as agent.toml; exit 2 when not")
    checked.add_argument("file", metavar="FILE")
    target = actions.add_parser("target", help="what another program on the camera should run with now")
    target.add_argument("name", nargs="?", type=name, metavar="NAME", help="see [config.targets] of agent.toml [list]")
    target.add_argument("--follow", dest="watch", action="store_true", help="now and whenever it changes, until Ctrl-C")
    target.add_argument("--confirm", metavar="DIGEST", help="say that the program runs with what has this digest")
    target.add_argument("--refuse", metavar="MESSAGE", help="with --confirm: say instead that it does not, and why")


def run(arguments: Namespace, client: Client) -> int:
    match arguments.action:
        case "check":
            return _check(arguments)
        case "explain":
            return _explain(arguments, client)
        case "get":
            return _get(arguments, client.get("/v1/config", effective=dict, shadow=dict))
        case "diff":
            return _diff(arguments, client.get("/v1/config", effective=dict, shadow=dict))
        case "target":
            return _target(arguments, client)
        case _:
            return _show(arguments, client.get("/v1/config", effective=dict, shadow=dict))


def differences(wanted: Json, in_force: Json) -> list[Json]:
    """What of the shadow's `desired` (`agent` and `targets`) is not in force, each with its JSON `pointer`.

    `in_force` maps dotted keys to entries with `value` and `origin`. A wanted null stands for "not set".
    """
    found = []
    for part in ("agent", "targets"):
        start = () if part == "agent" else ("targets",)
        for path, value in _leaves(wanted.get(part) or {}):
            entry = in_force.get(".".join((*start, *path)), {})
            is_there = entry.get("value")
            if value is not None and (value != is_there or isinstance(value, bool) != isinstance(is_there, bool)):
                pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in (part, *path))
                difference = {"pointer": pointer, "wanted": value, "in_force": is_there}
                found.append(difference | ({"origin": entry["origin"]} if entry.get("origin") else {}))
    return found


def _leaves(table: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _show(arguments: Namespace, config: Json) -> int:
    if arguments.json:
        output.show_json(config)
        return ANSWERED
    lines = _state(config)
    section = ""
    for dotted, entry in config.get("effective", {}).items():
        origin = str(entry.get("origin", "default"))
        if getattr(arguments, "changed", False) and origin == "default":
            continue
        table, _, key = dotted.rpartition(".")
        if table != section:
            section = table
            lines += ["", *_strong(f"[{table}]")]
        lines += output.wrap(output.clean(f"{key} = {_value(entry.get('value'))}"), output.WIDTH, hang=4)
        note, last = output.clean(f"# {origin}"), lines[-1]
        apart = max(2, min(52, output.WIDTH - len(note)) - len(last))
        if len(last) + apart + len(note) <= output.WIDTH:
            lines[-1] += " " * apart + output.paint(note, "quiet")
        else:
            lines += [f"    {output.paint(line, 'quiet')}" for line in output.wrap(note, output.WIDTH - 4)]
    output.show(lines)
    return ANSWERED


def _state(config: Json) -> list[str]:
    """How what the cloud wants stands, as comments."""
    shadow = config.get("shadow", {})
    version = shadow.get("desired_version")
    wanted = f"wants version {version}: {_how_it_stands(shadow)}" if version is not None else "wants nothing"
    lines = output.paragraph("# ", f"{config.get('file', 'agent.toml')}; the cloud {wanted}", 0)
    if shadow.get("waits_for"):
        lines += output.paragraph("# waits for: ", shadow["waits_for"], 0)
    for error in shadow.get("errors") or []:
        lines += output.paragraph("# why: ", f"{error.get('pointer', '')} {error.get('message', '')}", 0)
    return [line if line.startswith("#") else f"#{line[1:]}" for line in lines]


def _how_it_stands(shadow: Json) -> str:
    """`on trial for job J-1`, or the other states as they are called."""
    if shadow.get("state") != "trial":
        return str(shadow.get("state") or "none")
    job = str(shadow.get("job") or "").partition("/")[0]
    return f"on trial for job {job}" if job else "on trial"


def _strong(text: str) -> list[str]:
    return [output.paint(line, "strong") for line in output.wrap(output.clean(text), output.WIDTH, hang=4)]


def _value(value: Any) -> str:
    return "(not set)" if value is None else output.json_text(value)


def _get(arguments: Namespace, config: Json) -> int:
    effective, key = config.get("effective", {}), arguments.key
    value: Any
    if key in effective:
        value = effective[key].get("value")
    else:
        value = {k.removeprefix(f"{key}."): e.get("value") for k, e in effective.items() if k.startswith(f"{key}.")}
        if not value:
            hint = "see all keys: agentctl config show"
            raise Failure(NO_SUCH_THING, "no_such_key", f"there is no key {key}", hint)
    if arguments.json:
        origin = effective.get(key, {}).get("origin")
        output.show_json({"key": key, "value": value, **({"origin": origin} if origin else {})})
    elif isinstance(value, str):
        output.show(output.clean(value))
    else:
        output.show("" if value is None else output.json_text(value))
    return ANSWERED


def _explain(arguments: Namespace, client: Client) -> int:
    from urllib.parse import quote

    try:
        reply = client.get(f"/v1/config/explain?key={quote(arguments.key, safe='', errors='surrogateescape')}", key=str)
    except Failure as failure:
        if failure.code != "unknown_key":
            raise
        effective = client.get("/v1/config", effective=dict)["effective"]
        table = {key: entry for key, entry in effective.items() if key.startswith(f"{arguments.key}.")}
        if not table:
            raise
        return _explain_table(arguments, table)
    if arguments.json:
        output.show_json(reply)
        return ANSWERED
    since = f", {output.moment(reply['since'])}" if reply.get("since") else ""
    rows: list[list[output.Cell]] = [
        [("origin", "quiet"), f"{reply.get('origin', 'default')}{since}"],
        [("default", "quiet"), _value(reply.get("default"))],
        [("unit", "quiet"), str(reply.get("unit") or "-")],
        [("class", "quiet"), _class(reply)],
        [("meaning", "quiet"), str(reply.get("description") or "-")],
    ]
    rows[1:1] = [
        [("overrides", "quiet"), f"{_value(layer.get('value'))} from {layer.get('origin')}"]
        for layer in reply.get("overrides") or []
    ]
    head = f"{reply.get('key', arguments.key)} = {_value(reply.get('value'))}"
    output.show([*_strong(head), *output.table(rows, indent=2)])
    return ANSWERED


def _class(reply: Json) -> str:
    """Whether the cloud may set a key, and what becomes of it then."""
    if not reply.get("remote"):
        return "local only: the cloud may not set it, agent.toml does"
    applies = str(reply.get("applies") or "")
    words = CLASSES.get(applies, "the cloud may set it")
    return f"{applies}: {words}" if applies else words


def _explain_table(arguments: Namespace, table: Json) -> int:
    if arguments.json:
        output.show_json({"key": arguments.key, "keys": list(table)})
        return ANSWERED
    rows: list[list[output.Cell]] = [[key, _value(entry.get("value"))] for key, entry in table.items()]
    head = output.paragraph("", f"{arguments.key} is a table; its keys, to explain one of them:", 0)
    output.show([*head, *output.table(rows, indent=2)])
    return ANSWERED


def _diff(arguments: Namespace, config: Json) -> int:
    shadow = config.get("shadow", {})
    found = differences(shadow.get("desired") or {}, config.get("effective", {}))
    settled = shadow.get("state") in (None, "none", "applied") and not shadow.get("waits_for")
    if arguments.json:
        keys = ("state", "desired_version", "errors")
        more = {key: shadow[key] for key in ("job", "waits_for") if shadow.get(key)}
        output.show_json({"differences": found, **{key: shadow.get(key) for key in keys}, **more})
    elif not found and settled:
        output.show("all that the cloud wants is in force")
    else:
        output.show(_describe_difference(found, shadow))
    return ANSWERED if settled and not found else ATTENTION


def _describe_difference(found: list[Json], shadow: Json) -> list[str]:
    words = f"version {shadow.get('desired_version')} from the cloud is {_how_it_stands(shadow)}"
    if shadow.get("state") == "trial" and not found:
        words += ": in force, and taken back unless it proves itself"
    lines = output.paragraph("", words, 0)
    for difference in found:
        wanted, in_force = _value(difference["wanted"]), _value(difference["in_force"])
        lines += ["", *_strong(difference["pointer"])]
        if difference.get("origin"):
            in_force += f" from {difference['origin']}"
        lines += output.table([[("wanted", "quiet"), wanted], [("in force", "quiet"), in_force]], indent=2)
    if shadow.get("waits_for"):
        lines += ["", *output.paragraph("waits for: ", shadow["waits_for"], 2)]
    for error in shadow.get("errors") or []:
        lines += ["", *output.paragraph("why: ", f"{error.get('pointer', '')} {error.get('message', '')}", 2)]
    return lines


def _check(arguments: Namespace) -> int:
    """Let the agent itself judge the file, in a process of its own: it has the libraries that this one must not load."""
    import subprocess
    from pathlib import Path

    import agent

    command = [sys.executable, "-m", "agent", "check-config", str(Path(arguments.file).absolute())]
    home = Path(agent.__file__ or ".").parents[1]
    try:
        done = subprocess.run(
            command, cwd=home, capture_output=True, text=True, errors="replace", timeout=CHECK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failure(TIMED_OUT, "no_answer", f"the check did not end within {CHECK_TIMEOUT_S} s") from None
    words = (done.stderr if done.returncode else done.stdout or done.stderr).strip()
    if not arguments.json:
        if done.returncode:
            output.say(words)
        else:
            output.show(words)
    elif done.returncode == 0:
        output.show_json({"file": arguments.file, "valid": True})
    else:
        code = "settings_invalid" if done.returncode == USAGE else "check_failed"
        output.show_json({"file": arguments.file, "error": {"code": code, "message": words, "hint": ""}})
    return done.returncode if done.returncode in (ANSWERED, USAGE) else ERROR


def _target(arguments: Namespace, client: Client) -> int:
    if arguments.refuse is not None and arguments.confirm is None:
        raise Failure(USAGE, "usage", "--refuse needs --confirm DIGEST", "the digest is that of what is refused")
    if arguments.watch and arguments.confirm is not None:
        raise Failure(USAGE, "usage", "--follow and --confirm don't go together")
    if arguments.name is None:
        if arguments.watch or arguments.confirm is not None:
            raise Failure(USAGE, "usage", "NAME is missing", "list them: agentctl config target")
        return _targets(arguments, client.get("/v1/config/targets", targets=dict))
    from urllib.parse import quote

    path = f"/v1/config/targets/{quote(arguments.name, safe='', errors='surrogateescape')}"
    if arguments.confirm is not None:
        return _confirm(arguments, client, f"{path}/confirm")
    if arguments.watch:
        return _follow(arguments, client, f"{path}/follow")
    offer = client.get(path, state=str, digest=str)
    if arguments.json:
        output.show_json(offer)
    else:
        output.show(_describe(offer))
    return ANSWERED


def _targets(arguments: Namespace, reply: Json) -> int:
    if arguments.json:
        output.show_json(reply)
        return ANSWERED
    rows: list[list[output.Cell]] = [
        [(target, "strong"), (status.get("digest") or "-")[:12], _stands(status)]
        for target, status in reply["targets"].items()
    ]
    output.show(output.table(rows) or ["no config target is set, see [config.targets] of agent.toml"])
    return ANSWERED


def _stands(status: Json) -> str:
    if status.get("confirmed"):
        said = "the program runs with it"
    elif status.get("refused") is not None:
        said = f"the program refuses it: {status['refused'] or 'it does not say why'}"
    else:
        said = "not confirmed by the program"
    return f"{status.get('state', '?')}, {said}"


def _describe(offer: Json) -> list[str]:
    """An offer for a person: how it stands, its digest, and each value of its document."""
    lines = output.paragraph(f"{output.clean(offer['target'])}: ", _stands(offer), 0)
    lines += output.table([[("digest", "quiet"), offer.get("digest") or "-"]], indent=2)
    if offer.get("redacted"):
        words = "secrets are left out; who may confirm it sees them"
        lines += output.table([[("redacted", "quiet"), words]], indent=2)
    document = offer.get("document")
    if document is None:
        return [*lines, "", "the fleet sets nothing: the program uses its own"]
    values: list[list[output.Cell]] = [[".".join(path), _value(value)] for path, value in _leaves(document)]
    return [*lines, "", *(output.table(values) or ["{}"])]


def _confirm(arguments: Namespace, client: Client, path: str) -> int:
    accepted = arguments.refuse is None
    said = {"digest": arguments.confirm, "accepted": accepted, "message": arguments.refuse or ""}
    reply = client.post(path, json.dumps(said).encode(), state=str)
    if arguments.json:
        output.show_json(reply)
    else:
        output.show(f"{output.clean(reply['target'])}: {'confirmed' if accepted else 'refused'}")
    return ANSWERED


def _follow(arguments: Namespace, client: Client, path: str) -> int:
    """Each offer once, one object a line in a pipe; the agent may be away meanwhile, and what it then offers comes again
    when something of it is different, such as that it is not confirmed any more.
    """
    stream = Client(client.path, FOLLOW_TIMEOUT_S)
    shown: Json | None = None
    while True:
        try:
            for offer in stream.lines(path):
                client.answered = True
                if not (_has_reader() if "heartbeat" in offer else offer == shown or _show_offer(arguments, offer)):
                    return ANSWERED
                shown = shown if "heartbeat" in offer else offer
        except Failure as failure:
            if not client.answered or not _may_come_back(failure):
                raise
        time.sleep(1)


def _may_come_back(failure: Failure) -> bool:
    """Whether the agent only seems to be restarting."""
    return failure.exit_code in (DAEMON_DOWN, TIMED_OUT) or failure.code in ("busy", "not_ready", "garbled_answer")


def _show_offer(arguments: Namespace, offer: Json) -> bool:
    if arguments.json or not sys.stdout.isatty():
        return output.show_json(offer, line=True)
    output.show([f"{output.moment(time.time())} (Ctrl-C ends)", *_describe(offer), ""])
    return True


def _has_reader() -> bool:
    """Whether somebody still reads what this prints; asked now and then, because a write would be the only other way."""
    import select

    poll = select.poll()
    poll.register(sys.stdout, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
