"""`agentctl doctor`: runs the checks of agent.health.probes here, with or without the daemon, and names the first cause."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent.ctl import output
from agent.ctl.client import Client, config_file, socket_file
from agent.ctl.exits import ANSWERED, ATTENTION, BAD, NO_SUCH_THING, Failure

if TYPE_CHECKING:
    from agent.health.probes import Finding

LABELS: dict[str, output.Cell] = {
    "pass": ("ok", "good"),
    "warn": ("WARN", "attention"),
    "fail": ("FAIL", "bad"),
    "skip": ("skip", "quiet"),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="only these [all]")
    parser.add_argument("--strict", action="store_true", help="exit 10 when there are warnings")
    parser.add_argument("--list", action="store_true", help="name the checks and run none")


def run(arguments: Namespace, _: Client) -> int:
    from agent.health import probes

    known = probes.list_checks()
    if arguments.list:
        if arguments.json:
            output.show_json({"checks": [{"code": code, "title": title} for code, title in known.items()]})
        else:
            output.show(output.table([[(code, "strong"), title] for code, title in known.items()]))
        return ANSWERED
    for code in arguments.checks:
        if code not in known:
            raise Failure(NO_SUCH_THING, "no_such_check", f"there is no check {code!r}", "agentctl doctor --list")
    path = Path(config_file(arguments.config))
    site = probes.Site(path, api_socket=_socket(arguments))
    findings = probes.run_checks(path, only=arguments.checks or None, site=site)
    if arguments.json:
        output.show_json({"state": _state(findings), "findings": [finding.as_dict() for finding in findings]})
    else:
        output.show(describe(findings))
    state = _state(findings)
    return BAD if state == "bad" else ATTENTION if state == "attention" and arguments.strict else ANSWERED


def describe(findings: Sequence[Finding]) -> list[str]:
    """What was found in one line, then each failure and warning with its remedy, then every check."""
    state = _state(findings)
    found = [finding for finding in findings if finding.status in ("fail", "warn")]
    found.sort(key=lambda finding: finding.status != "fail")
    colour = {"bad": "bad", "attention": "attention"}.get(state, "good")
    failures = sum(finding.status == "fail" for finding in found)
    counts = [f"{failures} failed"] if failures else []
    if warnings := len(found) - failures:
        counts.append(f"{warnings} warning{'s' if warnings > 1 else ''}")
    summary = f": {', '.join(counts)}; begin with {found[0].code}" if found else ", nothing is wrong"
    lines = [f"{output.paint(state, colour)}{summary}"]
    for finding in found:
        label = "failed" if finding.status == "fail" else "warning"
        lines += ["", f"  {output.paint(finding.code, 'bad' if label == 'failed' else 'attention')}  {label}"]
        for name, text in (("seen:  ", finding.seen), ("means: ", finding.meaning), ("fix:   ", finding.remedy)):
            lines += output.paragraph(name, text, 4) if text else []
    rows = [[LABELS[finding.status], finding.code, finding.seen or finding.title] for finding in findings]
    return [*lines, "", *output.table(rows)]


def _state(findings: Sequence[Finding]) -> str:
    statuses = {finding.status for finding in findings}
    return "bad" if "fail" in statuses else "attention" if "warn" in statuses else "healthy"


def _socket(arguments: Namespace) -> Path | None:
    """The daemon's socket; None when agent.toml can't be used, which is then what the checks will say."""
    try:
        return Path(socket_file(arguments.socket, arguments.config))
    except Failure:
        return None
