"""`agentctl update`: which software is installed, in which slot, and what an update is doing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from agent.ctl import output
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED
from agent.ctl.jobs import listing

Json = dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="status")
    actions.add_parser("status", help="what is installed and how the last updates went (without an action: this)")


def run(arguments: Namespace, client: Client) -> int:
    targets = client.get("/v1/status", updates=dict)["updates"]
    latest = [job for job in client.get("/v1/jobs?limit=50", jobs=list)["jobs"] if job.get("operation") == "update"][:5]
    if arguments.json:
        output.show_json({"targets": targets, "jobs": latest})
        return ANSWERED
    lines = output.table([[(name, "strong"), summary(target)] for name, target in targets.items()])
    lines = lines or ["no update target is set, see [updates.targets] of agent.toml"]
    output.show([*lines, "", *(listing(latest) if latest else ["no update has been asked for yet"])])
    return ANSWERED


def summary(target: Json) -> str:
    """A target in a few words."""
    parts = [str(target.get("version") or "nothing installed by an update yet")]
    if target.get("slot"):
        parts.append(f"slot {str(target['slot'])[:12]}")
    if target.get("state"):
        parts.append(str(target["state"]))
    return ", ".join(parts)
