"""`python -m agent.sandbox`: a fleet and its AWS on this machine, until Ctrl-C, with commands to play with."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
from pathlib import Path

from agent.sandbox import orphans
from agent.sandbox.fleet import running
from agent.sandbox.playing import add_folder, make_folder, play


def main() -> int:
    """Exit status: 0 after Ctrl-C, 1 when it can't start or an agent ended by itself, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m agent.sandbox", description=__doc__)
    add_folder(parser)
    parser.add_argument("--things", type=int, default=1, metavar="N", help="how many cameras (default: 1)")
    arguments = parser.parse_args()
    if arguments.things < 1:
        parser.error("--things: at least one")
    folder = make_folder(parser, arguments.dir)
    orphans.adopt()
    try:
        return asyncio.run(_run(folder, arguments.things))
    except (RuntimeError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    finally:
        orphans.end_all()
        if arguments.dir is None:
            shutil.rmtree(folder, ignore_errors=True)


async def _run(folder: Path, things: int) -> int:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    print("starting AWS, cameras and agents …", flush=True)
    async with running(folder, cameras=things, settings={"telemetry": {"interval_s": 10}}) as sandbox:
        well = await play(sandbox, ended)
        print("\nstopping …", flush=True)
        return 0 if well else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
