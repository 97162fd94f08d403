"""A camera in a folder: agent.toml, claim certificate, a running capture pipeline and a job handler, without root."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.sandbox import pipelinectl
from agent.sandbox.aws import Aws
from agent.sandbox.pipeline import CONFIG_SCHEMA, build_artifact
from agent.sandbox.seed import Fleet, Identity
from agent.updates.archive import unpack
from agent.updates.slots import Slots
from agent.updates.trust import Installed

SOCKET_PATH_LIMIT = 100
PRODUCT = "capture-pipeline"
FIRST_VERSION = "1.0.0"
HELLO_HANDLER = """\
#!/bin/sh
# hello.sh USER [WORD…]: says hello; ends with status 3 when a word is "fail".
user=${1:-}
[ $# -gt 0 ] && shift
echo "hello from $(uname -n)${user:+ as $user}: $*"
for word in "$@"; do
    [ "$word" = fail ] && { echo "asked to fail" >&2; exit 3; }
done
exit 0
"""


@dataclass(frozen=True)
class Camera:
    """What `make_camera` made. `images` is what the capture source `front` watches."""

    folder: Path
    thing: str
    config_file: Path
    pipeline_root: Path
    images: Path
    state_dir: Path
    runtime_dir: Path
    handler_dir: Path
    keys_dir: Path

    @property
    def socket(self) -> Path:
        """The agent's local API, for `AGENTCTL_SOCKET`."""
        return self.runtime_dir / "api.sock"

    def pipelinectl(self, verb: str) -> list[str]:
        """The command that does `verb` (start, stop, restart, reload, status) to the camera's pipeline."""
        return pipelinectl_command(self.pipeline_root, verb)

    def use_keys(self, root_file: Path) -> None:
        """Trust the update keys of a `root.json`."""
        shutil.copyfile(root_file, self.keys_dir / "root.json")

    def close(self) -> None:
        """Stop the pipeline, and remove the runtime folder if it is outside of the camera's."""
        pipelinectl.stop(self.pipeline_root)
        if not self.runtime_dir.is_relative_to(self.folder):
            shutil.rmtree(self.runtime_dir, ignore_errors=True)


def make_camera(
    folder: Path,
    aws: Aws,
    fleet: Fleet,
    *,
    serial: str = "0001",
    mqtt_port: int | None = None,
    identity: Identity | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    version: str = FIRST_VERSION,
    behaviour: str = "good",
    interval_s: float = 1.0,
    start: bool = True,
) -> Camera:
    """Make the camera `cam-<serial>` in `folder` and start its pipeline; it ends when this process does. Blocks.

    `mqtt_port` is the broker's, or that of a proxy before it. With `identity` (and a thing `cam-<serial>` that has it)
    the camera has its certificate already, otherwise it provisions itself by the claim. `settings` adds to, or
    replaces, keys of agent.toml's tables: `{"telemetry": {"interval_s": 5}}`.
    """
    runtime_dir = folder / "run"
    if len(os.fsencode(runtime_dir / "api.sock")) >= SOCKET_PATH_LIMIT:
        runtime_dir = Path(tempfile.mkdtemp(prefix="camera-agent-"))
    root = folder / "pipeline"
    camera = Camera(
        folder=folder,
        thing=f"cam-{serial}",
        config_file=folder / "agent.toml",
        pipeline_root=root,
        images=root / "images",
        state_dir=folder / "state",
        runtime_dir=runtime_dir,
        handler_dir=folder / "handlers",
        keys_dir=folder / "keys",
    )
    for place in (camera.images, root / "run", camera.state_dir, runtime_dir, camera.keys_dir, folder / "claim"):
        place.mkdir(parents=True, exist_ok=True)
    camera.handler_dir.mkdir(mode=0o755)
    camera.handler_dir.chmod(0o755)
    handler = camera.handler_dir / "hello.sh"
    handler.write_text(HELLO_HANDLER, encoding="utf-8")
    handler.chmod(0o755)
    (folder / "root-ca.pem").write_text(aws.ca_pem(), encoding="ascii")
    if identity:
        _write_identity(camera.state_dir / "identity", identity)
    else:
        _write_identity(folder / "claim", fleet.claim)
    config = {"interval_s": interval_s, "quality": 85, "overlay": camera.thing}
    (root / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (root / "config.schema.json").write_text(json.dumps(CONFIG_SCHEMA, indent=2) + "\n", encoding="utf-8")
    install_first(root, build_artifact(folder / "artifacts", version, behaviour), version)
    document = _settings(camera, serial, fleet, mqtt_port or aws.mqtt_port, interval_s, provision=identity is None)
    camera.config_file.write_text(to_toml(_merged(document, settings or {})), encoding="utf-8")
    pipelinectl.write_pid_file(root / "run" / "owner.pid", os.getpid())
    if start:
        subprocess.run(camera.pipelinectl("start"), check=True)
    return camera


def install_first(root: Path, artifact: Path, version: str) -> str:
    """Put an artifact into its slot below `root` as the installer `app` does after a commit; returns its digest."""
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    app = Slots(root)
    app.slots.mkdir(parents=True, exist_ok=True)
    unpack(artifact, app.slots / digest, max_bytes=2**30)
    record = Installed(name=PRODUCT, version=version, sha256=digest, security_counter=1)
    (app.slots / f"{digest}.json").write_text(json.dumps(asdict(record)), encoding="utf-8")
    app.arm(digest)
    return digest


def pipelinectl_command(root: Path, verb: str) -> list[str]:
    """How to run pipelinectl from anywhere."""
    return [sys.executable, "-I", str(Path(pipelinectl.__file__).resolve()), str(root), verb]


def _settings(
    camera: Camera, serial: str, fleet: Fleet, mqtt_port: int, interval_s: float, *, provision: bool
) -> dict[str, Any]:
    root = camera.pipeline_root
    document: dict[str, Any] = {
        "cloud": {"endpoint": "localhost", "port": mqtt_port, "ca_file": str(camera.folder / "root-ca.pem")},
        "paths": {"state_dir": str(camera.state_dir), "runtime_dir": str(camera.runtime_dir)},
        "jobs": {"handler_dir": str(camera.handler_dir)},
        "updates": {
            "keys_dir": str(camera.keys_dir),
            "targets": {
                "pipeline": {
                    "installer": "app",
                    "root": str(root),
                    "restart": camera.pipelinectl("restart"),
                    "probe": [str(root / "current" / "probe")],
                }
            },
        },
        "config": {
            "targets": {
                "pipeline": {
                    "path": str(root / "config.json"),
                    "schema_file": str(root / "config.schema.json"),
                    "check": [str(root / "current" / "pipeline"), "--check", "{path}"],
                    "apply": camera.pipelinectl("reload"),
                }
            }
        },
        "capture": {
            "sources": {"front": {"directory": str(camera.images), "pattern": "*.jpg", "interval_s": interval_s}}
        },
    }
    if provision:
        document["provisioning"] = {
            "template": fleet.template,
            "claim_certificate_file": str(camera.folder / "claim" / "certificate.pem"),
            "claim_private_key_file": str(camera.folder / "claim" / "private-key.pem"),
            "parameters": {"SerialNumber": serial},
        }
    else:
        document["thing_name"] = camera.thing
    return document


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `more` put in, table by table."""
    merged = dict(base)
    for key, value in more.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def to_toml(document: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML of nested tables of strings, numbers, booleans and lists."""
    plain = {key: value for key, value in document.items() if not isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    if lines and path:
        lines.insert(0, f"\n[{'.'.join(path)}]")
    text = "".join(f"{line}\n" for line in lines)
    return text + "".join(
        to_toml(value, (*path, key)) for key, value in document.items() if isinstance(value, Mapping)
    )  # fmt: skip


def _write_identity(folder: Path, identity: Identity) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "certificate.pem").write_text(identity.certificate_pem, encoding="ascii")
    key_file = folder / "private-key.pem"
    key_file.touch(mode=0o600)
    key_file.write_text(identity.private_key_pem, encoding="ascii")
