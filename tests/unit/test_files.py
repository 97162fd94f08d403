"""Atomic writing and free space on real files."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from agent.host.files import free_bytes, fsync_folder, write_atomic


def test_it_creates_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_atomic(file, b"one")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    write_atomic(file, b"two")
    assert file.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"one")
    file.chmod(0o644)
    write_atomic(file, b"two", mode=0o600)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_an_existing_file_keeps_its_extended_attributes(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"one")
    try:
        os.setxattr(file, "user.note", b"kept")
    except OSError as error:
        pytest.skip(f"this file system has no extended attributes: {error.strerror}")
    write_atomic(file, b"two")
    assert os.getxattr(file, "user.note") == b"kept"


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "state", b"", mode=0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_existing_file_keeps_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"one")
    os.chown(file, 12345, 54321)
    write_atomic(file, b"two")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 54321)


def test_a_left_over_candidate_is_no_obstacle(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / ".state.new").symlink_to(target)
    write_atomic(tmp_path / "state", b"new")
    assert target.read_bytes() == b"precious"
    assert (tmp_path / "state").read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_and_no_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    write_atomic(file, b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_readers_never_see_a_mixture(tmp_path: Path) -> None:
    file = tmp_path / "state"
    contents = [letter * 200_000 for letter in (b"a", b"b")]
    write_atomic(file, contents[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        write_atomic(file, contents[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "state", b"")
    with pytest.raises(FileNotFoundError):
        fsync_folder(tmp_path / "no")


def test_free_bytes_of_what_does_not_exist_yet(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    free = free_bytes(tmp_path / "a" / "b")
    assert abs(free - usage.f_bavail * usage.f_frsize) < 2**30
