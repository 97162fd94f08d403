"""Archives of what becomes a slot, read as hostile until proven otherwise: .tar.gz and .tar.zst, as a stream.

Imports the standard library only, zstandard when first needed.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, cast

from agent.errors import FailedError

MAX_ENTRIES = 100_000
MAX_NAME_BYTES = 1024
MAX_DEPTH = 64
OVERHEAD_PER_ENTRY = 4096
ZSTD_MAX_WINDOW = 2**27
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COPY_BYTES = 2**20
END_MARK = bytes(1024)


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
        make_folders(place.parent)
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
    with damage_named():
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
def damage_named() -> Iterator[None]:
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


def make_folders(folder: Path) -> None:
    """Make what is missing of a path, readable for all whatever the umask is."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir()
        folder.chmod(0o755)


def _refuse(why: str) -> NoReturn:
    raise FailedError("archive_refused", f"the archive is refused: {why}", "build it without, and sign it again")


def _damaged(why: str) -> NoReturn:
    raise FailedError("archive_damaged", f"the archive can't be read: {why}", "build it again") from None
