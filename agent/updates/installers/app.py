"""Installer `app`: each version unpacked into its own folder `slots/<digest>`, and the link `current` that says which one runs.

A slot appears under its name only when all of it is on disk; `current` always points to a whole slot. What is known of
a slot stands beside it in `slots/<digest>.json`. Imports the standard library only, zstandard when first needed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, cast

from agent.errors import FailedError
from agent.host.files import fsync_folder, write_atomic
from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed

MAX_ENTRIES = 100_000
MAX_NAME_BYTES = 1024
MAX_DEPTH = 64
OVERHEAD_PER_ENTRY = 4096
ZSTD_MAX_WINDOW = 2**27
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
OURS = re.compile(r"^\.?([0-9a-f]{64})(\.tmp|\.json|\.json\.new)?$")
COPY_BYTES = 2**20
END_MARK = bytes(1024)


class App:
    """The slots below `root`, a folder on one file system that only the agent writes to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slots = root / "slots"
        self.current = root / "current"

    def probe(self, sha256: str) -> Slot:
        if self.verify_running(sha256):
            return "active"
        if (self.slots / sha256).is_dir():
            return "staged"
        return "partial" if (self.slots / f"{sha256}.tmp").exists() else "absent"

    def running(self) -> tuple[str | None, Installed | None]:
        """The text of the link `current` and the record of its slot. Raises FailedError current_not_a_link."""
        try:
            link = str(self.current.readlink())
        except FileNotFoundError:
            return None, None
        except OSError:
            raise FailedError(
                "current_not_a_link", f"{self.current} is not a symbolic link", "move it away; the agent makes the link"
            ) from None
        try:
            record = json.loads((self.slots / f"{Path(link).name}.json").read_bytes())
            return link, Installed(
                str(record["name"]), str(record["version"]), Path(link).name, int(record["security_counter"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return link, None

    def install(self, artifact: Path, manifest: Manifest) -> None:
        """Unpack into `<digest>.tmp`, fsync all of it, rename. Raises FailedError archive_refused, archive_damaged."""
        slot, candidate = self.slots / manifest.sha256, self.slots / f"{manifest.sha256}.tmp"
        if slot.is_dir():
            return
        _make_folders(self.slots)
        _remove_tree(candidate)
        try:
            with _damage_named():
                unpack(artifact, candidate, max_bytes=manifest.installed_size)
            _fsync_tree(candidate)
            self._write_record(manifest.sha256, _record(manifest))
            candidate.rename(slot)
        except BaseException:
            _remove_tree(candidate)
            raise
        fsync_folder(self.slots)
        fsync_folder(self.root)

    def arm(self, sha256: str) -> None:
        if not (self.slots / sha256).is_dir():
            raise FailedError("slot_missing", f"{self.slots / sha256} is not there", "start the job again")
        self._point(f"slots/{sha256}")

    def verify_running(self, sha256: str) -> bool:
        try:
            return self.current.readlink() == Path("slots") / sha256
        except OSError:
            return False

    def commit(self, sha256: str, previous: str | None, record: dict[str, Any]) -> None:
        self._write_record(sha256, record)
        self.clean_up(frozenset({sha256, Path(previous).name} if previous else {sha256}))

    def roll_back(self, previous: str | None) -> None:
        """Point `current` back. Without a version before there was no link, and there is none again."""
        if previous is None:
            self.current.unlink(missing_ok=True)
            fsync_folder(self.root)
            return
        if not (self.root / previous).exists():
            raise FailedError("slot_missing", f"{self.root / previous} is not there", "install a version by a new job")
        self._point(previous)

    def clean_up(self, keep: frozenset[str]) -> None:
        link, _ = self.running()
        kept = {Path(name).name for name in keep} | ({Path(link).name} if link else set())
        with contextlib.suppress(FileNotFoundError):
            for path in list(self.slots.iterdir()):
                match = OURS.match(path.name)
                if match and (match[1] not in kept or match[2] == ".tmp"):
                    self._discard(path)
            fsync_folder(self.slots)

    def forget(self, sha256: str) -> None:
        if self.verify_running(sha256):
            return
        for name in (sha256, f"{sha256}.tmp", f"{sha256}.json"):
            self._discard(self.slots / name)

    def free_space(self) -> Path:
        return self.slots

    def _discard(self, path: Path) -> None:
        """Remove a slot so that a cut half-way leaves nothing that looks whole."""
        if path.is_dir() and not path.name.endswith(".tmp"):
            doomed = path.with_name(f"{path.name}.tmp")
            _remove_tree(doomed)
            path.rename(doomed)
            fsync_folder(self.slots)
            path = doomed
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        elif path.is_symlink() or path.exists():
            path.unlink()

    def _point(self, link: str) -> None:
        self.running()
        candidate = self.root / "current.new"
        candidate.unlink(missing_ok=True)
        candidate.symlink_to(link)
        candidate.rename(self.current)
        fsync_folder(self.root)

    def _write_record(self, sha256: str, record: dict[str, Any]) -> None:
        write_atomic(self.slots / f"{sha256}.json", json.dumps(record).encode(), mode=0o644)


def _record(manifest: Manifest) -> dict[str, Any]:
    return asdict(Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter))


def unpack(artifact: Path, folder: Path, *, max_bytes: int) -> None:
    """Unpack a .tar.gz or .tar.zst into the new folder `folder`. Raises FailedError archive_refused and what the libraries raise.

    Refused: names that are absolute, leave the folder, come twice or lead through a link; links that leave; anything
    but files, folders and links; set-uid and set-gid; more than `max_bytes` of files; too many or too deep names.
    """
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    top = folder.resolve()
    links = []
    for path, member, content in walk(artifact, max_bytes=max_bytes):
        place = top / path
        _make_folders(place.parent)
        if member.isdir():
            place.mkdir(exist_ok=True)
            place.chmod((member.mode & 0o755) | 0o700)
        elif member.issym():
            place.symlink_to(member.linkname)
            links.append(place)
        elif member.islnk():
            os.link(top / _clean(member.linkname), place, follow_symlinks=False)
        else:
            assert content
            _write_file(place, content, (member.mode & 0o755) | 0o600)
    for place in links:
        if not Path(os.path.realpath(place)).is_relative_to(top):
            _refuse(f"the link {place.relative_to(top)} leaves the slot")


def installed_size(artifact: Path) -> int:
    """Bytes of all files in the archive, checked by the same rules. Raises FailedError as `unpack` does."""
    with _damage_named():
        return sum(member.size for _, member, _ in walk(artifact, max_bytes=2**42) if member.isreg())


def walk(artifact: Path, *, max_bytes: int) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo, IO[bytes] | None]]:
    """Each acceptable member with its place in the slot, read as a stream. Raises FailedError archive_refused."""
    kinds: dict[PurePosixPath, str] = {PurePosixPath("."): "folder"}
    explicit: set[PurePosixPath] = set()
    total = 0
    with artifact.open("rb") as raw, _decompressed(raw) as plain:
        bounded = _Bounded(plain, max_bytes)
        with tarfile.open(fileobj=cast("Any", bounded), mode="r|") as archive:
            for count, member in enumerate(archive, start=1):
                bounded.allowance += OVERHEAD_PER_ENTRY
                if count > MAX_ENTRIES:
                    _refuse(f"it has more than {MAX_ENTRIES} entries")
                path = _clean(member.name)
                if path in explicit:
                    _refuse(f"{path} is in it twice")
                explicit.add(path)
                _check(path, member, kinds)
                total += member.size if member.isreg() else 0
                if total > max_bytes:
                    _refuse(f"its files have more than the signed {max_bytes} bytes")
                yield path, member, archive.extractfile(member) if member.isreg() else None
        bounded.read_to_end()


def _check(path: PurePosixPath, member: tarfile.TarInfo, kinds: dict[PurePosixPath, str]) -> None:
    """Refuse what a slot must not hold, and note in `kinds` what stands where."""
    for parent in path.parents:
        if kinds.setdefault(parent, "folder") != "folder":
            _refuse(f"{path} leads through {parent}, which is no folder")
    if member.mode & (stat.S_ISUID | stat.S_ISGID):
        _refuse(f"{path} is set-uid or set-gid")
    if member.isdir():
        kind = "folder"
    elif member.isreg() and not member.issparse():
        kind = "file"
    elif member.issym():
        kind = "link"
        _check_link(path, member.linkname)
    elif member.islnk():
        kind = "file"
        if kinds.get(_clean(member.linkname)) != "file":
            _refuse(f"{path} is a hard link to {member.linkname}, which is no file before it")
    else:
        _refuse(f"{path} is neither file, folder nor link")
    if kinds.setdefault(path, kind) != kind:
        _refuse(f"{path} is in it as a folder and as something else")


def _check_link(path: PurePosixPath, target: str) -> None:
    depth = len(path.parent.parts)
    if not target or target.startswith("/") or "\0" in target or len(os.fsencode(target)) > MAX_NAME_BYTES:
        _refuse(f"{path} is a link to {target!r:.80}")
    for part in target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            _refuse(f"the link {path} leaves the slot")


def _clean(name: str) -> PurePosixPath:
    """`name` as a relative path without `.`, or refused."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        _refuse(f"the name {name!r:.80} leaves the slot")
    if len(os.fsencode(name)) > MAX_NAME_BYTES or len(path.parts) > MAX_DEPTH:
        _refuse(f"the name {name!r:.80} is too long")
    return path


class _Bounded:
    """A reader that ends the unpacking when more comes out than the signed size and the entries so far allow."""

    def __init__(self, source: IO[bytes], max_bytes: int) -> None:
        self._source = source
        self.allowance = max_bytes + 64 * OVERHEAD_PER_ENTRY
        self._tail = b""

    def read(self, size: int) -> bytes:
        if size > 64 * 2**20:
            _refuse("it has a header of more than 64 MiB")
        data = self._source.read(size)
        self.allowance -= len(data)
        if self.allowance < 0:
            _refuse("it unpacks to more than was signed")
        self._tail = (self._tail + data[-len(END_MARK) :])[-len(END_MARK) :]
        return data

    def read_to_end(self) -> None:
        """Read what follows the last entry, so that checksums are compared and the end mark is seen."""
        while self.read(COPY_BYTES):
            pass
        if self._tail != END_MARK:
            _damaged("it ends early")


@contextlib.contextmanager
def _decompressed(raw: IO[bytes]) -> Iterator[Any]:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(GZIP):
        with gzip.GzipFile(fileobj=raw) as plain:
            yield plain
    elif magic == ZSTD:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        with decompressor.stream_reader(raw, read_across_frames=True, closefd=False) as plain:
            yield plain
    else:
        _damaged("it is neither .tar.gz nor .tar.zst")


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Whatever the libraries raise for bad data, as FailedError archive_damaged; errors of the disk stay."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        _damaged(str(error))
    except OSError as error:
        if error.errno is not None:
            raise
        _damaged(str(error))
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        _damaged(str(error))


def _write_file(place: Path, content: IO[bytes], mode: int) -> None:
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, COPY_BYTES)
        os.fchmod(descriptor, mode)
        file.flush()
        os.fsync(descriptor)


def _make_folders(folder: Path) -> None:
    """Make what is missing of a path, readable for all whatever the umask is."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir()
        folder.chmod(0o755)


def _fsync_tree(folder: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
        fsync_folder(Path(place))


def _remove_tree(folder: Path) -> None:
    """Remove a folder also when its own modes forbid it."""

    def permit(remove: Callable[..., Any], path: str, _: Any) -> None:
        Path(path).parent.chmod(0o700)
        remove(path)

    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder, onerror=permit)


def _refuse(why: str) -> NoReturn:
    raise FailedError("archive_refused", f"the archive is refused: {why}", "build it without, and sign it again")


def _damaged(why: str) -> NoReturn:
    raise FailedError("archive_damaged", f"the archive can't be read: {why}", "build it again") from None
