"""`agentctl config`: the settings in force, where each comes from, and how they differ from what the cloud wants."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from agent.ctl import output
from agent.ctl.arguments import name
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED, ATTENTION, ERROR, NO_SUCH_THING, TIMED_OUT, USAGE, Failure

Json = dict[str, Any]

CHECK_TIMEOUT_S = 30


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="show|get|explain|diff|check")
    shown = actions.add_parser("show", help="all settings with their origins (without an action: this)")
    shown.add_argument("--changed", action="store_true", help="only those that are not the default")
    got = actions.add_parser("get", help="the value of one key, alone")
    got.add_argument("key", type=name, metavar="KEY", help="such as telemetry.interval_s")
    explained = actions.add_parser("explain", help="one key: value, origin, default, unit, meaning")
    explained.add_argument("key", type=name, metavar="KEY", help="such as telemetry.interval_s")
    actions.add_parser("diff", help="what the cloud wants and is not in force; exit 10 when there is any")
    checked = actions.add_parser("check", help="whether a file would do as agent.toml; exit 2 when not")
    checked.add_argument("file", metavar="FILE")


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
        case _:
            return _show(arguments, client.get("/v1/config", effective=dict, shadow=dict))


def differences(wanted: Json, in_force: Json) -> list[Json]:
    """What of the shadow's `desired` (`agent` and `targets`) is not in force, each with its JSON `pointer`.

    `in_force` maps dotted keys to entries with `value`. A wanted null stands for "not set".
    """
    values = {key: entry.get("value") for key, entry in in_force.items()}
    found = []
    for part in ("agent", "targets"):
        start = () if part == "agent" else ("targets",)
        for path, value in _leaves(wanted.get(part) or {}):
            is_there = values.get(".".join((*start, *path)))
            if value is not None and (value != is_there or isinstance(value, bool) != isinstance(is_there, bool)):
                pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in (part, *path))
                found.append({"pointer": pointer, "wanted": value, "in_force": is_there})
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
    shadow = config.get("shadow", {})
    state, version = shadow.get("state") or "none", shadow.get("desired_version")
    wanted = f"wants version {version}: {state}" if version is not None else "wants nothing"
    lines = [f"# {output.clean(config.get('file', 'agent.toml'))}; the cloud {output.clean(wanted)}"]
    section = ""
    for dotted, entry in config.get("effective", {}).items():
        origin = str(entry.get("origin", "default"))
        if getattr(arguments, "changed", False) and origin == "default":
            continue
        table, _, key = dotted.rpartition(".")
        if table != section:
            section = table
            lines += ["", output.paint(f"[{output.clean(table)}]", "strong")]
        text = output.clean(f"{key} = {_value(entry.get('value'))}")
        note = output.clean(f"# {origin}")
        apart = max(2, min(52, output.WIDTH - len(note)) - len(text))
        lines.append(f"{text}{' ' * apart}{output.paint(note, 'quiet')}")
    output.show(lines)
    return ANSWERED


def _value(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value, ensure_ascii=False)


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
        output.show("" if value is None else json.dumps(value, ensure_ascii=False))
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
        [("the cloud", "quiet"), "may set it" if reply.get("remote") else "may not set it"],
        [("meaning", "quiet"), str(reply.get("description") or "-")],
    ]
    for layer in reply.get("overrides") or []:
        rows.insert(1, [("overrides", "quiet"), f"{_value(layer.get('value'))} from {layer.get('origin')}"])
    head = output.clean(f"{reply.get('key', arguments.key)} = {_value(reply.get('value'))}")
    output.show([output.paint(head, "strong"), *output.table(rows, indent=2)])
    return ANSWERED


def _explain_table(arguments: Namespace, table: Json) -> int:
    if arguments.json:
        output.show_json({"key": arguments.key, "keys": list(table)})
        return ANSWERED
    rows: list[list[output.Cell]] = [[key, _value(entry.get("value"))] for key, entry in table.items()]
    head = f"{output.paint(output.clean(arguments.key), 'strong')} is a table; its keys, to explain one of them:"
    output.show([head, *output.table(rows, indent=2)])
    return ANSWERED


def _diff(arguments: Namespace, config: Json) -> int:
    shadow = config.get("shadow", {})
    found = differences(shadow.get("desired") or {}, config.get("effective", {}))
    errors = shadow.get("errors") or []
    if arguments.json:
        keys = ("state", "desired_version", "errors")
        output.show_json({"differences": found, **{key: shadow.get(key) for key in keys}})
    elif not found:
        output.show("all that the cloud wants is in force")
    else:
        version = shadow.get("desired_version")
        lines = [f"version {version} from the cloud is {output.clean(shadow.get('state') or 'not in force')}"]
        for difference in found:
            pointer = difference["pointer"]
            wanted, in_force = _value(difference["wanted"]), _value(difference["in_force"])
            lines += ["", output.paint(output.clean(pointer), "strong")]
            lines += output.table([[("wanted", "quiet"), wanted], [("in force", "quiet"), in_force]], indent=2)
        for error in errors:
            lines += ["", *output.paragraph("why: ", f"{error.get('pointer', '')} {error.get('message', '')}", 2)]
        output.show(lines)
    return ATTENTION if found else ANSWERED


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
