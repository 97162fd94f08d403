"""Versions of a small program with everything that a slot may hold, packed the same in every process."""

from __future__ import annotations

import hashlib
import random
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fakes_updates import archive, member, signed_manifest

NOISE = 14_000


class Artifact:
    """Version `version`; `more` are further files (mode, content), `manifest` what it says besides."""

    def __init__(self, version: str, more: Mapping[str, tuple[int, bytes]] | None = None, **manifest: Any) -> None:
        noise = random.Random(version)
        self.version = version
        self.name = f"{version}.tar.gz"
        self._manifest = manifest
        files = {
            "version": (0o644, version.encode()),
            "run": (0o755, b"#!/bin/sh\nexec sleep 600\n"),
            "lib/data": (0o644, noise.randbytes(NOISE)),
            "lib/more/data": (0o600, noise.randbytes(NOISE // 2)),
            **(more or {}),
        }
        members = [member(name, content, mode=mode) for name, (mode, content) in files.items()]
        members.append(member("latest", type=tarfile.SYMTYPE, linkname="lib/data"))
        with tempfile.TemporaryDirectory() as folder:
            self.content = archive(Path(folder) / self.name, *members).read_bytes()
        self.size = len(self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.installed_size = sum(len(content) for _, content in files.values())
        self.tree = {
            **{name: ("file", mode, content) for name, (mode, content) in files.items()},
            **{str(folder): ("folder", 0o755) for name in files for folder in Path(name).parents if folder.name},
            "latest": ("link", "lib/data"),
        }

    @property
    def counter(self) -> int:
        return int(self.version.split(".")[0])

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.content)
        return path

    def envelope(self) -> dict[str, Any]:
        return signed_manifest(
            **{
                "version": self.version,
                "sha256": self.sha256,
                "size": self.size,
                "installed_size": self.installed_size,
                "security_counter": self.counter,
                **self._manifest,
            }
        )
