"""The configurations that a camera has in turn, and the programs of the model: what their files hold, and what they have loaded."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.powercut.place import Place

Json = dict[str, Any]


class File(NamedTuple):
    """A file as it has to be; without content there is none."""

    content: bytes | None
    mode: int = 0o644
    user: int = 0
    group: int = 0


SITE = {
    "lens": File(b"# the site's own\nfocus = 1.0\n", 0o644, 0, 1001),
    "network": File(b"UPLINK='eth0' # the site's own\n", 0o600, 33, 33),
    "overlay": File(None),
    "pipeline": File(b'{"fps": 1, "by": "the site"}\n', 0o640, 1000, 1001),
}
NAMES = {"lens": "lens.toml", "network": "network.env", "overlay": "overlay.ini", "pipeline": "pipeline.json"}


class Whole(NamedTuple):
    """A whole configuration: what is wanted, and the content that each target's file then has to have."""

    wanted: Json
    contents: dict[str, bytes | None]

    @property
    def targets(self) -> Json:
        targets: Json = self.wanted["targets"]
        return targets

    @property
    def interval_s(self) -> float:
        interval_s: float = self.wanted["agent"]["telemetry"]["interval_s"]
        return interval_s

    def file(self, name: str) -> File:
        return SITE[name]._replace(content=self.contents[name])


A = Whole(
    {
        "agent": {"telemetry": {"interval_s": 10}},
        "targets": {
            "lens": {"focus": 1.5},
            "network": {"UPLINK": "eth0", "APN": "one two"},
            "pipeline": {"fps": 2, "exposure": "auto"},
        },
    },
    {
        "lens": b"focus = 1.5\n",
        "network": b'UPLINK=eth0\nAPN="one two"\n',
        "overlay": None,
        "pipeline": b'{\n  "fps": 2,\n  "exposure": "auto"\n}\n',
    },
)
B = Whole(
    {
        "agent": {"telemetry": {"interval_s": 20}},
        "targets": {
            "lens": {"focus": 2.5},
            "network": {"UPLINK": "eth0", "APN": "three"},
            "overlay": {"text": {"title": "gate 7"}},
            "pipeline": {"fps": 5, "exposure": "auto"},
        },
    },
    {
        "lens": b"focus = 2.5\n",
        "network": b"UPLINK=eth0\nAPN=three\n",
        "overlay": b"[text]\ntitle = gate 7\n",
        "pipeline": b'{\n  "fps": 5,\n  "exposure": "auto"\n}\n',
    },
)
OWN = Whole(
    {
        "agent": {"telemetry": {"interval_s": 30}},
        "targets": {"network": B.targets["network"], "pipeline": {"fps": 6}},
    },
    {
        "lens": SITE["lens"].content,
        "network": B.contents["network"],
        "overlay": None,
        "pipeline": b'{\n  "fps": 6\n}\n',
    },
)


def file_of(place: Place, name: str) -> Path:
    """Where a target's file is, links followed."""
    return place.folder / ("data" if name == "network" else "etc") / NAMES[name]


def found_at(place: Place, name: str) -> File:
    """A target's file as it is."""
    path = file_of(place, name)
    if not path.exists():
        return SITE[name]._replace(content=None)
    status = path.lstat()
    return File(path.read_bytes(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def load(place: Place, name: str) -> None:
    """A program takes what its file holds now."""
    shutil.copyfile(file_of(place, name), place.world / "loaded" / name)


def loaded_by(place: Place, name: str) -> bytes | None:
    """What a program runs with."""
    loaded = place.world / "loaded" / name
    return loaded.read_bytes() if loaded.exists() else None


def inodes(place: Place) -> dict[str, int]:
    """Which file each target is: another one after every replacement."""
    return {name: path.stat().st_ino for name in NAMES if (path := file_of(place, name)).exists()}
