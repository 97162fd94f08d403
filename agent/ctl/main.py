"""`agentctl`: reads the arguments, imports the one verb that is asked for, and turns every end into an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from importlib import import_module
from typing import Any, NoReturn

from agent.ctl import output
from agent.ctl.client import MALFORMED, Client, garbled, socket_file
from agent.ctl.exits import ANSWERED, DAEMON_DOWN, ERROR, USAGE, Failure

VERBS = {
    "status": "everything at a glance, and what needs attention",
    "doctor": "find out what is wrong, and what to do about it",
    "jobs": "jobs from the cloud: list, show, watch, cancel, plan",
    "config": "settings in force and where they come from",
    "update": "what is installed and how the last update went",
    "capture": "how the cameras' images are doing, now",
    "metrics": "all measurements as OpenMetrics text",
}
"""Each verb is a module of this package with `add_arguments(parser)` and `run(arguments, client) -> exit status`."""

EXIT_CODES = """exit status: 0 answered, 1 error, 2 usage, 3 daemon down, 4 forbidden,
5 no such thing, 6 timed out, 10 attention, 11 bad"""


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in JSON where JSON is wanted."""

    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv[1:]:
            output.show_json({"error": {"code": "usage", "message": message, "hint": f"{self.prog} --help"}})
        else:
            output.say(f"{self.prog}: {message}\n{self.format_usage().rstrip()}")
        sys.exit(USAGE)

    def print_help(self, file: Any = None) -> None:  # noqa: ARG002  the signature is argparse's
        output.show(self.format_help().rstrip("\n"))


def parser(verbs: Collection[str] = tuple(VERBS)) -> Parser:
    """The whole command line; only `verbs` get their arguments, and their modules imported."""
    top = Parser(
        prog="agentctl",
        description="Ask the camera-agent on this machine, and tell it what to do.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(top, None)
    commands = top.add_subparsers(dest="verb", required=True, prog=top.prog, metavar="VERB")
    for verb, summary in VERBS.items():
        command = commands.add_parser(
            verb,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if verb in verbs:
            import_module(f"agent.ctl.{verb}").add_arguments(command)
            _add_common(command, argparse.SUPPRESS)
            for group in command._actions:  # noqa: SLF001  argparse has no public way to walk nested commands
                if isinstance(group, argparse._SubParsersAction):  # noqa: SLF001
                    for nested in group.choices.values():
                        _add_common(nested, argparse.SUPPRESS)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:
        output.show_error("can't write the output: standard output is closed", "")
        return ERROR
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    arguments: argparse.Namespace | None = None
    client: Client | None = None
    try:
        arguments = parser([word for word in words if word in VERBS]).parse_args(words)
        # Doctor must get to say itself what is wrong with agent.toml.
        client = Client("" if arguments.verb == "doctor" else socket_file(arguments.socket, arguments.config))
        status: int = _run(arguments, client)
    except Failure as failure:
        return _show_failure(failure, arguments is not None and arguments.json, client)
    except KeyboardInterrupt:
        return ANSWERED if getattr(arguments, "watch", False) else ERROR
    return status


def _run(arguments: argparse.Namespace, client: Client) -> int:
    """The verb's exit status. An answer that isn't built as it should be is a Failure like any other."""
    try:
        status: int = import_module(f"agent.ctl.{arguments.verb}").run(arguments, client)
    except MALFORMED as error:
        if not client.answered:
            raise
        raise garbled(f"{type(error).__name__}: {error}") from error
    return status


def _add_common(command: argparse.ArgumentParser, default: Any) -> None:
    common = command.add_argument_group("for every verb")
    common.add_argument("--json", action="store_true", default=default or False, help="print JSON, for errors too")
    common.add_argument("--socket", metavar="PATH", default=default, help="the daemon's socket [$AGENTCTL_SOCKET]")
    common.add_argument("--config", metavar="FILE", default=default, help="agent.toml [$CAMERA_AGENT_CONFIG]")


def _show_failure(failure: Failure, as_json: bool, client: Client | None) -> int:
    """Say it and return the exit status."""
    if not as_json or failure.code == "output_failed":
        output.show_error(failure.message, failure.hint)
        return failure.exit_code
    document: dict[str, Any] = {
        "error": {"code": failure.code, "message": failure.message, "hint": failure.hint},
    }
    last_known = client.last_known() if client and failure.exit_code == DAEMON_DOWN else None
    if last_known:
        document["last_known"] = last_known
    try:
        output.show_json(document)
    except Failure as second:
        output.show_error(f"{failure.message}; {second.message}", failure.hint)
        return ERROR
    return failure.exit_code
