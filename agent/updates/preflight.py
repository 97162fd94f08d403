"""What must hold before an update begins, and how its target is restarted."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.host.files import free_bytes
from agent.settings import UpdateTarget
from agent.updates.gate import Units
from agent.updates.manifest import Manifest
from agent.versions import compare_versions

RESTART_TIMEOUT_S = 120.0
MIN_SPACE = 64 * 2**20
MIN_SPACE_SHARE = 0.05
MIN_INODES = 1000
MIN_INODE_SHARE = 0.01


def envelope_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The signed envelope of a job document, with the key that models of the document may have renamed."""
    manifest = document.get("manifest")
    if not isinstance(manifest, Mapping):
        raise RefusedError("manifest_malformed", "the job document has no manifest", "make it with scripts/sign-update")
    return {"payloadType" if key == "payload_type" else key: value for key, value in manifest.items()}


def check_fit(
    manifest: Manifest,
    name: str,
    target: UpdateTarget,
    restarts: Collection[str],
    compatible: Collection[str],
    products: Mapping[str, str],
) -> None:
    """Whether an update is meant for this target of this camera. Raises RefusedError.

    `restarts` are the restarts that the target's installer can do, `compatible` are the kinds of camera this one is, `products` the versions of what is installed.
    """
    if manifest.target != name:
        raise _unfit("wrong_target", f"it is signed for target {manifest.target}, the job names {name}")
    if manifest.installer != target.installer:
        raise _unfit("wrong_installer", f"it is for installer {manifest.installer}, the target has {target.installer}")
    if manifest.restart not in restarts:
        ways = " or ".join(sorted(restarts))
        raise _unfit("restart_not_possible", f"restart = {manifest.restart}, installer {target.installer} takes {ways}")
    if manifest.restart == "unit" and target.installer != "agent" and not (target.unit or target.restart):
        raise _unfit("restart_unknown", f"target {name} has neither unit nor restart, nothing says how to restart it")
    if manifest.arch not in ("any", platform.machine()):
        raise _unfit("not_compatible", f"it is built for {manifest.arch}, this is {platform.machine()}")
    if manifest.compatible and not set(manifest.compatible) & set(compatible):
        mine = ", ".join(sorted(compatible)) or "of no named kind"
        raise _unfit("not_compatible", f"it is for {', '.join(manifest.compatible)}, this camera is {mine}")
    for product, least in manifest.requires.items():
        have = products.get(product)
        if not have or compare_versions(have, least) < 0:
            raise _unfit("requirement_missing", f"it needs {product} {least}, here is {have or 'none'}")


def check_space(need: Mapping[Path, int]) -> None:
    """Whether there is room for `need` bytes at each place, with a margin. Blocking. Raises RefusedError no_space, no_inodes.

    Places on one file system are added up; the margin is 64 MiB or 5 % of the file system, whichever is more. Of its
    inodes 1000, or 1 %, must be free where it counts them.
    """
    systems: dict[int, tuple[Path, int]] = {}
    for place, size in need.items():
        path = place
        while not path.exists():
            path = path.parent
        device = path.stat().st_dev
        systems[device] = (path, systems.get(device, (path, 0))[1] + size)
    for path, size in systems.values():
        state = os.statvfs(path)
        wanted = size + max(MIN_SPACE, int(MIN_SPACE_SHARE * state.f_blocks * state.f_frsize))
        free = free_bytes(path)
        if free < wanted:
            raise RefusedError(
                "no_space",
                f"{path} has {free // 2**20} MiB free, the update needs {wanted // 2**20} MiB with its margin",
                "free some space and start the job again",
            )
        if state.f_files and state.f_favail < max(MIN_INODES, int(MIN_INODE_SHARE * state.f_files)):
            raise RefusedError(
                "no_inodes",
                f"{path} has {state.f_favail} of {state.f_files} inodes left",
                "remove some of its many files and start the job again",
            )


def discard_others(folder: Path, keep: str) -> None:
    """Remove what earlier downloads left in `folder`, all but the one of digest `keep`. Blocking."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if re.match(r"^\.?[0-9a-f]{64}(\.|$)", path.name) and not path.name.lstrip(".").startswith(keep):
                discard(path)


def discard(path: Path) -> None:
    """Remove whatever is there, also a folder. Blocking."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def bytes_on_disk(folder: Path, sha256: str) -> int:
    """Bytes of the artifact that are on disk already, finished or not. Blocking."""
    sizes: list[int] = []
    for path in (folder / sha256, folder / f"{sha256}.part"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes, default=0)


async def restart_target(target: UpdateTarget, units: Units | None) -> None:
    """Restart what runs from a target. Raises FailedError unit_failed, systemd_unavailable, restart_failed."""
    if target.unit:
        if units is None:
            raise FailedError("systemd_unavailable", f"{target.unit} can't be restarted without systemd")
        await units.restart(target.unit)
    elif target.restart:
        try:
            result = await processes.run(target.restart, timeout_s=RESTART_TIMEOUT_S)
        except OSError as error:
            raise FailedError("restart_failed", f"{target.restart[0]} can't be started: {error.strerror}") from error
        if not result.succeeded:
            said = " ".join((result.stderr.text or result.stdout.text).split())[-300:]
            raise FailedError("restart_failed", f"the restart command: {result.describe()}: {said}")


def _unfit(code: str, why: str) -> RefusedError:
    return RefusedError(code, f"the update does not fit: {why}", "")
