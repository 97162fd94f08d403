"""A sandbox left running for a person to play with: job documents to send, the commands to type, and a network cable."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from agent.sandbox.camera import Camera
from agent.sandbox.fleet import Sandbox, update_document
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


async def play(sandbox: Sandbox, ended: asyncio.Event, *, versions: tuple[str, str] = ("1.1.0", "1.2.0")) -> bool:
    """Say what there is to play with, and wait for `ended`; SIGUSR1 cuts the broker off, the next one restores it.

    `versions` are those of the good and of the blurry update. Returns False when an agent ended by itself.
    """
    switch = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, switch.set)
    jobs = await asyncio.to_thread(_write_jobs, sandbox, *versions)
    print(_guide(sandbox, jobs), flush=True)
    switching = asyncio.create_task(_switch_network(sandbox, switch))
    watching = [asyncio.create_task(_watch(sandbox, camera)) for camera in sandbox.cameras]
    stopping = asyncio.create_task(ended.wait())
    try:
        done, _ = await asyncio.wait([stopping, *watching], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (switching, stopping, *watching):
            task.cancel()
        await asyncio.gather(switching, stopping, *watching, return_exceptions=True)
    return stopping in done


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The option --dir."""
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="an empty folder to keep everything in (default: one that is removed at the end)",
    )


def make_folder(parser: argparse.ArgumentParser, wanted: Path | None) -> Path:
    """The folder that --dir names, or a temporary one; ends the program when it can't be had or is not empty."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="camera-sandbox-"))
    folder = wanted.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--dir: {folder} is not empty")
    except OSError as error:
        parser.error(f"--dir: {folder}: {error.strerror}")
    return folder


def agentctl() -> list[str]:
    """The command `agentctl` that belongs to this Python."""
    beside = Path(sys.executable).with_name("agentctl")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "agent.ctl.main"]


def _write_jobs(sandbox: Sandbox, good: str, blurry: str) -> Path:
    folder = sandbox.folder / "jobs"
    folder.mkdir()
    documents = {"hello": HELLO_JOB}
    for name, version, behaviour in (("update-good", good, "good"), ("update-blurry", blurry, "blurry:5")):
        artifact = build_artifact(sandbox.folder / "artifacts", version, behaviour)
        documents[name] = update_document(sandbox, artifact, version)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return folder


def _guide(sandbox: Sandbox, jobs: Path) -> str:
    """What runs and what to try, as text for a terminal."""
    aws, fleet, first = sandbox.aws, sandbox.fleet, sandbox.cameras[0]
    exports = "\n".join(f"  export {name}={value}" for name, value in aws.environment.items())
    create_job = (
        f"aws iot create-job --targets {fleet.group_arn} \\\n"
        f"      --presigned-url-config roleArn={fleet.presign_role_arn}"
    )
    desired = '{"state":{"desired":{"targets":{"pipeline":{"interval_s":0.5,"overlay":"hello"}}}}}'
    return f"""
{len(sandbox.cameras)} camera(s) in the group {GROUP}: {", ".join(camera.thing for camera in sandbox.cameras)}
everything is below {sandbox.folder}

The camera's side:
  export CAMERA_AGENT_CONFIG={first.config_file}
  alias agentctl={" ".join(agentctl())}
  agentctl status
  agentctl doctor
  agentctl capture --watch
  agentctl jobs
  tail -f {first.folder}/agent.log

The AWS side. With these variables boto3 and the aws CLI speak to it:
{exports}

boto3, in {sys.executable}:
  import boto3, json
  iot = boto3.client("iot")
  iot.create_job(jobId="hello-2", targets=["{fleet.group_arn}"],
                 document=open("{jobs}/hello.json").read())
  iot.describe_job_execution(jobId="hello-2", thingName="{first.thing}")["execution"]["statusDetails"]
  boto3.client("iot-data").update_thing_shadow(thingName="{first.thing}", shadowName="config",
      payload=json.dumps({desired}))

the aws CLI:
  aws iot search-index --query-string 'thingName:cam-*'
  {create_job} \\
      --job-id hello-1 --document file://{jobs}/hello.json
  {create_job} \\
      --job-id good-1 --document file://{jobs}/update-good.json       # or update-blurry.json
  aws iot describe-job-execution --job-id good-1 --thing-name {first.thing}
  aws iot-data update-thing-shadow --thing-name {first.thing} --shadow-name config \\
      --cli-binary-format raw-in-base64-out --payload '{desired}' /dev/stdout
  aws iot-data get-thing-shadow --thing-name {first.thing} --shadow-name config /dev/stdout
  aws sqs receive-message --queue-url {fleet.queue_url}       # reports and events

Pull the network cable, and put it back: kill -USR1 {os.getpid()}
Ctrl-C ends all of it."""


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
