"""The virtual camera: QEMU without KVM, started by a boot loader of ours, its power cut by SIGKILL."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.vm import boot_loader
from tests.vm.drives import Drives

SLOTS_AND_VARIABLES = ("A", "B", "boot")
"""On an NVMe controller, which takes the kernel's flushes; only raw writes go there."""
DISKS = (*SLOTS_AND_VARIABLES, "data")
"""The file system for data is on virtio: QEMU's NVMe does not keep what NVMe promises of writes with FUA."""
Event = dict[str, Any]
Lost = dict[str, list[tuple[int, int]]]


class Host:
    """What the camera reaches of this machine: orders, and bundles with ranges, over HTTP on the loopback.

    `cut_at` ends a download after so many bytes and puts `cut_here` among the events.
    """

    def __init__(self, folder: Path, events: queue.Queue[Event]) -> None:
        self._order: Event | None = None
        self._start = 0
        self._changed = threading.Condition()
        self.cut_at: int | None = None
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/orders":
                    order = host.take()
                    if order is not None:
                        self._send(200, json.dumps(order).encode(), {})
                    self.close_connection = True
                    return
                path = folder / Path(self.path).name
                content, etag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
                match = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
                if match and self.headers.get("If-Range", etag) == etag:
                    start = int(match[1])
                    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    self._send(206, content[start:], {"ETag": etag, "Content-Range": span})
                else:
                    self._send(200, content, {"ETag": etag})

            def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if host.cut_at is not None and len(content) > host.cut_at:
                    self.wfile.write(content[: host.cut_at])
                    self.wfile.flush()
                    events.put({"event": "cut_here", "point": "half downloaded"})
                    time.sleep(30)
                    self.close_connection = True
                    return
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A camera that is gone in the middle of an answer is what this is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def new_start(self) -> None:
        """What an earlier start of the camera has asked is not answered any more."""
        with self._changed:
            self._order, self._start = None, self._start + 1
            self._changed.notify_all()

    def give(self, order: Event) -> None:
        """To the camera, when it asks."""
        with self._changed:
            self._order = order
            self._changed.notify_all()

    def take(self) -> Event | None:
        """The next order, awaited; None when the camera that asked is gone."""
        with self._changed:
            start = self._start
            self._changed.wait_for(lambda: self._order is not None or self._start != start)
            if self._start != start:
                return None
            order, self._order = self._order, None
            return order

    def close(self) -> None:
        self.new_start()
        self._server.shutdown()
        self._server.server_close()


class Machine:
    """One virtual camera with its disks in `disks`. `events` are what it tells, and `off` when its power has gone."""

    def __init__(self, disks: Path, kernel: Path, port: int, events: queue.Queue[Event], log: Path) -> None:
        self.disks, self.events = disks, events
        self.slot = ""
        self.starts = 0
        self._kernel, self._port, self._log = kernel, port, log
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._drives: Drives | None = None

    @property
    def on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def power_on(self) -> str:
        """Start the slot that the boot loader chooses. Raises ValueError when there is none."""
        self._plug_out()
        self.slot = boot_loader.choose(self.disks / "boot.img")
        self.starts += 1
        self._drives = Drives({name: self.disks / f"{name}.img" for name in DISKS})
        disk = "n1" if self.slot == "A" else "n2"
        command = ["qemu-system-x86_64", "-accel", "tcg,tb-size=512", "-cpu", "max", "-M", "q35", "-m", "1024", "-smp", "1",
                   "-nographic", "-monitor", "none", "-nodefaults", "-no-reboot", "-device", "nvme,id=nvme0,serial=camera",
                   "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
                   "-serial", f"file:{self._log}.{self.starts}", "-serial", "stdio", "-kernel", str(self._kernel),
                   "-append", (f"root=/dev/nvme0{disk} ro rauc.slot={self.slot} console=ttyS0 panic=1 vm.port={self._port}"
                   " mitigations=off")]  # fmt: skip
        for name in DISKS:
            server = f"server.type=unix,server.path={self._drives.sockets[name]}"
            command += ["-drive", f"driver=nbd,{server},export={name},if=none,id={name}", "-device"]
            number = DISKS.index(name) + 1
            nvme = f"nvme-ns,drive={name},bus=nvme0,nsid={number}"
            command.append(nvme if name in SLOTS_AND_VARIABLES else f"virtio-blk-pci,drive={name}")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self.starts), daemon=True)
        self._reader.start()
        return self.slot

    def cut(self, *, lose: bool = False) -> Lost:
        """Take the power away. What the drives had not been given is lost, with `lose` what they had not flushed, too.

        Returns the writes that were lost so: by drive, their offsets and lengths.
        """
        if self._process and self._reader:
            self._process.kill()
            self._process.wait()
            self._reader.join()
        return self._plug_out(lose=lose)

    def _plug_out(self, *, lose: bool = False) -> Lost:
        if self._drives is None:
            return {}
        lost = self._drives.settle(lose=lose)
        self._drives.close()
        self._drives = None
        return lost

    def _read(self, process: subprocess.Popen[str], start: int) -> None:
        assert process.stdout
        for line in process.stdout:
            _, mark, text = line.partition("@@")
            if mark:
                try:
                    self.events.put({**json.loads(text), "start": start})
                except ValueError:
                    self.events.put({"event": "garbled", "words": line, "start": start})
            elif line.strip():
                self.events.put({"event": "said", "words": line.strip(), "start": start})
        process.wait()
        process.stdout.close()
        self.events.put({"event": "off", "start": start})
