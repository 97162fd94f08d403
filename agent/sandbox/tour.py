"""`python -m agent.sandbox.tour`: the guided tour. One camera, its agent and a local AWS; what it does, sees and proves.

It ends by itself: exit status 0 when all was as it should be, 1 when not, 2 for wrong usage, 128 + N after signal N.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.sandbox import orphans
from agent.sandbox.fleet import Sandbox, running
from agent.sandbox.playing import add_folder, make_folder, play
from agent.sandbox.tour_guide import Guide, UnexpectedError, say
from agent.sandbox.tour_steps import SETTINGS, STEPS, Step

SEEN_WIDTH = 88
LOGS = ("cam-0001/agent.log", "cam-0001/pipeline/run/pipeline.log", "aws/aws.log")


@dataclass(frozen=True)
class Result:
    """What a step proved: `trouble` is empty when it did."""

    name: str
    seen: str
    trouble: str = ""


def main() -> int:
    """Run the tour; see the module for the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="The guided tour of camera-agent on this machine."
    )
    add_folder(parser)
    parser.add_argument("--keep", action="store_true", help="leave all running at the end, to play with, until Ctrl-C")
    arguments = parser.parse_args()
    folder = make_folder(parser, arguments.dir)
    orphans.adopt()
    began, results = time.monotonic(), list[Result]()
    try:
        caught = asyncio.run(_run(folder, results, keep=arguments.keep))
    except KeyboardInterrupt:
        caught = signal.SIGINT
    left = orphans.end_all()
    complete = len(results) == len(STEPS)
    if complete and not (arguments.keep and caught):
        seen = f"{len(left)} processes had to be ended" if left else "AWS, agent and pipeline stopped, no process left"
        results.append(Result("clean up", seen, "; ".join(left)))
        print(table(results), flush=True)
    well = complete and not any(result.trouble for result in results)
    took = f"{time.monotonic() - began:.0f} s"
    if caught and not complete:
        print(f"\nended by {signal.Signals(caught).name} after {took} and {len(results)} of {len(STEPS)} steps")
    else:
        print(f"\n{'All of it as it should be' if well else 'NOT as it should be'}, {took}")
    if arguments.dir is None and (well or caught):
        shutil.rmtree(folder, ignore_errors=True)
    elif not well:
        print("the logs: " + " ".join(str(folder / name) for name in LOGS))
    if caught and not (arguments.keep and complete):
        return 128 + caught
    return 0 if well else 1


async def _run(folder: Path, results: list[Result], *, keep: bool) -> int:
    """The steps, in order; returns the number of the signal that ended it early, or 0."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    caught: list[int] = []
    tour = asyncio.create_task(_tour(folder, results, ended if keep else None))

    def end(number: signal.Signals) -> None:
        if caught:
            return
        caught.append(number)
        ended.set()
        if not (keep and len(results) == len(STEPS)):
            print("\nstopping …", flush=True)
            tour.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        await tour
    except asyncio.CancelledError:
        if not caught:
            raise
    except (RuntimeError, OSError) as error:
        results.append(Result("sandbox", str(error), "could not start or stop"))
        print(f"the sandbox failed: {error}", flush=True)
    return caught[0] if caught else 0


async def _tour(folder: Path, results: list[Result], ended: asyncio.Event | None) -> None:
    print(f"camera-agent, a guided tour. Everything is below {folder}", flush=True)
    async with running(folder, agents=False, settings=SETTINGS) as sandbox:
        say("a local AWS, a network that can be cut, and a camera whose pipeline writes an image a second are up")
        guide = Guide(sandbox, sandbox.cameras[0])
        for number, step in enumerate(STEPS, 1):
            print(f"\n[{number}/{len(STEPS)}] {step.title}", flush=True)
            results.append(await _take(step, guide, first=number == 1))
        if ended:
            print(table(results), flush=True)
            await sandbox.start_agent(guide.camera)
            await play(sandbox, ended, versions=("2.0.0", "2.1.0"))
        print("\nstopping …", flush=True)


async def _take(step: Step, guide: Guide, *, first: bool) -> Result:
    """Take a step; whatever goes wrong in it is its result."""
    began = time.monotonic()
    try:
        if not first:
            _check_agent(guide.sandbox, guide.thing)
        result = Result(step.name, await step.run(guide))
    except Exception as error:  # noqa: BLE001  the other steps are taken all the same
        words = str(error) if isinstance(error, UnexpectedError) else f"{type(error).__name__}: {error}"
        result = Result(step.name, words, words)
    seen = textwrap.wrap(result.seen, SEEN_WIDTH)
    say(*seen, f"{'FAILED' if result.trouble else 'ok'}, {time.monotonic() - began:.1f} s")
    return result


def _check_agent(sandbox: Sandbox, thing: str) -> None:
    process = sandbox.agents.get(thing)
    if process is None or process.returncode is not None:
        raise UnexpectedError(f"the agent does not run{f', status {process.returncode}' if process else ''}")


def table(results: Sequence[Result]) -> str:
    """What the tour proved."""
    width = max(len(result.name) for result in results)
    lines = ["", f"{'step':{width}}  {'':6}  what was seen", "-" * (width + 10 + SEEN_WIDTH)]
    for result in results:
        first, *more = textwrap.wrap(result.seen, SEEN_WIDTH) or [""]
        lines.append(f"{result.name:{width}}  {'FAILED' if result.trouble else 'ok':6}  {first}")
        lines += [f"{'':{width}}  {'':6}  {line}" for line in more]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
