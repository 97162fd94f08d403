"""Archives of what becomes a slot, read as hostile until proven otherwise: .tar.gz and .tar.zst, as a stream.

Imports the standard library only, zstandard when first needed.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, cast

from agent.errors import FailedError

MAX_ENTRIES = 50_000
"""Of files, folders (also those that only stand in names) and links."""
MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
MAX_DEPTH = 64
MAX_EXTENSION_BYTES = 64 * 2**10
MAX_EXTENSIONS = 8
"""Extended headers before one entry."""
MAX_HOPS = 40
"""Links that lead to links, as the kernel has it."""
MAX_STEPS = 1_000_000
"""Names looked at to follow all links of an archive."""
OVERHEAD_PER_ENTRY = 4096
BLOCK_BYTES = 4096
ZSTD_MAX_WINDOW = 2**23
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COPY_BYTES = 2**17
END_MARK = bytes(1024)
EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
HINT = "build it without, and sign it again"


def unpack(artifact: Path, folder: Path, *, max_bytes: int, room: int | None = None) -> None:
    """Unpack a .tar.gz or .tar.zst into the new folder `folder`, not yet durably.

    Raises FailedError archive_refused, disk_full when it takes more than `room` bytes of blocks, and what the libraries
    raise. Refused: names that are absolute, leave the folder, come twice or lead through a link; links that leave or
    lead in circles; anything but files, folders and links; set-uid and set-gid; more than `max_bytes` of files; too
    many, too long or too deep names.
    """
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    top = folder.resolve()
    contents = Contents()
    for path, member, content in walk(artifact, max_bytes=max_bytes, contents=contents):
        if room is not None and contents.disk_bytes > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        place = top / path
        make_folders(place.parent)
        if member.isdir():
            place.mkdir(exist_ok=True)
            place.chmod((member.mode & 0o755) | 0o700)
        elif member.issym():
            place.symlink_to(member.linkname)
        elif member.islnk():
            os.link(top / _clean(member.linkname), place, follow_symlinks=False)
        else:
            assert content
            _write_file(place, content, (member.mode & 0o755) | 0o600)
    _check_links(str(top))


def installed_size(artifact: Path) -> int:
    """Bytes of all files in the archive, checked by the same rules. Raises FailedError as `unpack` does."""
    return measure(artifact).file_bytes


def measure(artifact: Path) -> Contents:
    """What the archive would take on a disk, checked by the same rules; reads all of it. Raises FailedError as `unpack` does."""
    contents = Contents()
    with damage_named():
        for _ in walk(artifact, max_bytes=2**42, contents=contents):
            pass
    return contents


class Contents:
    """What an archive holds, as far as it was read. Names are kept as digests, so that 50,000 take few bytes."""

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._kinds = {self._digest("."): "implied"}
        self.file_bytes = 0
        self._file_blocks = 0
        self._hard_links = 0

    @property
    def inodes(self) -> int:
        return len(self._kinds) - self._hard_links

    @property
    def disk_bytes(self) -> int:
        """With files rounded up to whole blocks, and a block for everything."""
        return (self._file_blocks + len(self._kinds)) * BLOCK_BYTES

    def add(self, path: PurePosixPath, member: tarfile.TarInfo) -> None:
        """Refuse what a slot must not hold, and note what stands where. Raises FailedError archive_refused."""
        self._note_parents(path)
        kind = self._kind(path, member)
        digest = self._digest(str(path))
        before = self._kinds.get(digest)
        if before == "implied" and kind != "folder":
            _refuse(f"{path} is in it as a folder and as something else")
        if before not in (None, "implied"):
            _refuse(f"{path} is in it twice")
        self._kinds[digest] = kind
        if len(self._kinds) > MAX_ENTRIES:
            _refuse(f"it has more than {MAX_ENTRIES} entries, with the folders that only stand in names")
        self._hard_links += member.islnk()
        if member.isreg():
            self.file_bytes += member.size
            self._file_blocks += -(-member.size // BLOCK_BYTES)

    def _digest(self, path: str) -> bytes:
        return hashlib.blake2b(os.fsencode(path), digest_size=16, key=self._key).digest()

    def _note_parents(self, path: PurePosixPath) -> None:
        for parent in path.parents:
            kind = self._kinds.setdefault(self._digest(str(parent)), "new")
            if kind in ("file", "link"):
                _refuse(f"{path} leads through {parent}, which is no folder")
            if kind != "new":
                break
            self._kinds[self._digest(str(parent))] = "implied"

    def _kind(self, path: PurePosixPath, member: tarfile.TarInfo) -> str:
        if member.mode & (stat.S_ISUID | stat.S_ISGID):
            _refuse(f"{path} is set-uid or set-gid")
        if member.isdir():
            return "folder"
        if member.isreg() and not member.issparse():
            return "file"
        if member.issym():
            _check_link(path, member.linkname)
            return "link"
        if not member.islnk():
            _refuse(f"{path} is neither file, folder nor link")
        if self._kinds.get(self._digest(str(_clean(member.linkname)))) != "file":
            _refuse(f"{path} is a hard link to {member.linkname!r:.80}, which is no file before it")
        return "file"


class _Header(tarfile.TarInfo):
    """A header as it is read: refused for what it claims, before anything is read for it."""

    def _proc_member(self, archive: Any) -> Any:
        if self.size < 0:
            _refuse(f"{self.name!r:.80} has a negative size")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        if self.type in EXTENSIONS:
            archive.extensions += 1
            archive.global_bytes += self.size if self.type == tarfile.XGLTYPE else 0
            if self.size > MAX_EXTENSION_BYTES or archive.global_bytes > MAX_EXTENSION_BYTES:
                _refuse(f"it has an extended header of more than {MAX_EXTENSION_BYTES // 2**10} KiB")
            if archive.extensions > MAX_EXTENSIONS:
                _refuse(f"it has more than {MAX_EXTENSIONS} extended headers before one entry")
        return cast("Any", super())._proc_member(archive)  # noqa: SLF001

    def _refuse_sparse(self, *_: Any) -> NoReturn:
        _refuse(f"{self.name!r:.80} is a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Archive(tarfile.TarFile):
    """A stream of entries of which only one is in memory."""

    extensions = 0
    global_bytes = 0

    def entries(self) -> Iterator[tarfile.TarInfo]:
        while member := self.next():
            self.extensions = 0
            yield member
            self.members.clear()  # type: ignore[attr-defined]


def walk(
    artifact: Path, *, max_bytes: int, contents: Contents | None = None
) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo, IO[bytes] | None]]:
    """Each acceptable member with its place in the slot, read as a stream and noted in `contents`. Raises FailedError archive_refused."""
    contents = contents or Contents()
    with artifact.open("rb") as raw, _decompressed(raw) as plain:
        bounded = _Bounded(plain, max_bytes)
        with _Archive.open(fileobj=cast("Any", bounded), mode="r|", tarinfo=_Header) as archive:
            for member in archive.entries():
                bounded.allowance += OVERHEAD_PER_ENTRY
                if member.size < 0:
                    _refuse(f"{member.name!r:.80} has a negative size")
                path = _clean(member.name)
                contents.add(path, member)
                if contents.file_bytes > max_bytes:
                    _refuse(f"its files have more than the signed {max_bytes} bytes")
                yield path, member, archive.extractfile(member) if member.isreg() else None
        bounded.read_to_end()


def _check_link(path: PurePosixPath, target: str) -> None:
    depth = len(path.parent.parts)
    if not target or target.startswith("/") or "\0" in target or _too_long(target):
        _refuse(f"{path} is a link to {target!r:.80}")
    for part in target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            _refuse(f"the link {path} leaves the slot")


def _check_links(top: str) -> None:
    """Follow every link of a whole tree. Raises FailedError archive_refused for one that leaves it or leads in circles."""
    steps = 0
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(f"{top}/{folder}") as found:
            for entry in found:
                path = f"{folder}{entry.name}"
                if entry.is_symlink():
                    steps += _follow(top, path)
                    if steps > MAX_STEPS:
                        _refuse(f"its links lead through more than {MAX_STEPS} names")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(f"{path}/")


def _follow(top: str, link: str) -> int:
    """How many names are looked at to follow the link `link` of the tree `top`."""
    reached: list[str] = []
    ahead = link.split("/")[::-1]
    steps = hops = 0
    while ahead:
        steps += 1
        part = ahead.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not reached:
                _refuse(f"the link {link} leaves the slot")
            reached.pop()
            continue
        reached.append(part)
        try:
            target = os.readlink(f"{top}/{'/'.join(reached)}")  # noqa: PTH115
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                raise
            continue
        hops += 1
        if hops > MAX_HOPS:
            _refuse(f"the link {link} leads through more than {MAX_HOPS} links")
        reached.pop()
        ahead.extend(target.split("/")[::-1])
    return steps


def _clean(name: str) -> PurePosixPath:
    """`name` as a relative path without `.`, or refused."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        _refuse(f"the name {name!r:.80} leaves the slot")
    if _too_long(name) or len(path.parts) > MAX_DEPTH:
        _refuse(f"the name {name!r:.80} is too long")
    return path


def _too_long(name: str) -> bool:
    raw = os.fsencode(name)
    return len(raw) > MAX_NAME_BYTES or any(len(part) > MAX_PART_BYTES for part in raw.split(b"/"))


class _Bounded:
    """A reader that ends the unpacking when more comes out than the signed size and the entries so far allow."""

    def __init__(self, source: IO[bytes], max_bytes: int) -> None:
        self._source = source
        self.allowance = max_bytes + 64 * OVERHEAD_PER_ENTRY
        self._tail = b""

    def read(self, size: int) -> bytes:
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
    """Whatever the libraries raise for bad data, as FailedError archive_damaged or archive_refused; a full disk as disk_full.

    Other errors of the disk stay OSError.
    """
    try:
        yield
    except RecursionError:
        _refuse("it is too deeply nested")
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        _damaged(str(error))
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EMLINK):
            _refuse(f"its names or links are more than the file system takes: {error.strerror}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FailedError("disk_full", f"no room to unpack it: {error.strerror}", "free some space") from None
        if error.errno is not None:
            raise
        _damaged(str(error))
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        if "too much memory" in str(error):
            _refuse(
                f"it was compressed with a window of more than {ZSTD_MAX_WINDOW // 2**20} MiB",
                "compress it without zstd's --long and --ultra (a window of 8 MiB at most), and sign it again",
            )
        _damaged(str(error))


def _write_file(place: Path, content: IO[bytes], mode: int) -> None:
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, COPY_BYTES)
        os.fchmod(descriptor, mode)


def make_folders(folder: Path) -> None:
    """Make what is missing of a path, readable for all whatever the umask is."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir()
        folder.chmod(0o755)


def _refuse(why: str, hint: str = HINT) -> NoReturn:
    raise FailedError("archive_refused", f"the archive is refused: {why}", hint) from None


def _damaged(why: str) -> NoReturn:
    raise FailedError("archive_damaged", f"the archive can't be read: {why}", "build it again") from None
