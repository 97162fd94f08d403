"""Downloading an artifact with fetch() against curl, in turns, from one local server to one disk; its memory and its writes.

scripts/bench download [MIB] [ROUNDS]. fetch() ends with every byte fsynced and the digest right; curl alone ends with neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("/var/tmp")
WARM_UP = 2**20


class Artifact(socketserver.StreamRequestHandler):
    """Serves `server.path` to whoever asks, up to the length in the request's path."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            length = int(line.split()[1].strip(b"/"))
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "bench"\r\nContent-Length: %d\r\n\r\n' % length)
            with self.server.path.open("rb") as file:
                self.connection.sendfile(file, 0, length)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    path: Path


def serve(path: Path) -> None:
    with Server(("127.0.0.1", 0), Artifact) as server:
        server.path = path
        print(server.server_address[1], flush=True)
        server.serve_forever()


@contextlib.contextmanager
def serving(path: Path) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", str(path)], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def resident(name: str) -> int:
    """`VmRSS` or its peak `VmHWM`, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def written() -> int:
    """Bytes of files that this process has made the kernel write, or will have."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["write_bytes"]) - int(fields["cancelled_write_bytes"])


async def download(base: str, artifact: Path, size: int, folder: Path) -> None:
    """Download once in this process, and print seconds, most memory beyond what there was, and bytes written."""
    from agent import logs
    from agent.updates.fetch import fetch

    logs.configure("json", "error")

    async def none() -> list[str]:
        return []

    async def once(length: int) -> None:
        with artifact.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(min(2**20, length - file.tell())):
                digest.update(block)
        begun.append(time.perf_counter())
        path = await fetch(
            [f"{base}/{length}"],
            sha256=digest.hexdigest(),
            size=length,
            folder=folder,
            patience_s=3600,
            fresh_urls=none,
        )
        begun[-1] = time.perf_counter() - begun[-1]
        path.unlink()

    begun: list[float] = []
    before_all = resident("VmRSS")
    await once(WARM_UP)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    writes = written()
    await once(size)
    figures = {
        "seconds": begun[-1],
        "extra_mib": (resident("VmHWM") - before) / 2**20,
        "with_libraries_mib": (resident("VmHWM") - before_all) / 2**20,
        "written": (written() - writes) / size,
    }
    print(json.dumps(figures))


def fetched(base: str, artifact: Path, size: int, folder: Path) -> dict[str, float]:
    argv = [sys.executable, __file__, "--download", base, str(artifact), str(size), str(folder)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def curl(base: str, size: int, folder: Path, *, safe: bool) -> float:
    """Seconds that `curl -o` takes; `safe`: and then a sync and sha256sum."""
    target = folder / "curl"
    begun = time.perf_counter()
    subprocess.run(["curl", "-sS", "-o", str(target), f"{base}/{size}"], check=True)
    if safe:
        subprocess.run(["sync", str(target)], check=True)
        subprocess.run(["sha256sum", str(target)], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - begun
    target.unlink()
    return took


def settle() -> None:
    """Nothing of one measurement is left to be written during the next."""
    os.sync()


@contextlib.contextmanager
def own_disk(folder: Path, size: int) -> Iterator[tuple[Path, Path] | None]:
    """An ext4 of its own on a loop device, and the device's counters; None where that can't be had."""
    image, place = folder / "disk.img", folder / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        device = subprocess.run(
            ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        subprocess.run(["mount", device, str(place)], check=True)
        try:
            yield place, Path("/sys/block") / Path(device).name / "stat"
        finally:
            subprocess.run(["umount", str(place)], check=True)
    except subprocess.CalledProcessError:
        yield None
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def sectors(counters: Path) -> int:
    return int(counters.read_text(encoding="ascii").split()[6])


def on_own_disk(base: str, artifact: Path, size: int, folder: Path) -> None:
    with own_disk(folder, size + 256 * 2**20) as disk:
        if disk is None:
            print("writes with the file system's own: needs root, losetup and mkfs.ext4")
            return
        place, counters = disk
        time.sleep(2)
        settle()
        before = sectors(counters)
        fetched(base, artifact, size, place)
        settle()
        share = (sectors(counters) - before) * 512 / (size + WARM_UP)
        print(f"  on ext4 of its own, journal and metadata included: {share:.4f} bytes written per byte of artifact")


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) * 2**20
    rounds = int(sys.argv[2] if len(sys.argv) > 2 else 5)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=FOLDER) as name:
        folder = Path(name)
        artifact = folder / "artifact"
        with artifact.open("wb") as file:
            for _ in range(size // 2**20):
                file.write(os.urandom(2**20))
        settle()
        with serving(artifact) as base:
            plain, safe, ours = [], [], []
            for _ in range(rounds):
                plain.append(curl(base, size, folder, safe=False))
                settle()
                safe.append(curl(base, size, folder, safe=True))
                settle()
                ours.append(fetched(base, artifact, size, folder))
                settle()
            report(size, rounds, plain, safe, ours)
            on_own_disk(base, artifact, size, folder)


def report(size: int, rounds: int, plain: list[float], safe: list[float], ours: list[dict[str, float]]) -> None:
    def speed(seconds: list[float]) -> str:
        each = [size / 2**20 / value for value in seconds]
        return f"{statistics.median(each):7.0f} MiB/s  (min {min(each):.0f}, max {max(each):.0f})"

    seconds = [figures["seconds"] for figures in ours]
    print(f"{size // 2**20} MiB from a local server to {FOLDER}, {rounds} rounds in turns, medians:")
    print(f"  fetch(): downloaded, verified, fsynced  {speed(seconds)}")
    print(f"  curl -o                                 {speed(plain)}")
    print(f"  curl -o, sync, sha256sum                {speed(safe)}")
    for what, other in (("curl -o", plain), ("curl -o, sync, sha256sum", safe)):
        ratio = statistics.median(a / b for a, b in zip(other, seconds, strict=True))
        print(f"  fetch() has {ratio:.2f} times the speed of {what}")
    extra = max(figures["extra_mib"] for figures in ours)
    libraries = max(figures["with_libraries_mib"] for figures in ours)
    print(f"  most memory: +{extra:.1f} MiB while downloading; +{libraries:.1f} MiB with the libraries, loaded once")
    share = statistics.median(figures["written"] for figures in ours)
    print(f"  written by the process: {share:.4f} bytes per byte of artifact")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", path]:
            serve(Path(path))
        case ["--download", base, artifact, size, folder]:
            asyncio.run(download(base, Path(artifact), int(size), Path(folder)))
        case _:
            main()
