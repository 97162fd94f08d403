"""state.db: the journal of jobs, the outbox, facts that must survive, and the audit trail. The only file that opens it.

SQLite in WAL mode with synchronous=FULL: when `write` returns, a power cut no longer undoes it. All access runs on one
thread of its own, so that a slow SD card never stops the event loop. Migrations only ever add tables and columns: an
agent that was rolled back must still be able to work on the file that its successor left.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent.errors import StoreError
from agent.host.clock import boot_id
from agent.logs import get_logger
from agent.schema import MIGRATIONS

T = TypeVar("T")
PASSING = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC")
"""What goes by when there is room on the disk again; anything else needs the file to be opened anew."""
CHECK_THE_DISK = "check free space and the health of the disk it is on"
MESSAGES = (
    "SELECT id, priority, topic, payload, created_at, losses, failures FROM outbox"
    " WHERE id NOT IN (SELECT value FROM json_each(:without))"
    " AND topic NOT IN (SELECT value FROM json_each(:without_topics)) AND "
)
PAUSE_IS_OVER = ":now - CASE wait_boot_id WHEN :boot_id THEN wait_from ELSE 0 END >= wait_s"
MOST_AUDIT_ENTRIES, MOST_AUDIT_BYTES, MOST_DETAIL_BYTES = 2000, 2**20, 8192
LEAST_QUEUE_BYTES = 65536
log = get_logger("store")


@dataclass(frozen=True)
class Message:
    """A queued message: `priority` 0 goes before 1; `created_at` is in epoch seconds.

    How often it was in flight when the connection ended, and was refused or unanswered for now.
    """

    id: int
    priority: int
    topic: str
    payload: bytes
    created_at: float
    losses: int = 0
    failures: int = 0


@dataclass(frozen=True)
class QueueSize:
    """What waits in the outbox: messages, the bytes they take on the disk, and the oldest's time in epoch seconds."""

    messages: int
    bytes: int
    oldest_at: float | None


class Tables:
    """What a transaction can do; handed to the functions given to `Store.read` and `Store.write`, on the store's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = connection

    def fact(self, key: str, default: Any = None) -> Any:
        """The JSON value kept under `key`."""
        row = self._sql.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def facts(self, prefix: str) -> dict[str, Any]:
        """All facts whose keys begin with `prefix`."""
        rows = self._sql.execute("SELECT key, value FROM facts WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
        return {key: json.loads(value) for key, value in rows}

    def set_fact(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`."""
        self._sql.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

    def delete_fact(self, key: str) -> None:
        self._sql.execute("DELETE FROM facts WHERE key = ?", (key,))

    def put_job(self, job_id: str, execution_number: int, record: dict[str, Any], *, finished: bool) -> None:
        """Keep the record of one job execution; `finished` once the cloud has its terminal status."""
        self._sql.execute(
            "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?)",
            (job_id, execution_number, json.dumps(record), finished, time.time()),
        )

    def jobs(self, *, finished: bool | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Job records, the latest first; of unfinished or finished executions only when asked."""
        rows = self._sql.execute(
            "SELECT record FROM jobs WHERE finished = ifnull(?, finished) ORDER BY rowid DESC LIMIT ?",
            (finished, limit),
        )
        return [record for (text,) in rows if (record := _record(text)) is not None]

    def job(self, job_id: str, execution_number: int | None = None) -> dict[str, Any] | None:
        """The record of one execution; of the latest one when no number is given."""
        row = self._sql.execute(
            "SELECT record FROM jobs WHERE job_id = ? AND execution_number = ifnull(?, execution_number)"
            " ORDER BY execution_number DESC LIMIT 1",
            (job_id, execution_number),
        ).fetchone()
        return _record(row[0]) if row else None

    def prune_jobs(self, keep: int) -> None:
        """Forget all but the latest `keep` finished executions."""
        self._sql.execute(
            "DELETE FROM jobs WHERE finished = 1 AND rowid NOT IN"
            " (SELECT rowid FROM jobs WHERE finished = 1 ORDER BY rowid DESC LIMIT ?)",  # replacing gives a new rowid
            (keep,),
        )

    def enqueue(self, topic: str, payload: bytes, *, priority: int, clock_believed: bool = True) -> int:
        """Queue a message and return its id; ids only rise. `clock_believed`: whether the wall clock is right."""
        cursor = self._sql.execute(
            "INSERT INTO outbox (priority, topic, payload, created_at, boot_id, uptime, clock_believed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (priority, topic, payload, time.time(), boot_id(), time.monotonic(), clock_believed),
        )
        return int(cursor.lastrowid or 0)

    def queued(
        self, *, limit: int, after: int = 0, without: Collection[int] = (), without_topics: Collection[str] = ()
    ) -> list[Message]:
        """Messages with `after` < id that nothing went wrong with, by priority, then the oldest first."""
        return self._messages(
            "id > :after AND losses + failures = 0 ORDER BY priority, id LIMIT :limit",
            without,
            without_topics,
            after=after,
            limit=limit,
        )

    def backlog(
        self, *, up_to: int, without: Collection[int] = (), without_topics: Collection[str] = ()
    ) -> Message | None:
        """The next message with id <= `up_to`, or that something went wrong with and whose pause is over.

        By priority; within one those that were in flight when the connection ended come last, the least often first.
        """
        found = self._messages(
            f"(id <= :up_to OR losses + failures > 0) AND {PAUSE_IS_OVER} ORDER BY priority, losses, id LIMIT 1",
            without,
            without_topics,
            up_to=up_to,
        )
        return found[0] if found else None

    def probe(self, topic: str) -> Message | None:
        """The message to try a topic with: of those whose pause is over, the oldest that the least went wrong with."""
        found = self._messages(
            f"topic = :topic AND {PAUSE_IS_OVER} ORDER BY losses + failures, id LIMIT 1", topic=topic
        )
        return found[0] if found else None

    def _messages(
        self, condition: str, without: Collection[int] = (), without_topics: Collection[str] = (), **values: Any
    ) -> list[Message]:
        rows = self._sql.execute(
            MESSAGES + condition,
            {
                "without": json.dumps(list(without)),
                "without_topics": json.dumps(list(without_topics)),
                "now": time.monotonic(),
                "boot_id": boot_id(),
                **values,
            },
        )
        return [Message(*row) for row in rows]

    def postpone(self, message_id: int, *, wait_s: float, losses: int = 0, failures: int = 0) -> None:
        """Count what went wrong with a message, and let it wait from now on; after a reboot, from the boot on."""
        self._sql.execute(
            "UPDATE outbox SET losses = losses + ?, failures = failures + ?,"
            " wait_s = ?, wait_boot_id = ?, wait_from = ? WHERE id = ?",
            (losses, failures, wait_s, boot_id(), time.monotonic(), message_id),
        )

    def newest_queued(self) -> int:
        """The id of the message queued last, 0 when nothing waits."""
        return int(self._sql.execute("SELECT ifnull(max(id), 0) FROM outbox").fetchone()[0])

    def dequeue(self, ids: Iterable[int]) -> None:
        self._sql.executemany("DELETE FROM outbox WHERE id = ?", [(i,) for i in ids])

    def queue_size(self) -> QueueSize:
        row = self._sql.execute("SELECT count(*), ifnull(sum(disk_bytes), 0), min(created_at) FROM outbox").fetchone()
        return QueueSize(*row)

    def lost_at_least(self, losses: int) -> int:
        """How many messages were in flight at the end of `losses` connections or more."""
        return int(self._sql.execute("SELECT count(*) FROM outbox WHERE losses >= ?", (losses,)).fetchone()[0])

    def trim_queue(
        self,
        *,
        max_bytes: int,
        max_age_s: float,
        clock_believed: bool,
        shares: Mapping[int, float] | None = None,
        keep: Collection[int] = (),
        free_bytes: int | None = None,
    ) -> dict[str, int]:
        """Drop messages older than `max_age_s`, then the least important oldest ones above `max_bytes`; how many of `age`, `size`.

        `free_bytes` of the disk bound it further: the queue takes no more than half of what it and they are together.

        `shares` maps priorities to the part of `max_bytes` that more important messages can't take from them; those in
        `keep` stay. Age is counted by the time since boot for messages of this boot, which a wrong clock does not touch,
        and for those of earlier boots by the wall clock, only while it is believed and was when they were made.
        """
        kept = json.dumps(list(keep))
        too_old = self._sql.execute(
            "DELETE FROM outbox WHERE ((boot_id = ? AND uptime < ?) OR (boot_id != ? AND clock_believed AND created_at < ?))"
            " AND id NOT IN (SELECT value FROM json_each(?))",
            (
                boot_id(),
                time.monotonic() - max_age_s,
                boot_id(),
                time.time() - max_age_s if clock_believed else float("-inf"),
                kept,
            ),
        ).rowcount
        sizes = self._sql.execute(
            "SELECT priority, sum(disk_bytes) FROM outbox GROUP BY priority ORDER BY priority DESC"
        ).fetchall()
        held = sum(size for _, size in sizes)
        max_bytes = max_bytes if free_bytes is None else min(max_bytes, self._fair_bytes(held, free_bytes))
        excess = held - max_bytes
        too_much = 0
        for priority, size in sizes:
            if excess <= 0:
                break
            wanted = min(excess, size - (shares or {}).get(priority, 0) * max_bytes)
            dropped, freed = self._drop_oldest(priority, wanted, kept)
            too_much += dropped
            excess -= freed
        return {reason: count for reason, count in (("age", too_old), ("size", too_much)) if count}

    def _fair_bytes(self, held: int, free_bytes: int) -> int:
        """What the queue may take of its disk. Others who fill it make the queue stop growing, never shrink."""
        newest = self._sql.execute("SELECT disk_bytes FROM outbox ORDER BY id DESC LIMIT 1").fetchone() or (0,)
        pages, page_size = (self._sql.execute(f"PRAGMA {of}").fetchone()[0] for of in ("freelist_count", "page_size"))
        unused = pages * page_size  # of the file, which only grows
        return int(max(LEAST_QUEUE_BYTES, held - newest[0], (held + unused + free_bytes) / 2))

    def _drop_oldest(self, priority: int, wanted: float, kept: str) -> tuple[int, int]:
        """Drop the oldest of a class until `wanted` bytes are free; how many, and their bytes."""
        doomed, freed = [], 0
        rows = self._sql.execute(
            "SELECT id, disk_bytes FROM outbox WHERE priority = ? AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY id",
            (priority, kept),
        )
        for message_id, size in rows:
            if freed >= wanted:
                break
            doomed.append(message_id)
            freed += size
        self.dequeue(doomed)
        return len(doomed), freed

    def add_audit(self, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Note who did what to this camera; of the trail the newest 2,000 entries stay, of their details 1 MiB.

        A detail of more than 8 KiB loses what does not fit, lists from their end, and says `cut`.
        """
        self._sql.execute(
            "INSERT INTO audit (at, actor, action, detail) VALUES (?, ?, ?, ?)",
            (time.time(), actor, action, _fitting(detail)),
        )
        self._sql.execute(
            "DELETE FROM audit WHERE id <= (SELECT id FROM audit ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (MOST_AUDIT_ENTRIES,),
        )
        self._sql.execute(
            "DELETE FROM audit WHERE id <= (SELECT max(id) FROM"
            " (SELECT id, sum(length(detail)) OVER (ORDER BY id DESC) AS bytes FROM audit) WHERE bytes > ?)",
            (MOST_AUDIT_BYTES,),
        )

    def audit(self, limit: int = 100) -> list[dict[str, Any]]:
        """The latest entries of the audit trail, the newest first; `at` in epoch seconds."""
        rows = self._sql.execute("SELECT id, at, actor, action, detail FROM audit ORDER BY id DESC LIMIT ?", (limit,))
        return [{"id": r[0], "at": r[1], "actor": r[2], "action": r[3], "detail": json.loads(r[4])} for r in rows]


class Store:
    """The open state.db."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quarantined: Path | None = None
        """Where a damaged file was moved to when this one was opened."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._sql: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Open or create the file at `path`, migrating it. A damaged file is moved aside. Raises StoreError."""
        store = cls(path)
        try:
            await store._call(store._open)
        except BaseException as error:
            store._thread.shutdown(wait=False)
            if isinstance(error, OSError):
                raise StoreError("store_failed", f"{path}: {error}", CHECK_THE_DISK) from error
            raise
        return store

    async def close(self) -> None:
        """Finish what is under way and close the file."""
        await self._call(self._sql.close)
        self._thread.shutdown(wait=False)

    async def read(self, query: Callable[[Tables], T]) -> T:
        """What `query` returns; it sees one consistent state. Raises StoreError."""
        return await self._call(lambda: query(Tables(self._sql)))

    async def write(self, change: Callable[[Tables], T]) -> T:
        """Run `change` in one transaction; durable when this returns, undone when it raises. Raises StoreError."""

        def transaction() -> T:
            with self._sql:
                self._sql.execute("BEGIN IMMEDIATE")
                return change(Tables(self._sql))

        return await self._call(transaction)

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))
        except sqlite3.Error as error:
            code = "store_full" if error.sqlite_errorname in PASSING else "store_failed"
            raise StoreError(code, f"{self.path}: {error}", CHECK_THE_DISK) from error

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._sql = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.quarantined = self.path.with_name(f"{self.path.name}.damaged-{int(time.time())}")
            log.exception("state.db is damaged, starting an empty one", kept_as=str(self.quarantined))
            for suffix in ("", "-wal", "-shm"):
                part = self.path.with_name(self.path.name + suffix)
                if part.exists():
                    part.rename(self.quarantined.with_name(self.quarantined.name + suffix))
            self._sql = self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._connect_as("NORMAL")
        except sqlite3.OperationalError as error:
            # The log's index is a file of its own, which a full disk has no room for; for one process alone it is in memory.
            connection = self._connect_as("EXCLUSIVE")
            log.warning("state.db is open for this process alone: its disk is full or faulty", reason=str(error))
            return connection

    def _connect_as(self, locking_mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA locking_mode = {locking_mode}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
                connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
            _check_tables(connection)
        except BaseException:
            connection.close()
            raise
        self.path.chmod(0o600)
        return connection


def _check_tables(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError when a table is missing, as after a write that was lost."""
    found = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    missing = {"facts", "jobs", "outbox", "audit"} - found
    if missing:
        raise sqlite3.DatabaseError(f"no table {', '.join(sorted(missing))}")


def _record(text: str) -> dict[str, Any] | None:
    """A job's record; None for one that the disk has damaged."""
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    log.error("a journal record can't be read and is not used", record=text[:200])
    return None


def _fitting(detail: Mapping[str, Any]) -> str:
    """An audit entry's detail as JSON of 8 KiB at most."""
    text = json.dumps(detail)
    if len(text) <= MOST_DETAIL_BYTES:
        return text
    short: dict[str, Any] = {"cut": True}
    room = MOST_DETAIL_BYTES - len(json.dumps(short))
    for key, value in detail.items():
        part, size = value, len(json.dumps({key: value}))
        if size > room and isinstance(value, list):
            part, size = [], len(json.dumps({key: []}))
            for item in value:
                size += len(json.dumps(item)) + 2
                if size > room:
                    break
                part.append(item)
            size = len(json.dumps({key: part}))
        if size <= room:
            short[key] = part
            room -= size
    return json.dumps(short)
