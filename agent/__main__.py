"""`camera-agent`: run the daemon, provision the camera, or check a configuration file."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from agent.settings import Settings
    from agent.settings_file import Site

VERSION = "0.1.0"


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 for a failure, 2 for a wrong argument or configuration."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "run":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until the daemon listens there is nothing to put away
    gc.disable()  # what is imported stays; collecting while importing costs a third of the start
    from agent import logs, settings_file
    from agent.errors import AgentError, SettingsError

    logs.configure(arguments.log_format)
    read = settings_file.read_site_or_kept if arguments.command == "run" else settings_file.read_site
    try:
        site = read(arguments.config)
    except SettingsError as error:
        print(f"camera-agent: {error.message}", file=sys.stderr)
        return 2
    if arguments.command == "check-config":
        print(f"{arguments.config}: ok")
        return 0
    logs.set_level(site.settings.log.level)
    try:
        if arguments.command == "provision":
            return _provision(site.settings)
        restart = _run(site, arguments.config)
    except AgentError as error:
        hint = f"; {error.hint}" if error.hint else ""
        print(f"camera-agent: {error.message}{hint}", file=sys.stderr)
        return 1
    if restart:
        sys.stderr.flush()
        _start_again(argv if argv is not None else sys.argv[1:])
    return 0


def _start_again(arguments: list[str]) -> NoReturn:
    """Become a new process image with the same id: by the loader, which chooses the version, where it started us."""
    if loader := os.environ.get("CAMERA_AGENT_LOADER"):
        try:
            os.execv(loader, [loader, *arguments])  # noqa: S606
        except OSError as error:
            print(f"camera-agent: {loader} can't be started: {error.strerror}", file=sys.stderr)
    os.execv(sys.executable, [sys.executable, "-m", "agent", *arguments])  # noqa: S606


def _run(site: Site, config_file: Path) -> bool:
    import asyncio

    from agent.daemon import Daemon

    gc.enable()
    gc.collect()
    gc.freeze()
    return asyncio.run(Daemon(site, config_file, VERSION).run())


def _provision(settings: Settings) -> int:
    import asyncio

    from agent.cloud import identity, provisioning

    if identity.exists(settings):
        print(f"already provisioned as {identity.thing_name(settings)}; {settings.certificate_file} exists")
        return 0
    try:
        name = asyncio.run(provisioning.provision(settings))
    except OSError as error:
        raise provisioning.as_cloud_error(error) from error
    print(f"provisioned as {name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="camera-agent", description="The agent of a fleet camera.")
    parser.add_argument("--version", action="version", version=f"camera-agent {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    default = Path(os.environ.get("CAMERA_AGENT_CONFIG", "/etc/camera-agent/agent.toml"))
    for name, words in (
        ("run", "run the daemon until it is told to stop"),
        ("provision", "get this camera's certificate by its claim, then exit"),
        ("check-config", "check a configuration file and exit: 0 when it is good, 2 when not"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        if name == "check-config":
            command.add_argument("config", nargs="?", type=Path, default=default, metavar="FILE")
        else:
            command.add_argument("--config", type=Path, default=default, metavar="FILE", help=f"default: {default}")
        command.add_argument("--log-format", choices=["auto", "console", "json"], default="auto", help="default: auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
