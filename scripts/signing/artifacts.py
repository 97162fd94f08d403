"""What an artifact says about itself: its size when installed and, for packages and bundles, product, version and machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent.errors import FailedError

from .errors import SigningError

AGENT = "camera-agent"
AGENT_PROGRAM = "bin/camera-agent"
DEBIAN_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "armv7l", "all": "any"}


@dataclass(frozen=True)
class Facts:
    """What was found; None where the artifact does not say, `unchecked` what could not be looked at."""

    installed_size: int
    """Bytes of all files when installed."""
    name: str | None = None
    version: str | None = None
    arch: str | None = None
    compatible: str | None = None
    """RAUC's name for the kind of camera."""
    unchecked: str = ""


def inspect(artifact: Path, installer: str) -> Facts:
    """Look into an artifact. Raises SigningError for one that its installer would refuse, OSError."""
    if artifact.exists() and not artifact.is_file():
        raise SigningError(f"{artifact} is not a file")
    with artifact.open("rb") as file:
        if not file.read(1):
            raise SigningError(f"{artifact} is empty")
    if installer == "deb":
        return _package(artifact)
    if installer == "rauc":
        return _bundle(artifact)
    return _archive(artifact, program=AGENT_PROGRAM if installer == "agent" else None)


def _archive(artifact: Path, program: str | None) -> Facts:
    from agent.updates.archive import damage_named, walk

    size, found = 0, False
    try:
        with damage_named():
            for path, member, _ in walk(artifact, max_bytes=2**42):
                size += member.size if member.isreg() else 0
                found |= str(path) == program and (member.issym() or bool(member.isreg() and member.mode & 0o100))
    except FailedError as error:
        raise SigningError(f"{artifact}: {error.message}; {error.hint}") from None
    if program and not found:
        raise SigningError(f"{artifact} has no executable {program}, so it can't be an agent")
    return Facts(size, name=AGENT if program else None)


def _package(artifact: Path) -> Facts:
    from agent.updates.installers.dpkg import unpacked_size

    text = _output(["dpkg-deb", "--field", str(artifact)], f"{artifact} is not a Debian package")
    fields = dict(re.findall(r"^(Package|Version|Architecture|Installed-Size): *(.*?) *$", text, re.MULTILINE))
    lacking = [name for name in ("Package", "Version", "Architecture") if not fields.get(name)]
    if lacking:
        raise SigningError(f"{artifact}: its control file has no {', '.join(lacking)}; build it again with it")
    if fields["Architecture"] not in DEBIAN_MACHINES:
        raise SigningError(f"{artifact} is for {fields['Architecture']}; known are {', '.join(DEBIAN_MACHINES)}")
    said = fields.get("Installed-Size") or "0"
    if not said.isdecimal():
        raise SigningError(f"{artifact}: Installed-Size {said} is not a number")
    try:
        unpacked = unpacked_size(artifact)
    except FailedError as error:
        raise SigningError(f"{artifact}: {error.message}") from None
    machine = DEBIAN_MACHINES[fields["Architecture"]]
    return Facts(max(int(said) * 1024, unpacked), fields["Package"], fields["Version"], machine)


def _bundle(artifact: Path) -> Facts:
    size = artifact.stat().st_size
    if shutil.which("rauc") is None:
        return Facts(
            size, unchecked="version and compatible of the bundle were not checked, rauc is not installed here"
        )
    command = ["rauc", "info", "--no-verify", "--output-format=json", str(artifact)]
    text = _output(command, f"{artifact} is not a RAUC bundle")
    try:
        document = json.loads(text[text.index("{") :])
        images = [image for slot in document.get("images", []) for image in slot.values()]
        total = sum(int(image.get("size") or 0) for image in images)
        return Facts(total or size, version=document["version"], compatible=document["compatible"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SigningError(f"{artifact}: what `rauc info` says of it is not understood") from None


def _output(command: list[str], complaint: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SigningError(f"{command[0]} is not installed here, it is needed to look into {command[-1]}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise SigningError(f"{complaint}: {said[-1].strip() if said else f'{command[0]} failed'}")
    return done.stdout
