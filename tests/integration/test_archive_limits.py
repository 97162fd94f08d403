"""What an archive may cost: memory, blocks of the disk, names and links, however little it says it is."""

import ctypes
import errno
import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from agent.errors import FailedError
from agent.updates import archive as limits
from agent.updates import slots as slots_module
from agent.updates.archive import installed_size, measure
from agent.updates.manifest import Manifest, digest_of
from agent.updates.slots import Slots
from tests.fakes_updates import archive, manifest, member

DIR, SYM, LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
END = bytes(10240)
MIB = 2**20


def described(artifact, *, installed=10_000, **changes):
    return Manifest.model_validate(
        manifest(sha256=digest_of(artifact), size=artifact.stat().st_size, installed_size=installed, **changes)
    )


def header(name, size=0, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = max(size, 0), kind, link
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        raw[124:136] = (256**12 + size).to_bytes(12, "big")
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(**values):
    records = b""
    for key, value in values.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        records += str(length).encode() + rest
    return header("p", len(records), tarfile.XHDTYPE) + padded(records)


def write(path, *parts):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part in (*parts, END):
            file.write(part)
    return path


@pytest.fixture
def app(tmp_path):
    return Slots(tmp_path / "root")


def refusal(app, artifact, *, installed=10_000):
    """The error of an install that leaves nothing behind."""
    with pytest.raises(FailedError) as error:
        app.install(artifact, described(artifact, installed=installed))
    assert list(app.slots.iterdir()) == []
    return error.value


REFUSED = {
    "negative sizes lower the sum": (
        [*(header(f"n{number}", -511) for number in range(600)), header("f", 300_000), padded(os.urandom(300_000))],
        "negative",
    ),
    "negative size in a pax header": ([pax(size="-512"), header("f")], "negative"),
    "component of 256 bytes": ([header("a" * 90), pax(path="b" * 256), header("f")], "too long"),
    "component of 256 bytes in a link": ([pax(linkpath="b" * 256), header("l", kind=SYM, link="x")], "is a link to"),
    "extended headers in a row": ([*(pax(comment="c") for _ in range(2000)), header("f")], "extended headers"),
    "long names in a row": (
        [*(header("n", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"name\0") for _ in range(2000)), header("f")],
        "extended headers",
    ),
    "global headers": (
        [
            part
            for number in range(10)
            for part in (
                header("g", 60_000, tarfile.XGLTYPE) + padded(b"60000 comment=" + b"c" * 59_985 + b"\n"),
                header(f"f{number}"),
            )
        ],
        "64 KiB",
    ),
    "sparse of pax": (
        [pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), header("f", 512), padded(b"9999\n")],
        "sparse",
    ),
    "link to itself": ([header("l", kind=SYM, link="l")], "40 links"),
    "links in a circle": ([header("a", kind=SYM, link="b"), header("b", kind=SYM, link="a")], "40 links"),
    "41 links in a chain": (
        [*(header(f"l{n}", kind=SYM, link=f"l{n - 1}") for n in range(1, 42)), header("l0", kind=SYM, link="x")],
        "40 links",
    ),
    "2,000 links in a chain": (
        [header(f"l{n}", kind=SYM, link=f"l{n - 1}" if n else "x") for n in range(2_000)],
        "40 links",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_for_what_it_would_cost(app, tmp_path, kind):
    parts, words = REFUSED[kind]
    error = refusal(app, write(tmp_path / "a", *parts))
    assert error.code == "archive_refused"
    assert words in error.message


def test_40_links_in_a_chain_are_followed(app, tmp_path):
    artifact = write(tmp_path / "a", *(header(f"l{n}", kind=SYM, link=f"l{n - 1}") for n in range(1, 40)), header("l0"))
    app.install(artifact, described(artifact))
    assert (app.slots / digest_of(artifact) / "l39").read_bytes() == b""


def test_steps_over_all_links_are_bounded(app, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_STEPS", 1000)
    target = "/".join(["."] * 100)
    error = refusal(app, write(tmp_path / "a", *(header(f"l{n}", kind=SYM, link=target) for n in range(20))))
    assert (error.code, "1000 names" in error.message) == ("archive_refused", True)


def test_entries_are_counted_with_implied_folders(app, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ENTRIES", 100)
    deep = [header("/".join(f"{n}{part}" for part in range(20)) + "/f") for n in range(5)]
    error = refusal(app, write(tmp_path / "a", *deep))
    assert (error.code, "100 entries" in error.message) == ("archive_refused", True)
    for count, fits in ((99, True), (100, False)):
        artifact = write(tmp_path / f"{count}", *(header(f"f{n}") for n in range(count)))
        if fits:
            app.install(artifact, described(artifact))
            app.forget(digest_of(artifact))
        else:
            assert refusal(app, artifact).code == "archive_refused"


def test_what_it_takes_on_a_disk_is_measured(tmp_path):
    artifact = archive(
        tmp_path / "a",
        member("d/e/one", b"1"),
        member("d", type=DIR),
        member("more", b"x" * 5000),
        member("again", type=LINK, linkname="more"),
        member("link", type=SYM, linkname="more"),
    )
    contents = measure(artifact)
    assert contents.file_bytes == installed_size(artifact) == 5001
    assert contents.inodes == 6
    assert contents.disk_bytes == (1 + 2 + 7) * 4096


MEASURE = """
import json, sys
from pathlib import Path
from agent.errors import FailedError
from agent.updates.manifest import Manifest
from agent.updates.slots import Slots
import zstandard, hashlib, gzip, tarfile, ctypes

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

artifact, values = Path(sys.argv[1]), Manifest.model_validate(json.loads(sys.argv[2]))
slots = Slots(Path(sys.argv[3]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
try:
    slots.install(artifact, values)
    said = "installed"
except FailedError as error:
    said = error.code
print(json.dumps([said, status("VmHWM") - before]))
"""


def cost(artifact, root, installed):
    """What an install says, and the bytes of memory that it takes, in a process of its own."""
    values = manifest(sha256=digest_of(artifact), size=artifact.stat().st_size, installed_size=installed)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, artifact, json.dumps(values), root], capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout)


def zstd(path, megabytes, window_log):
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, strategy=1, hash_log=17, chain_log=17)
    with path.open("wb") as file, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as out:
        out.write(header("f", megabytes * MIB))
        noise = os.urandom(MIB)
        for _ in range(megabytes):
            out.write(noise)
        out.write(END)
    return path


def long_names(n):
    return header("n", 1000, tarfile.GNUTYPE_LONGNAME) + padded(
        ("/".join([str(n).zfill(240)] + ["y" * 240] * 3) + "/z").encode().ljust(1000, b"\0")
    )


COSTS = {
    "pax comment of 100 MiB": (
        lambda path: write(path, header("p", 100 * MIB, tarfile.XHDTYPE), bytes(100 * MIB), header("f")),
        "archive_refused",
    ),
    "GNU long name of 100 MiB": (
        lambda path: write(path, header("n", 100 * MIB, tarfile.GNUTYPE_LONGNAME), b"a" * (100 * MIB), header("f")),
        "archive_refused",
    ),
    "GNU long link of 100 MiB": (
        lambda path: write(path, header("n", 100 * MIB, tarfile.GNUTYPE_LONGLINK), b"a" * (100 * MIB), header("f")),
        "archive_refused",
    ),
    "zstd, window of 128 MiB": (lambda path: zstd(path, 140, 27), "archive_refused"),
    "zstd, window of 8 MiB": (lambda path: zstd(path, 20, 23), "installed"),
    "as many entries as may be": (
        lambda path: write(path, *(header(f"d{n % 99}/f{n}") for n in range(limits.MAX_ENTRIES - 100))),
        "installed",
    ),
    "long names": (
        lambda path: write(path, *(part for n in range(2_000) for part in (long_names(n), header("f")))),
        "installed",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("kind", COSTS)
def test_memory_stays_small_whatever_is_in_it(tmp_path, kind):
    make, expected = COSTS[kind]
    said, taken = cost(make(tmp_path / "a"), tmp_path / "root", 200 * MIB)
    print(f"{kind}: {said} with {taken / MIB:.1f} MiB more memory, tried")
    assert said == expected
    assert taken < 24 * MIB


def test_a_wide_zstd_window_is_named(app, tmp_path):
    error = refusal(app, zstd(tmp_path / "a", 10, 24), installed=20 * MIB)
    assert error.code == "archive_refused"
    assert "window of more than 8 MiB" in error.message
    assert "--long" in error.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can mount a file system")
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """20,000 files of one byte take 78 MiB of blocks; the signed size says 20 kB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", mount], check=True)
    try:
        for keep_free in (0, -(2**40)):
            app = Slots(mount / "root")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(slots_module, "KEEP_FREE", keep_free)
                artifact = write(tmp_path / "a", *(header(f"f{n}", 1) + padded(b"x") for n in range(20_000)))
                error = refusal(app, artifact, installed=20_000)
            assert (error.code, error.hint) == ("disk_full", "free some space")
        usage = os.statvfs(mount)
        assert usage.f_bfree > usage.f_blocks - 10
    finally:
        subprocess.run(["umount", mount], check=True)


def test_some_room_is_kept_for_others(app, tmp_path, monkeypatch):
    artifact = archive(tmp_path / "a", *(member(f"f{n}", b"1") for n in range(10)))
    for room, fits in ((4096 * 20, False), (4096 * 21, True)):
        monkeypatch.setattr(slots_module, "free_bytes", lambda _, room=room: room + slots_module.KEEP_FREE)
        if fits:
            app.install(artifact, described(artifact))
        else:
            assert refusal(app, artifact).code == "disk_full"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_write_back_fails_the_install(app, tmp_path, monkeypatch, code):
    """The kernel tells of it at the one sync in the end."""

    class Failing:
        def __init__(self, *_, **__):
            pass

        def syncfs(self, _):
            ctypes.set_errno(code)
            return -1

    artifact = archive(tmp_path / "a", member("f", b"1"))
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", Failing)
        if code == errno.EIO:
            with pytest.raises(OSError, match="Input/output") as error:
                app.install(artifact, described(artifact))
            assert error.value.errno == errno.EIO
        else:
            assert refusal(app, artifact).code == "disk_full"
    assert list(app.slots.iterdir()) == []
    app.install(artifact, described(artifact))


def test_without_syncfs_every_file_and_folder_is_synced(app, tmp_path, monkeypatch):
    artifact = archive(
        tmp_path / "a", member("d/f", b"1"), member("g", b"2"), member("l", type=SYM, linkname="nowhere")
    )
    synced = set()
    real = os.fsync

    def fsync(descriptor):
        synced.add(
            os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), app.slots / f"{digest_of(artifact)}.tmp")
        )
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(slots_module, "_sync_file_system", lambda _: False)
    app.install(artifact, described(artifact))
    assert {"d/f", "g", "d", "."} <= synced


def test_a_slot_says_whether_it_was_ever_committed(app, tmp_path):
    made = []
    for number in range(4):
        artifact = archive(tmp_path / f"{number}", member("version", str(number).encode()))
        made.append(described(artifact, version=str(number)))
        app.install(artifact, made[-1])
    first, second, third, fourth = made
    assert not any(app.committed(one.sha256) for one in made)
    app.arm(first.sha256)
    app.clean_up = lambda _: None
    app.commit(first, None)
    assert app.committed(first.sha256)
    app.install(tmp_path / "0", first)
    assert app.committed(first.sha256)
    app.arm(second.sha256)
    assert app.running()[1].version == "1"
    os.utime(app.slots / first.sha256, (1, 1))
    assert app.previous()[1].version == "0"
    record = app.slots / f"{third.sha256}.json"
    assert json.loads(record.read_text())["committed"] is False
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "committed"}))
    assert app.committed(third.sha256)
    assert app.previous()[1].version == "2"
    for text in ("[]", "nothing", '{"committed": "yes"}'):
        (app.slots / f"{fourth.sha256}.json").write_text(text)
        assert not app.committed(fourth.sha256)
    assert not app.committed("e" * 64)
    app.forget(third.sha256)
    assert not app.committed(third.sha256)
