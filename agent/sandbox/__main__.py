"""`python -m agent.sandbox`: a fleet and its AWS on this machine, until Ctrl-C, with commands to play with."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from agent.sandbox.camera import Camera
from agent.sandbox.fleet import Sandbox, running, update_document
from agent.sandbox.pipeline import build_artifact
from agent.sandbox.seed import GROUP

HELLO_JOB = {
    "version": "1.0",
    "includeStdOut": "true",
    "steps": [
        {
            "action": {
                "name": "hello",
                "type": "runHandler",
                "input": {"handler": "hello.sh", "args": ["world"], "path": "default"},
            }
        }
    ],
}


def main() -> int:
    """Exit status: 0 after Ctrl-C, 1 when it can't start or an agent ended by itself, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m agent.sandbox", description=__doc__)
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="an empty folder to keep everything in (default: one that is removed at the end)",
    )
    parser.add_argument("--things", type=int, default=1, metavar="N", help="how many cameras (default: 1)")
    arguments = parser.parse_args()
    if arguments.things < 1:
        parser.error("--things: at least one")
    if arguments.dir is None:
        folder = Path(tempfile.mkdtemp(prefix="camera-sandbox-"))
    else:
        folder = arguments.dir.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--dir: {folder} is not empty")
    try:
        return asyncio.run(play(folder, arguments.things))
    except (RuntimeError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    finally:
        if arguments.dir is None:
            shutil.rmtree(folder, ignore_errors=True)


async def play(folder: Path, things: int) -> int:
    """Run the sandbox until SIGINT or SIGTERM; SIGUSR1 cuts the broker off, and the next one restores it."""
    loop = asyncio.get_running_loop()
    ended, switch = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, switch.set)
    print("starting AWS, cameras and agents …", flush=True)
    async with running(folder, cameras=things, settings={"telemetry": {"interval_s": 10}}) as sandbox:
        jobs = await asyncio.to_thread(write_jobs, sandbox)
        print(guide(sandbox, jobs), flush=True)
        switching = asyncio.create_task(_switch_network(sandbox, switch))
        watching = [asyncio.create_task(_watch(sandbox, camera)) for camera in sandbox.cameras]
        stopping = asyncio.create_task(ended.wait())
        done, _ = await asyncio.wait([stopping, *watching], return_when=asyncio.FIRST_COMPLETED)
        for task in (switching, stopping, *watching):
            task.cancel()
        await asyncio.gather(switching, stopping, *watching, return_exceptions=True)
        print("\nstopping …", flush=True)
        return 0 if stopping in done else 1


def write_jobs(sandbox: Sandbox) -> Path:
    """Job documents to try, in a folder: `hello`, `update-good` and `update-blurry`. Blocks."""
    folder = sandbox.folder / "jobs"
    folder.mkdir()
    documents = {"hello": HELLO_JOB}
    for name, version, behaviour in (("update-good", "1.1.0", "good"), ("update-blurry", "1.2.0", "blurry:5")):
        artifact = build_artifact(sandbox.folder / "artifacts", version, behaviour)
        documents[name] = update_document(sandbox, artifact, version)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return folder


def guide(sandbox: Sandbox, jobs: Path) -> str:
    """What runs and what to try, as text for a terminal."""
    exports = "\n".join(f"  export {name}={value}" for name, value in sandbox.aws.environment.items())
    first = sandbox.cameras[0]
    create_job = (
        f"aws iot create-job --targets {sandbox.fleet.group_arn} \\\n"
        f"      --presigned-url-config roleArn={sandbox.fleet.presign_role_arn}"
    )
    desired = '{"state":{"desired":{"targets":{"pipeline":{"interval_s":0.5}}}}}'
    return f"""
{len(sandbox.cameras)} camera(s) in the group {GROUP}: {", ".join(camera.thing for camera in sandbox.cameras)}
everything is below {sandbox.folder}

The AWS side (aws CLI, or boto3 with the same variables):
{exports}
  aws iot search-index --query-string 'thingName:cam-*'
  {create_job} \\
      --job-id hello-1 --document file://{jobs}/hello.json
  {create_job} \\
      --job-id good-1 --document file://{jobs}/update-good.json       # or update-blurry.json
  aws iot describe-job-execution --job-id hello-1 --thing-name {first.thing}
  aws iot-data update-thing-shadow --thing-name {first.thing} --shadow-name config \\
      --cli-binary-format raw-in-base64-out --payload '{desired}' /dev/stdout
  aws iot-data get-thing-shadow --thing-name {first.thing} --shadow-name config /dev/stdout
  aws sqs receive-message --queue-url {sandbox.fleet.queue_url}       # reports and events

The camera's side:
  export AGENTCTL_SOCKET={first.socket}
  {_agentctl()} status
  tail -f {first.folder}/agent.log

Pull the network cable, and put it back: kill -USR1 {os.getpid()}
Ctrl-C ends all of it."""


def _agentctl() -> str:
    beside = Path(sys.executable).with_name("agentctl")
    return str(beside) if beside.exists() else f"{sys.executable} -m agent.ctl.main"


async def _switch_network(sandbox: Sandbox, switch: asyncio.Event) -> None:
    connected = True
    while True:
        await switch.wait()
        switch.clear()
        connected = not connected
        if connected:
            await sandbox.proxy.restore()
        else:
            await sandbox.proxy.cut()
        print("the broker can be reached again" if connected else "the broker is cut off", flush=True)


async def _watch(sandbox: Sandbox, camera: Camera) -> None:
    """Return when the camera's agent has ended by itself, having shown its last words."""
    status = await sandbox.agents[camera.thing].wait()
    log = await asyncio.to_thread((camera.folder / "agent.log").read_text, "utf-8", "replace")
    print(f"the agent of {camera.thing} ended with status {status}:\n" + "\n".join(log.splitlines()[-8:]), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
