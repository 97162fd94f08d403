"""What kind of machine this is, in words that do not change while it runs. Blocking: call in a thread."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

READ_LIMIT = 64 * 1024
VALUE_LIMIT = 256
# What makers leave in the firmware's tables when they do not fill them in.
NO_NAME = {"system manufacturer", "system product name", "to be filled by o.e.m.", "default string", "none", "unknown"}


def host_facts(root: Path = Path("/")) -> dict[str, str]:
    """`os.id`, `os.version`, `os.codename`, `os.kernel`, `host.arch`, `host.name`, `host.model`; "" for what is not known.

    The first three are ID, VERSION_ID and VERSION_CODENAME of os-release, the next three what uname(2) says; the model is
    the device tree's, or maker and product of the DMI tables. `root` stands for `/` where files are read.
    """
    release, machine = _os_release(root), os.uname()
    return {
        "os.id": release.get("ID", ""),
        "os.version": release.get("VERSION_ID", ""),
        "os.codename": release.get("VERSION_CODENAME", ""),
        "os.kernel": machine.release,
        "host.arch": machine.machine,
        "host.name": machine.nodename,
        "host.model": _model(root),
    }


def _os_release(root: Path) -> dict[str, str]:
    for place in ("etc/os-release", "usr/lib/os-release"):
        text = _text(root / place)
        if text:
            return dict(_assignments(text))
    return {}


def _assignments(text: str) -> list[tuple[str, str]]:
    """The assignments of a shell-like file; a line that is none is left out."""
    found = []
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith("#"):
            continue
        try:
            words = shlex.split(value)
        except ValueError:
            continue
        found.append((name, _cleaned(words[0]) if words else ""))
    return found


def _model(root: Path) -> str:
    model = _cleaned(_text(root / "proc/device-tree/model"))
    if model:
        return model
    parts = [_cleaned(_text(root / "sys/class/dmi/id" / name)) for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part.lower() not in NO_NAME | {""})


def _cleaned(text: str) -> str:
    """`text` on one line, without what can't be printed, such as the NUL at the end of a device tree's strings."""
    return " ".join("".join(c if c.isprintable() else " " for c in text.rstrip("\0")).split())[:VALUE_LIMIT]


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(READ_LIMIT).decode(errors="replace")
    except OSError:
        return ""
