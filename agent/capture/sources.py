"""Watching a folder that a capture pipeline writes into: every finished image is seen once. Owner of asyncinotify.

A file counts when it is renamed into place or closed after writing. Files in a folder that appeared while running, and
those that an overflow of the kernel's queue or a file system without events hid, are found by looking and count after two
seconds without a change. Where inotify can't be used the folder is polled.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agent.capture.folders import Found, ImageFile, Sightings, eligible, images, live_folders, look, on_network
from agent.host.threads import leavable
from agent.logs import get_logger

if TYPE_CHECKING:
    from asyncinotify import Event, Inotify, Watch

log = get_logger("capture")

SETTLE_S = 2.0
RECONCILE_S = 60.0
MISSING_S = 1.0
MOVE_S = 0.2
SLACK_S = 5.0
POLL_SLACK_S = 60.0
EVENTS_PER_TURN = 2048
FILES_PER_TURN = 256
SHARE_OF_TIME = 100
"""Looking through folders takes at most one part in this of the time."""

MOVED_FROM, MOVED_TO, CREATE, CLOSE_WRITE = 0x40, 0x80, 0x100, 0x8
DELETE_SELF, MOVE_SELF, UNMOUNT, OVERFLOW, IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
ONLY_DIRECTORY, IS_DIRECTORY = 0x1000000, 0x40000000


class FolderTree:
    """The state of one watched folder. Blocking; `turn` may be called from any thread, but from one at a time."""

    def __init__(self, directory: Path, pattern: str, *, poll: bool = False, poll_s: float = 1.0) -> None:
        self.state: Literal["missing", "watching", "polling"] = "missing"
        self.overflows = 0
        self._directory = directory
        self._root = str(directory)
        self._pattern = pattern
        self._poll = poll
        self._poll_s = poll_s
        self._inotify: Inotify | None = None
        self._identity: tuple[int, int] | None = None
        self._watches: dict[str, Watch] = {}
        self._folders: dict[str, int] = {}
        self._new: dict[str, None] = {}
        self._pending: dict[str, tuple[ImageFile, float]] = {}
        self._moved: dict[int, tuple[int, bool]] = {}
        self._seen = Sightings()
        self._more = False
        self._turn = 0
        self._turned_at = 0.0
        self._looked_at = time.monotonic()
        self._look_due = self._looked_at
        self._newest = 0.0
        self._offset = time.time() - self._looked_at
        self._ready: dict[str, float] = {}  # path, and for how many seconds it has been known

    @property
    def descriptor(self) -> int | None:
        """The descriptor that becomes readable when there is something to do, None when there is none."""
        return self._inotify.fd if self._inotify else None

    def due(self) -> float:
        """When `turn` must be called without an event, in monotonic seconds."""
        if self._ready or self._new or self._more:
            return 0.0
        times = [self._look_due, *(deadline for _, deadline in self._pending.values())]
        if self._moved:
            times.append(self._turned_at + MOVE_S)
        return min(times)

    def close(self) -> None:
        """Let go of the kernel's watch; the next `turn` begins anew."""
        if self._inotify:
            self._inotify.close()
        self._inotify = None
        self._watches.clear()
        self._new.clear()
        self._identity = None
        self.state = "missing"

    def turn(self) -> list[Found]:
        """What arrived since the last call, at most some hundreds of files."""
        self._turn += 1
        now = self._turned_at = time.monotonic()
        if self._identity is None and not self._open(now):
            return self._take(now)
        if self._inotify:
            self._drain(self._inotify)
        if self._identity is None:
            return self._take(now)
        self._resolve_moves()
        while self._new and len(self._pending) < EVENTS_PER_TURN:
            folder = next(iter(self._new))
            del self._new[folder]
            self._enter(folder, now)
        self._settle(now)
        if now >= self._look_due and self._identity is not None:
            self._look(now)
        return self._take(now)

    def _open(self, now: float) -> bool:
        self._look_due = now + MISSING_S
        try:
            facts = self._directory.stat()
            folders = live_folders(self._root, time.time())
        except OSError:
            folders = {}
        if not folders or not stat.S_ISDIR(facts.st_mode):
            self.state = "missing"
            return False
        if not self._poll and not on_network(self._root):
            self._start_inotify()
        self._identity = (facts.st_dev, facts.st_ino)
        self.state = "watching" if self._inotify else "polling"
        for folder in folders:
            self._watch(folder)
        since = self._wall(self._looked_at, now)
        self._scan(folders, now, lambda file: file.changed >= since)
        self._folders = folders
        self._looked_at = now
        self._look_due = now + (RECONCILE_S if self._inotify else self._poll_s)
        return True

    def _start_inotify(self) -> None:
        from asyncinotify import Inotify

        try:
            self._inotify = Inotify(sync_timeout=0)
        except OSError as error:
            log.warning("no inotify instance left, polling instead", folder=self._root, error=str(error))
            return
        os.set_blocking(self._inotify.fd, False)

    def _watch(self, folder: str) -> None:
        if self._inotify is None or folder in self._watches:
            return
        from asyncinotify import Mask

        wanted = MOVED_FROM | MOVED_TO | CREATE | CLOSE_WRITE | DELETE_SELF | MOVE_SELF | ONLY_DIRECTORY
        try:
            self._watches[folder] = self._inotify.add_watch(folder, Mask(wanted))
            self._watches[folder].path = Path(folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                log.warning("no inotify watch left, polling instead", folder=self._root, error=str(error))
                self._inotify.close()
                self._inotify = None
                self._watches.clear()
                self.state = "polling"
                self._look_due = 0.0
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
                log.warning("folder can't be watched", folder=ascii(folder), error=str(error))

    def _unwatch(self, folder: str) -> None:
        inside = folder + os.sep
        for path in [path for path in self._watches if path == folder or path.startswith(inside)]:
            watch = self._watches.pop(path)
            self._folders.pop(path, None)
            if self._inotify:
                with suppress(OSError):
                    self._inotify.rm_watch(watch)

    def _drain(self, inotify: Inotify) -> None:
        self._more = False
        for _ in range(EVENTS_PER_TURN):
            event = inotify.sync_get()
            if event is None:
                return
            self._handle(event)
            if self._identity is None:
                return
        self._more = True

    def _handle(self, event: Event) -> None:
        mask = int(event.mask)
        if mask & OVERFLOW:
            self.overflows += 1
            self._look_due = 0.0
            self._folders = {}
            return
        watch = event.watch
        if watch is None:
            return
        folder = str(watch.path)
        current = self._watches.get(folder) is watch
        if mask & (IGNORED | DELETE_SELF | MOVE_SELF | UNMOUNT):
            if current and folder == self._root:
                self.close()
                self._look_due = 0.0
            elif current and mask & IGNORED:
                del self._watches[folder]
            return
        if event.name is None or not current:
            return
        name = str(event.name)
        path = f"{folder}{os.sep}{name}"
        if mask & IS_DIRECTORY:
            if mask & MOVED_FROM:
                self._unwatch(path)
            elif mask & (CREATE | MOVED_TO) and not name.startswith("."):
                self._new[path] = None
        elif eligible(name, self._pattern):
            self._handle_file(path, mask, event.cookie)

    def _handle_file(self, path: str, mask: int, cookie: int) -> None:
        if mask & MOVED_FROM:
            uncounted = path in self._ready or path in self._pending
            self._ready.pop(path, None)
            self._pending.pop(path, None)
            self._moved[cookie] = (self._turn, uncounted)
        elif mask & (MOVED_TO | CLOSE_WRITE):
            self._pending.pop(path, None)
            counted = mask & MOVED_TO and not self._moved.pop(cookie, (0, True))[1]
            if not counted:
                self._ready[path] = 0.0

    def _resolve_moves(self) -> None:
        """An image that was moved out of the tree before it was looked at did arrive."""
        for cookie, (turn, uncounted) in list(self._moved.items()):
            if turn < self._turn:
                del self._moved[cookie]
                if uncounted:
                    self._ready[f"{self._root}{os.sep}(moved away {cookie})"] = 0.0

    def _enter(self, folder: str, now: float) -> None:
        """Watch a new folder and those below it first, then look what is already in them."""
        try:
            below = live_folders(folder, time.time())
        except OSError:
            return
        for path in below:
            self._watch(path)
        # Folders made between the first listing and the watch are found by the second.
        with suppress(OSError):
            for path in live_folders(folder, time.time()):
                if path not in below:
                    self._new[path] = None
        since = self._wall(self._looked_at, now) - SLACK_S
        self._scan(below, now, lambda file: file.changed >= since)
        self._folders |= below

    def _scan(
        self, folders: Iterable[str], now: float, wanted: Callable[[ImageFile], bool], *, remember: bool = False
    ) -> None:
        wall = time.time()
        for folder in folders:
            for file in images(folder, self._pattern):
                self._newest = max(self._newest, file.changed)
                if file.key in self._seen or file.path in self._ready or file.path in self._pending:
                    continue
                if not wanted(file):
                    if remember or not self._inotify:
                        self._seen.add(file.key, self._stamp(file), now)
                elif self._inotify and wall - file.changed > SETTLE_S:
                    self._ready[file.path] = 0.0
                else:
                    self._pending[file.path] = (file, now + SETTLE_S)

    def _settle(self, now: float) -> None:
        for path, (before, deadline) in list(self._pending.items()):
            if deadline > now:
                continue
            del self._pending[path]
            try:
                file = look(path)
            except OSError:
                file = before
            if file and (file.key, file.size) == (before.key, before.size):
                self._ready[path] = SETTLE_S
            elif file:
                self._pending[path] = (file, now + SETTLE_S)

    def _look(self, now: float) -> None:
        """Find what gave no event: in folders that changed since they were last listed, and in the two newest."""
        begun = time.thread_time()
        try:
            facts = self._directory.stat()
            folders = live_folders(self._root, time.time())
        except OSError:
            folders = {}
        if not folders or (facts.st_dev, facts.st_ino) != self._identity:
            self.close()
            self._look_due = now + MISSING_S
            return
        for path in self._watches.keys() - folders.keys():
            self._unwatch(path)
        unknown = [path for path in folders if path not in self._folders and path not in self._watches]
        for path in folders:
            self._watch(path)
        since = self._wall(self._looked_at, now) - SLACK_S
        offset = time.time() - now
        if offset < self._offset - 1:
            # The clock was set back: files known so far now seem to come from the future, and would count again.
            self._scan(folders, now, lambda _: False, remember=True)
        self._offset = offset
        newest = sorted(folders, key=lambda path: folders[path])[-2:]
        changed = [path for path in folders if self._folders.get(path) != folders[path] or path in newest]
        if self._inotify:
            known = [path for path in changed if path not in unknown]
            self._scan(unknown, now, lambda file: file.changed >= since)
            self._scan(known, now, lambda file: file.mtime >= since)
            oldest = since
        else:
            # The file system's own times: the clock of a file server may differ from ours.
            oldest = min(since, self._newest - POLL_SLACK_S) if self._newest else since
            self._scan(changed, now, lambda file: file.changed >= oldest)
        self._seen.forget(oldest, now)
        self._folders = folders
        self._looked_at = now
        cost = time.thread_time() - begun
        self._look_due = now + max(RECONCILE_S if self._inotify else self._poll_s, cost * SHARE_OF_TIME)

    def _stamp(self, file: ImageFile) -> float:
        return file.mtime if self._inotify else file.changed

    def _take(self, now: float) -> list[Found]:
        wall = time.time()
        found: list[Found] = []
        for path in list(self._ready)[:FILES_PER_TURN]:
            known_s = self._ready.pop(path)
            try:
                file = look(path)
            except OSError:
                found.append(Found(path, now, wall, vanished=True))
                continue
            if file is None or file.key in self._seen:
                continue
            self._seen.add(file.key, self._stamp(file), now)
            found.append(Found(path, now, wall - known_s, file.size, file.mtime))
        return found

    @staticmethod
    def _wall(then: float, now: float) -> float:
        """The wall clock's time at the monotonic time `then`, by today's setting of the clock."""
        return time.time() - (now - then)


class FolderSource:
    """A folder as a stream of arrivals; keeps file work off the event loop."""

    def __init__(self, directory: Path, pattern: str, *, poll: bool = False, poll_s: float = 1.0) -> None:
        self.tree = FolderTree(directory, pattern, poll=poll, poll_s=poll_s)
        self._turning = self._closed = False

    async def next(self, timeout_s: float) -> list[Found]:
        """What arrived, at once when something has; an empty list after `timeout_s` seconds without."""
        delay = min(timeout_s, self.tree.due() - time.monotonic())
        readable = await self._readable(delay) if delay > 0 else True
        if not readable and self.tree.due() > time.monotonic():
            return []
        self._turning = True
        return await leavable(self._turn)

    async def close(self) -> None:
        """Let go of the kernel's watch; a thread that hangs in the folder does so at its end."""
        self._closed = True
        if not self._turning:
            await leavable(self.tree.close)

    def _turn(self) -> list[Found]:
        try:
            return self.tree.turn()
        finally:
            self._turning = False
            if self._closed:
                self.tree.close()

    async def _readable(self, timeout_s: float) -> bool:
        descriptor = self.tree.descriptor
        if descriptor is None:
            await asyncio.sleep(timeout_s)
            return False
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(descriptor, ready.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ready.wait()
            return True
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)
