"""A file system of its own in memory, on a loop device, seen by one process and its children only, and the block that steers the cutter.

Image and mount vanish with the process, however it ends: the image is a memfd, the loop device detaches with its last
user, the mount is in a private mount namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import time
import uuid
from pathlib import Path
from typing import ClassVar

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
LO_FLAGS_AUTOCLEAR = 4
MODES = {"synced": 0, "log flushed": 1, "log dropped": 2}
"""What of the file system reaches the disk at a cut: everything, the log, nothing more."""
KINDS = {
    # The installers want 64 MiB to stay free; mkfs.xfs makes none below 300 MiB.
    "ext4": (
        128,
        ["mkfs.ext4", "-q", "-F", "-N", "2048", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    ),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"]),
}
BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Control:
    """The block that all processes and the cutter share; see `struct control` in cutter.c."""

    NUMBERS = ("armed", "count", "cut_at", "mode", "device", "sabotage", "cut", "lines", "capacity")
    TEXTS: ClassVar = {"mount": 256, "label": 32, "only_label": 32, "label_at_cut": 32, "cut_call": 128}
    LINE = struct.Struct("32s128s")
    CAPACITY = 20_000

    def __init__(self, path: Path) -> None:
        places, at = {}, 8 * len(self.NUMBERS)
        for name, size in self.TEXTS.items():
            places[name] = (at, size)
            at += size
        self._texts, self._lines_at = places, at
        size = at + self.LINE.size * self.CAPACITY
        with path.open("r+b") as file:
            file.truncate(size)
            self._block = mmap.mmap(file.fileno(), size)

    @classmethod
    def size(cls) -> int:
        """Bytes of the file that stands for it, which must be there before the cutter is loaded."""
        return 8 * len(cls.NUMBERS) + sum(cls.TEXTS.values()) + cls.LINE.size * cls.CAPACITY

    def get(self, name: str) -> int:
        return int(struct.unpack_from("=Q", self._block, 8 * self.NUMBERS.index(name))[0])

    def set(self, **values: int) -> None:
        for name, value in values.items():
            struct.pack_into("=Q", self._block, 8 * self.NUMBERS.index(name), value)

    def text(self, name: str) -> str:
        at, size = self._texts[name]
        return self._block[at : at + size].split(b"\0")[0].decode(errors="replace")

    def set_text(self, name: str, value: str) -> None:
        at, size = self._texts[name]
        self._block[at : at + size] = value.encode()[: size - 1].ljust(size, b"\0")

    def calls(self) -> list[tuple[str, str]]:
        """What was counted: the label at that time, and the call."""
        found = []
        for number in range(self.get("lines")):
            label, call = self.LINE.unpack_from(self._block, self._lines_at + number * self.LINE.size)
            found.append((_text(label), _text(call)))
        return found

    def arm(self, *, cut_at: int = 0, mode: int = 0, sabotage: int = 0, label: str = "", trace: bool = False) -> None:
        """Count from now on, with `label` only what is done under it; at `cut_at` (from 1) the power goes, 0: never."""
        self.set(
            armed=0, count=0, cut=0, lines=0, capacity=self.CAPACITY if trace else 0,
            cut_at=cut_at, mode=mode, sabotage=sabotage,
        )  # fmt: skip
        self.set_text("label_at_cut", "")
        self.set_text("label", "boot")
        self.set_text("only_label", label)
        self.set(armed=1)

    def disarm(self) -> None:
        self.set(armed=0, cut_at=0, cut=0)


class Disk:
    """A file system of `kind`, mounted at `folder`."""

    def __init__(self, kind: str, folder: Path, control: Control) -> None:
        self.folder = folder
        self._kind = kind
        self._control = control
        mebibytes, make = KINDS[kind]
        self._image = os.memfd_create("powercut", 0)
        os.ftruncate(self._image, mebibytes * 2**20)
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run(
            [*make, f"/proc/self/fd/{self._image}"], check=True, pass_fds=[self._image], env=environment, timeout=60
        )

    def mount(self) -> None:
        """Attach the image to a loop device anew, which drops what was cached of it, and mount it."""
        device, loop = _attach(self._image)
        try:
            _checked(LIBC.mount, device.encode(), str(self.folder).encode(), self._kind.encode(), 0, None)
        finally:
            os.close(loop)
        self._control.set(device=self.folder.stat().st_dev)
        self._control.set_text("mount", str(self.folder))

    def unmount(self) -> None:
        """Raises OSError when somebody still uses it after 10 s."""
        end = time.monotonic() + 10
        while True:
            try:
                _checked(LIBC.umount2, str(self.folder).encode(), 0)
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def is_alive(self) -> bool:
        """Whether anything can be written."""
        try:
            (self.folder / "alive").mkdir()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True

    def sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            _checked(LIBC.syncfs, descriptor)
        finally:
            os.close(descriptor)


class Boots:
    """Gives this process and its children another boot id each time."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "boot_id"
        self.next()
        _checked(LIBC.mount, str(self._file).encode(), BOOT_ID.encode(), None, MS_BIND, None)

    def next(self) -> None:
        self._file.write_text(f"{uuid.uuid4()}\n", encoding="ascii")


def own_namespace() -> None:
    """What this process mounts from now on is seen by itself and its children only."""
    _checked(LIBC.unshare, CLONE_NEWNS)
    _checked(LIBC.mount, b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def _attach(image: int) -> tuple[str, int]:
    for _ in range(100):
        with Path("/dev/loop-control").open("rb") as control:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        device = f"/dev/loop{number}"
        if not Path(device).exists():
            with contextlib.suppress(FileExistsError):
                os.mknod(device, 0o660 | 0o060000, os.makedev(7, number))
        loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        info = bytearray(232)
        struct.pack_into("=I", info, 52, LO_FLAGS_AUTOCLEAR)
        try:
            fcntl.ioctl(loop, LOOP_CONFIGURE, struct.pack("=II", image, 0) + bytes(info) + bytes(64))
        except OSError as error:
            os.close(loop)
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.01)  # somebody else took it
        else:
            return device, loop
    raise OSError(errno.EBUSY, "no loop device is free")


def _checked(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode(errors="replace")
