"""Installer `app` on a real file system: whole slots only, and nothing out of a hostile archive."""

import gzip
import io
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from agent.errors import FailedError
from agent.updates.archive import installed_size
from agent.updates.manifest import Manifest, digest_of
from agent.updates.slots import Slots
from tests.fakes_updates import archive, manifest, member

DIR, SYM, LINK, FIFO, CHAR, BLOCK = (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)


def described(artifact, *, installed=10_000, **changes):
    return Manifest.model_validate(
        manifest(sha256=digest_of(artifact), size=artifact.stat().st_size, installed_size=installed, **changes)
    )


def tree(folder):
    """Everything below a folder: type, mode, link text or content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        what = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (stat.S_IMODE(state.st_mode), what)
    return found


@pytest.fixture
def app(tmp_path):
    return Slots(tmp_path / "root")


def version(tmp_path, number, *members):
    artifact = archive(tmp_path / f"{number}.tar.gz", member("version", str(number).encode()), *members)
    return artifact, described(artifact, version=str(number))


def test_install_arm_commit_roll_back(app, tmp_path):
    first, one = version(tmp_path, 1)
    second, two = version(tmp_path, 2)
    third, three = version(tmp_path, 3)
    assert (app.probe(one.sha256), app.running()) == ("absent", (None, None))
    for artifact, described_as in ((first, one), (second, two)):
        for _ in range(2):
            app.install(artifact, described_as)
        assert app.probe(described_as.sha256) == "staged"
        before, _ = app.running()
        for _ in range(2):
            app.arm(described_as.sha256)
        assert app.probe(described_as.sha256) == "active"
        for _ in range(2):
            app.commit(described_as, before)
    assert app.current.readlink().parts == ("slots", two.sha256)
    assert app.running()[1].version == "2"
    assert app.running()[1].security_counter == 5
    assert app.probe(one.sha256) == "staged"

    app.install(third, three)
    before, _ = app.running()
    app.arm(three.sha256)
    for _ in range(2):
        app.roll_back(before)
        app.clean_up(frozenset({before}))
    assert (app.current / "version").read_text() == "2"
    assert app.probe(three.sha256) == "absent"
    assert app.probe(one.sha256) == "absent"


def record(described_as):
    return {
        "name": described_as.name,
        "version": described_as.version,
        "sha256": described_as.sha256,
        "security_counter": described_as.security_counter,
    }


def test_rolling_back_to_nothing(app, tmp_path):
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    app.arm(one.sha256)
    for _ in range(2):
        app.roll_back(None)
    assert app.running() == (None, None)
    app.clean_up(frozenset())
    assert list(app.slots.iterdir()) == []


def test_a_current_that_is_no_link_is_left_alone(app, tmp_path):
    app.current.mkdir(parents=True)
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    with pytest.raises(FailedError) as error:
        app.arm(one.sha256)
    assert error.value.code == "current_not_a_link"
    assert app.current.is_dir()
    assert not app.current.is_symlink()


def test_a_slot_placed_by_hand_can_be_gone_back_to(app, tmp_path):
    (app.root / "by-hand").mkdir(parents=True)
    app.current.symlink_to("by-hand")
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    before, installed = app.running()
    assert installed is None
    app.arm(one.sha256)
    app.roll_back(before)
    assert app.current.readlink() == Path("by-hand")
    app.clean_up(frozenset({before}))
    assert (app.root / "by-hand").is_dir()


def test_foreign_files_beside_the_slots_stay(app, tmp_path):
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    (app.slots / "notes").write_text("mine")
    (app.slots / ("e" * 64 + ".tmp")).mkdir()
    app.clean_up(frozenset())
    assert [p.name for p in app.slots.iterdir()] == ["notes"]


def test_forget_leaves_what_runs(app, tmp_path):
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    app.arm(one.sha256)
    app.forget(one.sha256)
    assert app.probe(one.sha256) == "active"
    app.roll_back(None)
    app.forget(one.sha256)
    assert list(app.slots.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_an_honest_archive_becomes(app, tmp_path, umask):
    artifact = archive(
        tmp_path / "a.tar.gz",
        member("./", type=DIR, mode=0o700),
        member("./bin/run", b"#!/bin/sh\n", mode=0o777),
        member("bin/again", type=LINK, linkname="./bin/run"),
        member("lib", type=DIR, mode=0o777),
        member("lib/data", b"x" * 100, mode=0o666),
        member("lib/link", type=SYM, linkname="../bin/run"),
        member("here", type=SYM, linkname="lib/./link"),
        member("dangling", type=SYM, linkname="later"),
        member("größe", b"1"),
    )
    before = os.umask(umask)
    try:
        app.install(artifact, described(artifact))
    finally:
        os.umask(before)
    assert tree(app.slots / digest_of(artifact)) == {
        "bin": (0o755, "folder"),
        "bin/run": (0o755, b"#!/bin/sh\n"),
        "bin/again": (0o755, b"#!/bin/sh\n"),
        "lib": (0o755, "folder"),
        "lib/data": (0o644, b"x" * 100),
        "lib/link": (0o777, "../bin/run"),
        "here": (0o777, "lib/link"),
        "dangling": (0o777, "later"),
        "größe": (0o644, b"1"),
    }
    assert installed_size(artifact) == 10 + 100 + 1
    assert stat.S_IMODE(app.slots.stat().st_mode) == 0o755


def test_zstd(app, tmp_path):
    plain = archive(tmp_path / "a.tar", member("a", b"x" * 5000), compressed=False)
    artifact = tmp_path / "a.tar.zst"
    artifact.write_bytes(zstandard.compress(plain.read_bytes()))
    app.install(artifact, described(artifact))
    assert (app.slots / digest_of(artifact) / "a").read_bytes() == b"x" * 5000


def test_archives_of_the_real_tar(app, tmp_path):
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / ("long" * 50)).write_text("long name")
    (source / "deep" / "link").symlink_to("er")
    subprocess.run(["tar", "czf", tmp_path / "a.tgz", "-C", source, "."], check=True)
    app.install(tmp_path / "a.tgz", described(tmp_path / "a.tgz"))
    assert {k: v[1] for k, v in tree(app.slots / digest_of(tmp_path / "a.tgz")).items()} == {
        k: v[1] for k, v in tree(source).items()
    }


HOSTILE = {
    "parent": [member("../evil", b"x")],
    "parent inside": [member("a/../../evil", b"x")],
    "dots that stay": [member("a/../b", b"x")],
    "absolute": [member("/tmp/evil", b"x")],
    "link out": [member("a", type=SYM, linkname="../../etc")],
    "absolute link": [member("a", type=SYM, linkname="/etc/passwd")],
    "empty link": [member("a", type=SYM, linkname="")],
    "link out and back": [member("a", type=SYM, linkname="../{tmp}/b")],
    "link through links": [
        member("a", type=SYM, linkname="."),
        member("b", type=SYM, linkname="a/a/a/../../.."),
    ],
    "through a link": [member("a", type=SYM, linkname="."), member("a/evil", b"x")],
    "through a file": [member("a", b"x"), member("a/evil", b"x")],
    "link over a folder": [member("a/b", b"x"), member("a", type=SYM, linkname="c")],
    "file over a link": [member("a", type=SYM, linkname="b"), member("a", b"x")],
    "hard link out": [member("a", type=LINK, linkname="../../x")],
    "hard link absolute": [member("a", type=LINK, linkname="/etc/passwd")],
    "hard link to nothing": [member("a", type=LINK, linkname="b")],
    "hard link to a link": [member("s", type=SYM, linkname="b"), member("a", type=LINK, linkname="s")],
    "character device": [member("a", type=CHAR)],
    "block device": [member("a", type=BLOCK)],
    "fifo": [member("a", type=FIFO)],
    "set-uid": [member("a", b"x", mode=0o4755)],
    "set-gid": [member("a", b"x", mode=0o2755)],
    "set-gid folder": [member("a", type=DIR, mode=0o2755)],
    "twice": [member("a", b"x"), member("./a", b"y")],
    "folder twice": [member("a", type=DIR), member("a/", type=DIR)],
    "too big": [member("a", b"x" * 9_000), member("b", b"x" * 1_001)],
    "too deep": [member("a/" * 65 + "b", b"x")],
    "long name": [member("a" * 1025, b"x")],
    "sparse": [member("a", type=tarfile.GNUTYPE_SPARSE)],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_change_nothing(app, tmp_path, kind):
    good, one = version(tmp_path, 1)
    app.install(good, one)
    app.arm(one.sha256)
    before = tree(tmp_path)
    artifact = archive(tmp_path / "hostile", member("honest", b"1"), *HOSTILE[kind])
    content = artifact.read_bytes()
    with pytest.raises(FailedError) as error:
        app.install(artifact, described(artifact))
    artifact.unlink()
    assert error.value.code == "archive_refused", error.value.message
    assert tree(tmp_path) == before
    if kind not in ("too big", "link through links"):
        artifact.write_bytes(content)
        with pytest.raises(FailedError):
            installed_size(artifact)


def test_bombs(app, tmp_path):
    """Much zero padding, and a header that claims gigabytes, both stop early."""
    padded = io.BytesIO()
    with tarfile.open(fileobj=padded, mode="w:gz") as tar:
        for number in range(40):
            info, content = member(f"f{number}", b"")
            info.pax_headers = {"comment": "c" * 200_000}
            tar.addfile(info, io.BytesIO(content))
    artifact = tmp_path / "pax"
    artifact.write_bytes(padded.getvalue())
    with pytest.raises(FailedError) as error:
        app.install(artifact, described(artifact))
    assert error.value.code == "archive_refused"
    claims = tarfile.TarInfo("x")
    claims.type, claims.size = tarfile.XHDTYPE, 2**33
    artifact.write_bytes(gzip.compress(claims.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    with pytest.raises(FailedError):
        app.install(artifact, described(artifact))
    assert list(app.slots.iterdir()) == []


def test_cut_short_or_damaged_archives_change_nothing(app, tmp_path):
    whole = archive(tmp_path / "a", member("a", os.urandom(5000)), member("b", os.urandom(3000))).read_bytes()
    squeezed = zstandard.compress(gzip.decompress(whole))
    artifact, refused = tmp_path / "cut", 0
    cuts = [(data[: len(data) * part // 10]) for data in (whole, squeezed) for part in range(1, 10)]
    flips = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(100, len(whole) - 8, 900)]
    for data in [*cuts, *flips, b"PK\x03\x04zip", os.urandom(100)]:
        artifact.write_bytes(data)
        with pytest.raises(FailedError) as error:
            app.install(artifact, described(artifact))
        assert error.value.code in ("archive_damaged", "archive_refused")
        refused += 1
        assert list(app.slots.iterdir()) == []
    print(f"{refused} damaged archives refused")


def in_a_child(act, *, killed_at):
    """Run `act` in a forked process that ends at its n-th mutating call; True when it came to its end before."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def counting(real):
            def call(*arguments, **keywords):
                calls[0] += 1
                if calls[0] == killed_at:
                    os._exit(9)
                return real(*arguments, **keywords)

            return call

        for name in ("mkdir", "rename", "symlink", "unlink", "fsync", "open", "link", "rmdir", "chmod", "fchmod"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            act()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_killed_at_every_mutating_call(tmp_path):
    """What `current` points to is whole after a kill at each call, and doing it all again ends well."""
    first, one = version(tmp_path, 1)
    second, two = version(tmp_path, 2, member("d/data", b"2" * 100), member("l", type=SYM, linkname="d"))
    whole = {"1": {"version"}, "2": {"version", "d", "d/data", "l"}}
    points, ended = 0, False
    while not ended:
        app = Slots(tmp_path / f"root{points}")
        app.install(first, one)
        app.arm(one.sha256)
        previous, _ = app.running()

        def act(app=app, previous=previous):
            app.install(second, two)
            app.arm(two.sha256)
            app.roll_back(previous)
            app.clean_up(frozenset({previous}))
            app.install(second, two)
            app.arm(two.sha256)
            app.commit(two, previous)

        ended = in_a_child(act, killed_at=points + 1)
        for slot in app.slots.iterdir():
            if slot.is_dir() and slot.suffix != ".tmp":
                assert set(tree(slot)) == whole[(slot / "version").read_text()]
        assert (app.current / "version").read_text() in whole
        act()
        assert (app.current / "version").read_text() == "2"
        assert not [p for p in app.slots.iterdir() if p.suffix == ".tmp"]
        points += not ended
    print(f"killed at {points} calls")
    assert points > 40


def test_forgetting_leaves_nothing_of_what_two_cuts_left(app, tmp_path):
    artifact, one = version(tmp_path, 1)
    app.install(artifact, one)
    slot = app.slots / one.sha256
    slot.rename(slot.with_name(f"{one.sha256}.tmp"))
    (app.slots / f".{one.sha256}.json.new").touch()
    app.forget(one.sha256)
    assert list(app.slots.iterdir()) == []
