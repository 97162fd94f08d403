"""The virtual camera's drives, served to QEMU by NBD: each has a write cache, and what was not flushed can be lost."""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import tempfile
import threading
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path

HANDSHAKE = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 0b11)
OPTION_REPLY = 0x3E889045565A9
EXPORT_NAME, GO, INFO = 1, 7, 6
ACKNOWLEDGED, EXPORT, UNSUPPORTED = 1, 3, 2**31 + 1
REQUEST, REPLY = 0x25609513, 0x67446698
READ, WRITE, LEAVE, FLUSH = range(4)
FLAGS = 0b101
"""There are flags, and FLUSH is understood; for a write that must last, QEMU then sends a flush after it."""
EINVAL = 22


class Drive:
    """One drive, a file. What was overwritten since the last flush is remembered, to be put back."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        self.size = os.fstat(self._file).st_size
        self._undo: list[tuple[int, bytes]] = []
        self.idle = threading.Event()
        self.idle.set()

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        self._undo.append((offset, os.pread(self._file, len(data), offset)))
        os.pwrite(self._file, data, offset)

    def flush(self) -> None:
        self._undo.clear()

    def lose(self) -> list[tuple[int, int]]:
        """The power went with all writes since the last flush still in the cache: their offsets and lengths."""
        lost = [(offset, len(data)) for offset, data in self._undo]
        for offset, data in reversed(self._undo):
            os.pwrite(self._file, data, offset)
        self._undo.clear()
        return lost

    def close(self) -> None:
        os.close(self._file)


class Drives:
    """Drives by name, each on a socket of its own."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="camera-vm-")
        self._drives = {name: Drive(path) for name, path in files.items()}
        self.sockets = {name: Path(self._folder.name) / name for name in files}
        self._servers = [_serve(self._drives[name], path) for name, path in self.sockets.items()]

    def settle(self, *, lose: bool) -> dict[str, list[tuple[int, int]]]:
        """After the power has gone: wait for what the drives were at, and put back what is to be lost, which is returned."""
        lost = {}
        for name, drive in self._drives.items():
            drive.idle.wait()
            if lose:
                lost[name] = drive.lose()
            drive.flush()
        return {name: writes for name, writes in lost.items() if writes}

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for drive in self._drives.values():
            drive.close()
        self._folder.cleanup()


def _serve(drive: Drive, path: Path) -> socketserver.ThreadingUnixStreamServer:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            drive.idle.clear()
            try:
                if _greet(self.rfile, self.connection, drive.size):
                    _transmit(self.rfile, self.connection, drive)
            except (OSError, struct.error):
                """QEMU was killed."""
            finally:
                drive.idle.set()

    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def _greet(rfile: BufferedIOBase, peer: socket.socket, size: int) -> bool:
    """Agree on what is served; whether there is anything to do."""
    peer.sendall(HANDSHAKE)
    rfile.read(4)
    while True:
        _, option, length = struct.unpack(">8sII", rfile.read(16))
        rfile.read(length)
        if option == EXPORT_NAME:
            peer.sendall(struct.pack(">QH", size, FLAGS))
            return True
        if option not in (GO, INFO):
            peer.sendall(struct.pack(">QIII", OPTION_REPLY, option, UNSUPPORTED, 0))
            continue
        peer.sendall(struct.pack(">QIIIHQH", OPTION_REPLY, option, EXPORT, 12, 0, size, FLAGS))
        peer.sendall(struct.pack(">QIII", OPTION_REPLY, option, ACKNOWLEDGED, 0))
        if option == GO:
            return True


def _transmit(rfile: BufferedIOBase, peer: socket.socket, drive: Drive) -> None:
    while head := rfile.read(28):
        _, _, kind, handle, offset, length = struct.unpack(">IHHQQI", head)
        error, data = 0, b""
        if kind == READ:
            data = drive.read(offset, length)
        elif kind == WRITE:
            written = rfile.read(length)
            if len(written) < length:
                return
            drive.write(offset, written)
        elif kind == FLUSH:
            drive.flush()
        elif kind == LEAVE:
            return
        else:
            error = EINVAL
        peer.sendall(struct.pack(">IIQ", REPLY, error, handle) + data)
