"""A capture pipeline to update and configure: the program that writes images, and the artifacts it is shipped in.

An artifact carries this module and what it imports, so an installed version runs the code it was built with. Besides the
standard library it needs only Pillow.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shlex
import signal
import sys
import tarfile
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.sandbox import pipelinectl

PACKAGE = Path(__file__).resolve().parents[1]
KEEP_IMAGES = 300
STALE_INTERVALS, STALE_LEAST_S = 3.0, 5.0
OWNER_LOOK_S = 1.0
PROGRAM = """\
#!/bin/sh
trap '' HUP  # a reload before the program is ready for it must not end it
slot=$(dirname "$(readlink -f "$0")")
export PYTHONPATH="$slot/lib" PYTHONDONTWRITEBYTECODE=1
exec {python} -P -m agent.sandbox.pipeline --root "$slot/../.." """
CONFIG_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Configuration of the capture pipeline",
    "type": "object",
    "additionalProperties": False,
    "required": ["interval_s"],
    "properties": {
        "interval_s": {
            "type": "number",
            "minimum": 0.05,
            "maximum": 60,
            "default": 1.0,
            "description": "Seconds between images.",
        },
        "quality": {
            "type": "integer",
            "minimum": 20,
            "maximum": 95,
            "default": 85,
            "description": "JPEG quality.",
        },
        "overlay": {
            "type": "string",
            "maxLength": 64,
            "default": "",
            "description": "Text burned in after the clock.",
        },
    },
}


def build_artifact(folder: Path, version: str, behaviour: str = "good", *, seed: int = 1) -> Path:
    """Write `capture-pipeline-<version>.tar.gz` into `folder` and return its path; equal arguments give equal bytes.

    Its root has the programs `pipeline` and `probe`, the file `VERSION`, and the code under `lib`. `behaviour` is what
    `Behaviour.parse` takes. Raises ValueError for one that does not exist.
    """
    from agent.sandbox.scene import Behaviour

    Behaviour.parse(behaviour)
    start = PROGRAM.format(python=shlex.quote(sys.executable))
    files: dict[str, tuple[int, bytes]] = {
        "VERSION": (0o644, f"{version}\n".encode()),
        "pipeline": (0o755, f'{start}--behaviour {behaviour} --seed {seed} "$@"\n'.encode()),
        "probe": (0o755, f"{start}--probe\n".encode()),
    }
    for name in (
        "__init__.py",
        "sandbox/__init__.py",
        "sandbox/pipeline.py",
        "sandbox/pipelinectl.py",
        "sandbox/scene.py",
    ):
        files[f"lib/agent/{name}"] = (0o644, (PACKAGE / name).read_bytes())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            mode, content = files[name]
            member = tarfile.TarInfo(name)
            member.mode, member.size = mode, len(content)
            archive.addfile(member, io.BytesIO(content))
    folder.mkdir(parents=True, exist_ok=True)
    artifact = folder / f"capture-pipeline-{version}.tar.gz"
    artifact.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    return artifact


def read_config(path: Path) -> dict[str, Any]:
    """The configuration with defaults filled in. Raises ValueError that names the key, OSError when it can't be read."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004  callers take one kind of error
    properties = CONFIG_SCHEMA["properties"]
    for key in CONFIG_SCHEMA["required"]:
        if key not in document:
            raise ValueError(f"{key}: missing")
    for key, value in document.items():
        if key not in properties:
            raise ValueError(f"{key}: unknown key")
        _check_value(key, value, properties[key])
    return {key: rule["default"] for key, rule in properties.items()} | document


def _check_value(key: str, value: Any, rule: dict[str, Any]) -> None:
    kinds: tuple[type, ...] = {"number": (int, float), "integer": (int,), "string": (str,)}[rule["type"]]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{key}: must be a {rule['type']}")  # noqa: TRY004
    if isinstance(value, str):
        if len(value) > rule["maxLength"]:
            raise ValueError(f"{key}: longer than {rule['maxLength']} characters")
    elif not rule["minimum"] <= value <= rule["maximum"]:
        raise ValueError(f"{key}: {value} is not between {rule['minimum']} and {rule['maximum']}")


class Pipeline:
    """Writes an image every `interval_s` into `ROOT/images`, until SIGTERM; SIGHUP reads `ROOT/config.json` again.

    A configuration that can't be used keeps the one before. When the process in `ROOT/run/owner.pid` is gone, so is this.
    """

    def __init__(self, root: Path, behaviour: str, seed: int) -> None:
        from agent.sandbox.scene import Behaviour, Scene

        self.root, self.images = root, root / "images"
        self.behaviour = Behaviour.parse(behaviour)
        self.scene = Scene(seed)
        self.interval_s = 1.0
        self._kept: deque[Path] = deque()

    def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises ValueError or OSError when the configuration can't be used at the start."""
        awaited = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.configure()
        print(f"started, {self.behaviour}, an image every {self.interval_s:g} s", flush=True)
        due = time.monotonic()
        while _owner_lives(self.root):
            now = time.monotonic()
            if now >= due:
                due = max(due + self.interval_s, now)
                if self.behaviour.kind != "silent":
                    self.write_image(datetime.now(UTC))
            caught = signal.sigtimedwait(awaited, min(OWNER_LOOK_S, max(0.0, due - time.monotonic())))
            if caught is None:
                continue
            if caught.si_signo != signal.SIGHUP:
                break
            try:
                self.configure()
                due = time.monotonic()
            except (ValueError, OSError) as error:
                print(f"configuration not taken: {error}", flush=True)
        print("stopped", flush=True)

    def configure(self) -> None:
        """Take ROOT/config.json."""
        config = read_config(self.root / "config.json")
        slower = self.behaviour.amount if self.behaviour.kind == "slow" else 1.0
        self.interval_s = config["interval_s"] * slower
        self.scene.quality, self.scene.overlay = config["quality"], config["overlay"]
        print(f"configured: {json.dumps(config)}", flush=True)

    def write_image(self, when: datetime) -> Path:
        """One image, complete under its name or not there; returns its path."""
        folder = self.images / f"{when:%Y-%m-%d}" / f"{when:%H}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{when:%Y%m%dT%H%M%S}.{when.microsecond // 1000:03d}Z.jpg"
        part = path.with_suffix(".part")
        part.write_bytes(self.scene.frame(int(when.timestamp() * 4), when, self.behaviour))
        part.rename(path)
        self._kept.append(path)
        while len(self._kept) > KEEP_IMAGES:
            self._kept.popleft().unlink(missing_ok=True)
        return path


def newest_image(images: Path) -> Path | None:
    """The image with the last name, which is the newest one; None when there is none."""
    for day in sorted(images.glob("????-??-??"), reverse=True):
        for hour in sorted(day.iterdir(), reverse=True):
            if names := sorted(hour.glob("*.jpg")):
                return names[-1]
    return None


def probe(root: Path) -> str:
    """What is wrong with the pipeline of `root`, in words; empty when it runs and its newest image is fresh."""
    if pipelinectl.running(root) is None:
        return "the pipeline does not run"
    newest = newest_image(root / "images")
    if newest is None:
        return "there is no image"
    limit = max(STALE_LEAST_S, STALE_INTERVALS * read_config(root / "config.json")["interval_s"])
    age = time.time() - newest.stat().st_mtime
    return f"the newest image is {age:.0f} s old, allowed are {limit:g} s" if age > limit else ""


def _owner_lives(root: Path) -> bool:
    owner = root / "run" / "owner.pid"
    return not owner.exists() or pipelinectl.process_of(owner) is not None


def main() -> int:
    """The program `pipeline` (and `probe`) of a slot. Exit status: 0 well, 1 not, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="pipeline", description="Synthetic capture pipeline.")
    parser.add_argument("--root", type=Path, required=True, help="folder with config.json, images/ and run/")
    parser.add_argument("--behaviour", default="good", help="good, or what is wrong with the images")
    parser.add_argument("--seed", type=int, default=1, help="which scene")
    parser.add_argument("--check", type=Path, metavar="FILE", help="only say whether FILE could be the configuration")
    parser.add_argument("--probe", action="store_true", help="only say whether the pipeline is well")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    try:
        if arguments.check:
            read_config(arguments.check)
        elif arguments.probe:
            if trouble := probe(root):
                raise ValueError(trouble)
        else:
            Pipeline(root, arguments.behaviour, arguments.seed).run()
    except (ValueError, OSError) as error:
        print(f"{arguments.check or 'pipeline'}: {error}", file=sys.stderr)
        return 1
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
