"""state.db: transactions, durability across kill -9, damage, bounds of the queue."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from agent.errors import StoreError
from agent.store import MIGRATIONS, Store


@pytest.fixture
async def store(tmp_path):
    opened = await Store.open(tmp_path / "state" / "state.db")
    yield opened
    await opened.close()


async def test_facts_survive_and_the_file_is_private(store):
    await store.write(lambda t: t.set_fact("a", {"b": [1, None, "é"]}))
    assert await store.read(lambda t: t.fact("a")) == {"b": [1, None, "é"]}
    assert await store.read(lambda t: t.fact("none", 7)) == 7
    assert store.path.stat().st_mode & 0o777 == 0o600
    await store.close()
    again = await Store.open(store.path)
    assert await again.read(lambda t: t.fact("a")) == {"b": [1, None, "é"]}
    await again.close()
    store.__dict__.update((await Store.open(store.path)).__dict__)


async def test_a_failed_change_leaves_nothing(store):
    def change(tables):
        tables.set_fact("a", 1)
        tables.enqueue("t", b"x", priority=0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.write(change)
    assert await store.read(lambda t: (t.fact("a"), t.queue_size().messages)) == (None, 0)


async def test_journal_keeps_one_record_per_execution(store):
    def change(tables):
        tables.put_job("a", 1, {"n": 1}, finished=True)
        tables.put_job("a", 2, {"n": 2}, finished=False)
        tables.put_job("a", 2, {"n": 3}, finished=False)

    await store.write(change)
    assert await store.read(lambda t: t.job("a")) == {"n": 3}
    assert await store.read(lambda t: t.job("a", 1)) == {"n": 1}
    assert await store.read(lambda t: t.job("b")) is None
    assert await store.read(lambda t: t.jobs(finished=False)) == [{"n": 3}]
    assert len(await store.read(lambda t: t.jobs())) == 2


async def test_pruning_never_forgets_an_unfinished_execution(store):
    def change(tables):
        tables.put_job("open", 1, {"open": True}, finished=False)
        for n in range(20):
            tables.put_job(f"j{n}", 1, {"n": n}, finished=True)
        tables.prune_jobs(5)

    await store.write(change)
    kept = await store.read(lambda t: t.jobs())
    assert {"open": True} in kept
    assert sorted(r["n"] for r in kept if "n" in r) == [15, 16, 17, 18, 19]


async def test_queue_order_and_bounds(store):
    def fill(tables):
        for n in range(10):
            tables.enqueue("t", bytes(100), priority=n % 2)

    await store.write(fill)
    messages = await store.read(lambda t: t.queued(limit=100))
    assert [m.priority for m in messages] == [0] * 5 + [1] * 5
    assert [m.id for m in messages[:5]] == sorted(m.id for m in messages[:5])
    each = 100 + len("t") + 160
    assert (await store.read(lambda t: t.queue_size())).bytes == 10 * each
    trim = {"max_bytes": 7 * each, "max_age_s": 1e9, "clock_believed": True}
    assert await store.write(lambda t: t.trim_queue(**trim)) == {"size": 3}
    left = await store.read(lambda t: t.queued(limit=100))
    assert [m.id for m in left if m.priority == 1] == [8, 10], "the oldest of the least important went first"
    assert len(left) == 7
    assert await store.write(lambda t: t.trim_queue(max_bytes=10**6, max_age_s=-1, clock_believed=False)) == {"age": 7}
    assert (await store.read(lambda t: t.queue_size())).messages == 0
    assert await store.write(lambda t: t.enqueue("t", b"", priority=0)) == 11, "ids are not used again"


async def test_a_damaged_file_is_kept_aside(tmp_path):
    path = tmp_path / "state.db"
    path.write_bytes(b"this is not a database" * 100)
    store = await Store.open(path)
    assert store.quarantined is not None
    assert store.quarantined.read_bytes().startswith(b"this is not")
    await store.write(lambda t: t.set_fact("works", True))
    await store.close()


async def test_a_file_of_a_later_version_can_be_used(tmp_path):
    path = tmp_path / "state.db"
    store = await Store.open(path)
    await store.write(lambda t: t.set_fact("a", 1))
    await store.close()
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        newer.execute("CREATE TABLE later (x)")
    newer.close()
    store = await Store.open(path)
    assert await store.read(lambda t: t.fact("a")) == 1
    await store.close()


async def test_what_cannot_be_opened_is_a_clear_error(tmp_path):
    (tmp_path / "state.db").mkdir()
    with pytest.raises(StoreError, match=r"state\.db"):
        await Store.open(tmp_path / "state.db")


WRITER = """
import asyncio, sys
from pathlib import Path
from agent.store import Store
async def main():
    store = await Store.open(Path(sys.argv[1]))
    n = await store.read(lambda t: t.fact("n", 0))
    while True:
        n += 1
        def change(t):
            t.set_fact("n", n)
            t.put_job("j", n, {"n": n}, finished=False)
        await store.write(change)
        print(n, flush=True)
asyncio.run(main())
"""


async def test_what_was_written_survives_kill_9(tmp_path):
    path, promised = tmp_path / "state.db", 0
    for _ in range(8):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(5):
            promised = int(await child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest, _ = await child.communicate()
        promised = max([promised, *(int(line) for line in rest.split(b"\n")[:-1] if line)])
        store = await Store.open(path)
        n, records = await store.read(lambda t: (t.fact("n"), len(t.jobs(limit=10_000))))
        await store.close()
        assert store.quarantined is None
        assert n >= promised
        assert records == n, "fact and record are of one transaction"


async def test_a_file_without_its_tables_is_kept_aside(tmp_path):
    path = tmp_path / "state.db"
    store = await Store.open(path)
    await store.close()
    with sqlite3.connect(path) as damaged:
        damaged.execute("DROP TABLE jobs")
    damaged.close()
    store = await Store.open(path)
    assert store.quarantined is not None
    await store.write(lambda t: t.put_job("a", 1, {}, finished=False))
    await store.close()


async def test_age_is_counted_by_the_time_since_boot_and_not_by_a_clock_that_jumped(store):
    async def rows(**columns):
        def change(tables):
            message = tables.enqueue("t", b"x", priority=1)
            for column, value in columns.items():
                tables._sql.execute(f"UPDATE outbox SET {column} = ? WHERE id = ?", (value, message))

        await store.write(change)

    await rows(created_at=0.0)  # made in 1970 by the clock, just now in truth
    await rows(uptime=time.monotonic() - 1000)  # old, though the clock says now
    await rows(boot_id="another", created_at=time.time() - 1000)
    await rows(boot_id="another", created_at=0.0, clock_believed=0)
    trim = {"max_bytes": 10**6, "max_age_s": 500}
    assert await store.write(lambda t: t.trim_queue(**trim, clock_believed=False)) == {"age": 1}
    assert [m.id for m in await store.read(lambda t: t.queued(limit=9))] == [1, 3, 4]
    assert await store.write(lambda t: t.trim_queue(**trim, clock_believed=True)) == {"age": 1}
    assert [m.id for m in await store.read(lambda t: t.queued(limit=9))] == [1, 4], (
        "4 was made before the clock was set"
    )


async def test_shares_hold_and_what_is_kept_stays(store):
    def fill(tables):
        for n in range(20):
            tables.enqueue("t", bytes(100), priority=n % 2)

    await store.write(fill)
    each = 100 + len("t") + 160
    trim = {"max_bytes": 8 * each, "max_age_s": 1e9, "clock_believed": True, "shares": {0: 0.75, 1: 0.25}}
    assert await store.write(lambda t: t.trim_queue(**trim, keep=[2])) == {"size": 12}
    left = await store.read(lambda t: t.queued(limit=100))
    assert [m.id for m in left] == [9, 11, 13, 15, 17, 19, 2, 20], "two of the lesser class, one of which is being sent"


async def test_the_queue_grows_to_half_of_what_it_and_the_free_disk_are_and_a_full_disk_never_shrinks_it(store):
    async def queue(count, free_bytes):
        """Queue messages of 1000 bytes one by one; how many wait then, and how many were dropped."""

        def one(tables):
            tables.enqueue("t", bytes(1000 - 161), priority=1)
            trim = {"max_bytes": 2**40, "max_age_s": 1e9, "clock_believed": True}
            return tables.trim_queue(**trim, free_bytes=free_bytes(tables.queue_size().bytes)).get("size", 0)

        def change(tables):
            return sum(one(tables) for _ in range(count))

        dropped = await store.write(change)
        return (await store.read(lambda t: t.queue_size())).messages, dropped

    disk = 200_000
    assert await queue(90, lambda held: disk - held) == (90, 0)
    waiting, dropped = await queue(60, lambda held: disk - held)
    assert 100 <= waiting <= 110, "half of the disk and of what is unused in the file"
    assert dropped == 150 - waiting
    pages = await store.read(lambda t: t._sql.execute("PRAGMA page_count").fetchone()[0])
    again, dropped = await queue(500, lambda _: 0)
    assert waiting <= again <= 110, "others filled the disk: a new message takes the place of the oldest"
    assert dropped == waiting + 500 - again
    assert await store.read(lambda t: t._sql.execute("PRAGMA page_count").fetchone()[0]) <= pages + 2


async def test_a_queue_of_the_least_size_is_kept_on_a_full_disk(store):
    def change(tables):
        for _ in range(100):
            tables.enqueue("t", bytes(1000 - 161), priority=1)
            tables.trim_queue(max_bytes=2**40, max_age_s=1e9, clock_believed=True, free_bytes=0)

    await store.write(change)
    assert 60 <= (await store.read(lambda t: t.queue_size())).messages <= 70


async def test_the_audit_trail_keeps_the_newest_entries_only(store):
    def change(tables):
        for n in range(2100):
            tables.add_audit("shadow", "config.applied", {"version": n})

    await store.write(change)
    entries = await store.read(lambda t: t.audit(limit=5000))
    assert [entry["detail"]["version"] for entry in entries] == list(range(2099, 99, -1))


async def test_the_details_of_the_audit_trail_take_a_mebibyte_at_most(store):
    def change(tables):
        for n in range(300):
            tables.add_audit("shadow", "config.rejected", {"version": n, "why": "x" * 8000})

    await store.write(change)
    entries = await store.read(lambda t: t.audit(limit=5000))
    assert [entry["detail"]["version"] for entry in entries] == list(range(299, 299 - len(entries), -1))
    total = await store.read(lambda t: t._sql.execute("SELECT sum(length(detail)) FROM audit").fetchone()[0])
    assert 2**20 - 8192 < total <= 2**20


@pytest.mark.parametrize(
    "detail",
    [
        {"version": 7, "errors": [{"path": f"a.{n}", "reason": "é" * 200} for n in range(500)], "by": "shadow"},
        {"version": 7, "text": "x" * 20_000, "by": "shadow"},
        {"version": 7, "errors": ["x" * 20_000], "by": "shadow"},
        {"version": 7, "by": "shadow", "many": {str(n): n for n in range(5000)}},
    ],
)
async def test_a_detail_that_is_too_long_for_the_audit_trail_is_cut_and_says_so(store, detail):
    await store.write(lambda t: t.add_audit("shadow", "config.rejected", detail))
    [entry] = await store.read(lambda t: t.audit())
    kept = entry["detail"]
    assert (kept["cut"], kept["version"], kept["by"]) == (True, 7, "shadow")
    assert len(json.dumps(kept)) <= 8192
    errors = kept.get("errors", [])
    assert errors == detail.get("errors", [])[: len(errors)]
    if len(detail.get("errors", [])) > 1:
        assert len(json.dumps(kept)) > 8192 - 2000, "as many as there is room for"


async def test_a_detail_that_fits_is_kept_as_it_is(store):
    detail = {"version": 7, "why": "x" * (8192 - len('{"version": 7, "why": ""}'))}
    await store.write(lambda t: t.add_audit("shadow", "config.applied", detail))
    assert (await store.read(lambda t: t.audit()))[0]["detail"] == detail


async def test_what_went_wrong_with_a_message_is_kept_and_orders_the_backlog(store):
    def fill(tables):
        for n in range(6):
            tables.enqueue("t", b"", priority=0 if n == 5 else 1)
        tables.postpone(6, wait_s=100, losses=1)
        tables.postpone(1, wait_s=0, losses=2)
        tables.postpone(2, wait_s=0, losses=1)
        tables.postpone(3, wait_s=0, failures=1)
        return tables.lost_at_least(2)

    assert await store.write(fill) == 1
    order = []
    while (message := await store.read(lambda t: t.backlog(up_to=4, without=order))) is not None:
        order.append(message.id)
    assert order == [3, 4, 2, 1], "suspects last, the least suspected first; 5 is not backlog, 6 waits"
    assert [m.id for m in await store.read(lambda t: t.queued(limit=9))] == [4, 5]
    for wait_s, due in ((time.monotonic() + 1000, 3), (time.monotonic() / 2, 6)):
        await store.write(
            lambda t: t._sql.execute("UPDATE outbox SET wait_boot_id = 'another', wait_s = ? WHERE id = 6", (wait_s,))
        )
        assert (await store.read(lambda t: t.backlog(up_to=0))).id == due, (
            "after a reboot the pause counts from the boot"
        )


async def test_a_file_of_the_first_version_is_migrated_with_all_that_waits(tmp_path):
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as old:
        old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        old.execute(
            "INSERT INTO outbox (priority, topic, payload, created_at, boot_id, uptime) VALUES (1, 't', x'78', 1, 'b', 1)"
        )
    old.close()
    store = await Store.open(path)
    (message,) = await store.read(lambda t: t.queued(limit=9))
    assert (message.payload, message.losses) == (b"x", 0)
    assert (await store.read(lambda t: t.queue_size())).bytes == 162
    await store.close()


@contextlib.contextmanager
def small_disk(folder):
    """A file system of one MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def put(n):
    """A change too big to find room in a page that is there already."""
    return lambda tables: tables.enqueue("t", b"%d" % n + bytes(9000), priority=1)


async def numbers(store):
    return [int(m.payload.rstrip(b"\0")) for m in await store.read(lambda t: t.queued(limit=99))]


async def failing(store, change):
    """The code of the error with which a write failed."""
    try:
        await store.write(change)
    except StoreError as error:
        return error.code
    return None


PUTTER = """
import asyncio, sys
from pathlib import Path
from agent.store import Store
async def main():
    store = await Store.open(Path(sys.argv[1]))
    for n in range(5):
        await store.write(lambda t: t.enqueue("t", b"%d" % n + bytes(9000), priority=1))
    if sys.argv[2] == "close":
        await store.close()
    print("done", flush=True)
    if sys.argv[2] == "kill -9":
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
@pytest.mark.parametrize("end", ["close", "kill -9"])
@pytest.mark.parametrize("filled", ["after the end", "before the end"])
async def test_a_disk_that_is_full_at_the_start_is_survived_whatever_ended_the_agent(tmp_path, end, filled):
    with small_disk(tmp_path / "disk") as disk:
        path, filler = disk / "state.db", disk / "filler"
        before = await Store.open(path)
        await before.write(lambda t: t.set_fact("a", 1))
        if filled == "before the end" and end == "close":
            for n in range(5):
                await before.write(put(n))
            await asyncio.to_thread(fill, filler)
            await before.close()
        else:
            await before.close()
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PUTTER, str(path), end, stdout=asyncio.subprocess.PIPE
            )
            assert await child.stdout.readline() == b"done\n"
            if filled == "before the end":
                await asyncio.to_thread(fill, filler)
            if end == "kill -9":
                child.kill()
            await child.communicate()
            await asyncio.to_thread(fill, filler)
        starts, kept = 3, 5
        for _ in range(starts):
            store = await Store.open(path)
            assert store.quarantined is None
            assert await store.read(lambda t: t.fact("a")) == 1
            while (code := await failing(store, put(kept))) is None:
                kept += 1
            assert code == "store_full"
            assert await numbers(store) == list(range(kept))
            await store.close()
            await asyncio.to_thread(fill, filler)
        store = await Store.open(path)
        filler.unlink()
        for n in range(kept, kept + 5):
            await store.write(put(n))
        await store.close()
        store = await Store.open(path)
        assert await numbers(store) == list(range(kept + 5))
        await store.close()
        print(f"{starts} starts on a full disk tried after {end}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
async def test_a_disk_without_room_for_a_first_file_and_one_that_is_read_only_are_clear_errors(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        await asyncio.to_thread(fill, disk / "filler")
        with pytest.raises(StoreError) as caught:
            await Store.open(disk / "state.db")
        assert caught.value.code == "store_full"
        (disk / "filler").unlink()
        store = await Store.open(disk / "state.db")
        await store.close()
        await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", disk], check=True)
        for path in (disk / "state.db", disk / "folder" / "state.db"):
            with pytest.raises(StoreError) as caught:
                await Store.open(path)
            assert caught.value.hint
            assert str(path.parent) in caught.value.message


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"job_id": "a"', "\x00"])
async def test_a_damaged_record_of_a_job_is_left_out_and_the_others_are_there(tmp_path, damage):
    path = tmp_path / "state.db"
    store = await Store.open(path)
    for name in ("a", "b"):
        await store.write(lambda t, name=name: t.put_job(name, 1, {"job_id": name}, finished=False))
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE jobs SET record = ? WHERE job_id = 'a'", (damage,))
    store = await Store.open(path)
    assert await store.read(lambda t: t.jobs(finished=False)) == [{"job_id": "b"}]
    assert await store.read(lambda t: t.job("a", 1)) is None
    await store.close()
