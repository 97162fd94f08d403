"""Folders that a pipeline really writes into, with real JPEGs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFilter

from agent.capture import alarms, sources
from agent.capture import capture as captures
from agent.capture.capture import Capture
from agent.capture.folders import Found, live_folders
from agent.capture.reading import analyse, examine
from agent.capture.sources import FolderSource
from agent.host import threads
from agent.settings import Capture as CaptureSettings
from agent.settings import CaptureSource
from agent.store import Store

LIMIT_S = 30


def picture(seed: int = 0, blur: float = 0, level: float = 1.0, size: tuple[int, int] = (640, 480)) -> bytes:
    draw_from = random.Random(1)
    image = Image.new("L", size, 90)
    draw = ImageDraw.Draw(image)
    for _ in range(400):
        x, y = draw_from.randrange(size[0]), draw_from.randrange(size[1])
        draw.rectangle(
            (x, y, x + draw_from.randrange(3, 40), y + draw_from.randrange(3, 40)), fill=draw_from.randrange(256)
        )
    draw.point((seed % size[0], seed // size[0] % size[1]), fill=(seed * 37) % 256)
    draw.rectangle((0, 0, 8, 8), fill=(seed * 61) % 256)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    out = io.BytesIO()
    image.point(lambda value: int(value * level)).convert("RGB").save(out, "JPEG", quality=85)
    return out.getvalue()


def put(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.rename(path)


class Collected:
    def __init__(self, source: FolderSource) -> None:
        self.source = source
        self.found: list[Found] = []
        self._changed = asyncio.Event()

    async def collect(self) -> None:
        while True:
            self.found += await self.source.next(0.2)
            self._changed.set()

    async def until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        async with asyncio.timeout(limit_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def arrived(self, count: int) -> None:
        await self.until(lambda: len(self.found) >= count)

    @property
    def names(self) -> list[str]:
        return [Path(item.path).name for item in self.found]


@asynccontextmanager
async def watching(root: Path, **options: Any) -> AsyncIterator[Collected]:
    source = FolderSource(root, "*.jpg", **options)
    collected = Collected(source)
    task = asyncio.create_task(collected.collect())
    try:
        await collected.until(lambda: source.tree.state != "missing" or not root.exists())
        yield collected
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await source.close()


@pytest.fixture(autouse=True)
def short_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SETTLE_S", 0.4)


async def quiet(collected: Collected) -> None:
    """Long enough for everything that settles to have come."""
    begun = time.monotonic()
    await collected.until(lambda: time.monotonic() - begun > sources.SETTLE_S + 0.4)


async def test_a_renamed_and_a_written_file_count_once_and_unfinished_names_never(tmp_path: Path) -> None:
    async with watching(tmp_path) as collected:
        (tmp_path / "written.jpg").write_bytes(b"x")
        put(tmp_path / "renamed.jpg", b"y")
        for name in (".hidden.jpg", "a.jpg.part", "b.jpg.tmp", "c.png"):
            (tmp_path / name).write_bytes(b"z")
        (tmp_path / "link.jpg").symlink_to("written.jpg")
        await collected.arrived(2)
        await quiet(collected)
        assert sorted(collected.names) == ["renamed.jpg", "written.jpg"]


async def test_what_was_there_before_is_not_an_arrival(tmp_path: Path) -> None:
    (tmp_path / "old.jpg").write_bytes(b"x")
    os.utime(tmp_path / "old.jpg", (1, 1))
    await asyncio.sleep(0.05)  # file times are coarser than the clock
    async with watching(tmp_path) as collected:
        await quiet(collected)
        assert collected.found == []


async def test_an_overwritten_name_counts_again_and_a_reopened_file_does_not(tmp_path: Path) -> None:
    latest = tmp_path / "latest.jpg"
    async with watching(tmp_path) as collected:
        for round_number in range(3):
            latest.write_bytes(b"x" * (round_number + 1))
            await collected.arrived(round_number + 1)
        for round_number in range(3, 6):
            put(latest, b"x" * round_number)
            await collected.arrived(round_number + 1)
        with latest.open("ab"):
            pass
        latest.chmod(0o640)
        await quiet(collected)
        assert len(collected.found) == 6


async def test_renaming_a_counted_image_inside_the_tree_does_not_count_again(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    async with watching(tmp_path) as collected:
        put(tmp_path / "one.jpg", b"x")
        await collected.arrived(1)
        (tmp_path / "one.jpg").rename(tmp_path / "sent" / "one.jpg")
        await quiet(collected)
        assert collected.names == ["one.jpg"]


async def test_written_then_renamed_at_once_counts_once(tmp_path: Path) -> None:
    async with watching(tmp_path) as collected:
        for number in range(50):
            (tmp_path / f"raw-{number}.jpg").write_bytes(b"x")
            (tmp_path / f"raw-{number}.jpg").rename(tmp_path / f"final-{number}.jpg")
        await collected.arrived(50)
        await quiet(collected)
        assert len(collected.found) == 50


async def test_an_image_taken_away_at_once_still_arrived(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    async with watching(root) as collected:
        for number in range(20):
            (root / f"{number}.jpg").write_bytes(b"x")
            if number % 2:
                (root / f"{number}.jpg").unlink()
            else:
                (root / f"{number}.jpg").rename(outside / f"{number}.jpg")
        await collected.arrived(20)
        await quiet(collected)
        assert len(collected.found) == 20
        assert any(item.vanished for item in collected.found)


@pytest.mark.parametrize("in_place", [False, True])
async def test_a_burst_in_new_nested_folders_loses_and_doubles_nothing(tmp_path: Path, in_place: bool) -> None:
    wanted = {f"{number}.jpg" for number in range(2000)}

    def burst() -> None:
        for number in range(2000):
            folder = tmp_path / "2026" / f"{number // 400:02}" / f"{number // 40 % 10:02}"
            folder.mkdir(parents=True, exist_ok=True)
            if in_place:
                (folder / f"{number}.jpg").write_bytes(b"x" * 100)
            else:
                put(folder / f"{number}.jpg", b"x" * 100)

    async with watching(tmp_path) as collected:
        await asyncio.to_thread(burst)
        await collected.until(lambda: set(collected.names) >= wanted)
        await quiet(collected)
        assert Counter(collected.names) == Counter(wanted)


async def test_a_slow_writer_in_a_new_folder_is_seen_when_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SETTLE_S", 2.0)
    async with watching(tmp_path) as collected:
        folder = tmp_path / "new"
        folder.mkdir()
        with (folder / "slow.jpg").open("wb") as file:
            for _ in range(6):
                file.write(b"x" * 1000)
                file.flush()
                await asyncio.sleep(0.1)
            assert collected.found == []
        await collected.arrived(1)
        assert collected.found[0].size == 6000
        await quiet(collected)
        assert len(collected.found) == 1


async def test_a_folder_moved_in_brings_its_fresh_images(tmp_path: Path) -> None:
    root, made = tmp_path / "root", tmp_path / "made"
    root.mkdir()
    async with watching(root) as collected:
        (made / "deep").mkdir(parents=True)
        put(made / "deep" / "a.jpg", b"x")
        made.rename(root / "made")
        await collected.arrived(1)
        put(root / "made" / "deep" / "b.jpg", b"x")
        await collected.arrived(2)
        (root / "made").rename(root / "renamed")
        put(root / "renamed" / "deep" / "c.jpg", b"x")
        await collected.arrived(3)
        await quiet(collected)
        assert collected.names == ["a.jpg", "b.jpg", "c.jpg"]
        assert collected.found[2].path == str(root / "renamed" / "deep" / "c.jpg")


async def test_the_root_may_be_missing_go_and_come_back(tmp_path: Path) -> None:
    root = tmp_path / "later" / "root"
    async with watching(root) as collected:
        assert collected.source.tree.state == "missing"
        root.mkdir(parents=True)
        await collected.until(lambda: collected.source.tree.state == "watching")
        put(root / "a.jpg", b"x")
        await collected.arrived(1)
        shutil.rmtree(root)
        await collected.until(lambda: collected.source.tree.state == "missing")
        root.mkdir()
        put(root / "b.jpg", b"x")
        await collected.arrived(2)
        assert collected.names == ["a.jpg", "b.jpg"]


async def test_a_file_in_place_of_the_root_is_waited_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("not a folder")
    source = FolderSource(root, "*.jpg")
    assert await source.next(0.1) == []
    assert source.tree.state == "missing"
    await source.close()


async def test_polling_finds_each_image_once(tmp_path: Path) -> None:
    (tmp_path / "before.jpg").write_bytes(b"x")
    await asyncio.sleep(0.05)
    async with watching(tmp_path, poll=True, poll_s=0.1) as collected:
        assert collected.source.tree.state == "polling"
        (tmp_path / "new").mkdir()
        for number in range(100):
            put(tmp_path / "new" / f"{number}.jpg", b"x")
        (tmp_path / "latest.jpg").write_bytes(b"1")
        await collected.arrived(101)
        (tmp_path / "latest.jpg").write_bytes(b"22")
        await collected.arrived(102)
        await quiet(collected)
        assert len(collected.found) == 102
        assert "before.jpg" not in collected.names


async def test_an_overflow_is_counted_and_nothing_is_lost(tmp_path: Path) -> None:
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    source = FolderSource(tmp_path, "*.jpg")
    assert await source.next(0) == []
    assert source.tree.state == "watching"
    count = queue // 2 + 500  # creating a file gives two events

    def flood() -> None:
        for number in range(count):
            (tmp_path / f"{number}.jpg").touch()

    await asyncio.to_thread(flood)
    collected = Collected(source)
    task = asyncio.create_task(collected.collect())
    await collected.until(lambda: len(set(collected.names)) == count, 60)
    await quiet(collected)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await source.close()
    assert source.tree.overflows >= 1
    assert len(collected.found) == count


async def test_a_file_without_an_event_is_found_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RECONCILE_S", 0.3)
    async with watching(tmp_path) as collected:
        outside = tmp_path.parent / f"{tmp_path.name}-outside.jpg"
        outside.write_bytes(b"x")
        os.link(outside, tmp_path / "linked.jpg")  # a link gives neither a rename nor a close
        await collected.arrived(1)
        await quiet(collected)
        assert collected.names == ["linked.jpg"]


def test_only_live_folders_are_looked_into(tmp_path: Path) -> None:
    old = time.time() - 10 * 86400
    for day in range(5):
        (tmp_path / "2020" / f"{day}").mkdir(parents=True)
        os.utime(tmp_path / "2020" / f"{day}", (old + day, old + day))
    os.utime(tmp_path / "2020", (old, old))
    (tmp_path / "2026" / "today").mkdir(parents=True)
    os.utime(tmp_path / "2026", (old, old))
    (tmp_path / "loop").symlink_to(tmp_path)
    live = {str(Path(path).relative_to(tmp_path)) for path in live_folders(str(tmp_path), time.time())}
    assert live >= {".", "2026", "2026/today"}
    assert not any(name in live for name in ("2020/0", "2020/3", "loop"))


# The whole of it


SETTINGS = CaptureSettings(budget_pct=100)


@asynccontextmanager
async def capturing(
    root: Path, interval_s: float = 0.1, store: Store | None = None
) -> AsyncIterator[tuple[Capture, list[dict[str, Any]]]]:
    events: list[dict[str, Any]] = []
    source = CaptureSource(directory=root, interval_s=interval_s)
    capture = Capture({"front": source}, SETTINGS, on_event=events.append, store=store)
    task = asyncio.create_task(capture.run())
    try:
        yield capture, events
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.02)


def front(capture: Capture) -> dict[str, Any]:
    return capture.live()["front"]


async def write(root: Path, datas: list[bytes], capture: Capture, start: int) -> None:
    """One image at a time, each analysed before the next."""
    for number, data in enumerate(datas, start):
        analysed = front(capture)["analysed"]
        await asyncio.to_thread(put, root / f"{number:05}.jpg", data)
        await until(lambda before=analysed: front(capture)["analysed"] > before)  # type: ignore[misc]


async def test_a_window_tells_what_arrived(tmp_path: Path) -> None:
    async with capturing(tmp_path) as (capture, _):
        await until(lambda: front(capture)["state"] == "watching")
        whole = picture(1)
        await write(tmp_path, [picture(number) for number in range(4)], capture, 0)
        await asyncio.to_thread(put, tmp_path / "cut.jpg", whole[: len(whole) // 2])
        await asyncio.to_thread(put, tmp_path / "empty.jpg", b"")
        await until(lambda: front(capture)["images"] == 6)
        report = capture.close_window()["front"]
        assert report["images"] == 6
        assert report["corrupt_kinds"] == {"empty": 1, "truncated": 1}
        assert report["zero_byte"] == 1
        assert report["analysed"] == 4
        assert 60 < report["luma"]["p50"] < 180
        assert "sharpness" in report
        assert report["latency_s"]["max"] < LIMIT_S
        assert report["latency_samples"] == 6
        empty = capture.close_window()["front"]
        assert empty["images"] == 0
        assert "luma" not in empty
        assert "sharpness" not in empty


async def test_the_reference_and_the_comparison_around_a_change(tmp_path: Path) -> None:
    async with capturing(tmp_path) as (capture, _):
        await until(lambda: front(capture)["state"] == "watching")
        await write(tmp_path, [picture(number) for number in range(20)], capture, 0)
        reference = capture.reference()
        assert reference["sources"]["front"]["samples"] == 20
        since = time.monotonic()
        assert capture.compare(reference, since).waiting
        await write(tmp_path, [picture(number, blur=4) for number in range(8)], capture, 100)
        verdict = capture.compare(reference, since)
        assert not verdict.ok
        assert not verdict.waiting
        assert "blurred" in " ".join(verdict.reasons)


async def test_a_missing_folder_becomes_a_condition_and_clears(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with capturing(root) as (capture, events):
        await until(lambda: bool(events))
        assert events[0]["condition"] == "capture.folder_missing"
        assert events[0]["state"] == "set"
        assert events[0]["remedy"]
        assert [item["condition"] for item in capture.conditions()] == ["capture.folder_missing"]
        assert front(capture)["state"] == "missing"
        root.mkdir()
        await until(lambda: len(events) > 1)
        assert (events[1]["condition"], events[1]["state"]) == ("capture.folder_missing", "clear")
        assert capture.conditions() == []


async def test_a_source_that_fails_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError("the card was pulled")])
    original = FolderSource.next

    async def failing(self: FolderSource, timeout_s: float) -> list[Found]:
        for error in failures:
            raise error
        return await original(self, timeout_s)

    monkeypatch.setattr(FolderSource, "next", failing)
    async with capturing(tmp_path) as (capture, _):
        await until(lambda: front(capture)["state"] == "watching")
        await write(tmp_path, [picture()], capture, 0)
        assert front(capture)["images"] == 1


async def test_settings_change_at_once(tmp_path: Path) -> None:
    async with capturing(tmp_path) as (capture, _):
        wanted = SETTINGS.model_copy(
            update={"sources": {"front": CaptureSource(directory=tmp_path, interval_s=5.0)}, "budget_pct": 1.0}
        )
        capture.reconfigure(wanted)
        assert front(capture)["interval_s"] == 5.0
        assert capture.reference()["sources"]["front"]["interval_s"] == 5.0


async def test_a_restart_on_the_same_store_has_a_reference(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    store = await Store.open(tmp_path / "state.db")
    try:
        async with capturing(images, store=store) as (capture, _):
            await until(lambda: front(capture)["state"] == "watching")
            assert capture.lacking()
            await write(images, [picture(number) for number in range(18)], capture, 0)
            assert capture.lacking() == ""
        async with capturing(images, store=store) as (capture, _):
            await until(lambda: front(capture)["state"] == "watching")
            assert capture.reference()["sources"]["front"]["samples"] >= 16
            assert "no image" in capture.lacking()
            await write(images, [picture(50)], capture, 50)
            assert capture.lacking() == ""
            reference, since = capture.reference(), time.monotonic()
            await write(images, [picture(number, blur=4) for number in range(60, 68)], capture, 100)
            verdict = capture.compare(reference, since)
            assert not verdict.ok
            assert "blurred" in " ".join(verdict.reasons)
        async with capturing(images, store=store) as (capture, _):
            await until(lambda: front(capture)["state"] == "watching")
            assert 16 <= capture.reference()["sources"]["front"]["samples"] <= 19  # nothing of the spoilt trial
    finally:
        await store.close()


async def test_the_history_is_written_once_there_is_enough_and_then_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "KEEP_LOOK_S", 0.02)
    images = tmp_path / "images"
    images.mkdir()
    store = await Store.open(tmp_path / "state.db")
    try:
        async with capturing(images, store=store) as (capture, _):
            await until(lambda: front(capture)["state"] == "watching")
            await write(images, [picture(number) for number in range(16)], capture, 0)
            async with asyncio.timeout(LIMIT_S):  # as after a kill -9: nothing more gets written
                while not (first := await store.read(lambda t: t.fact("capture.history.front"))):
                    await asyncio.sleep(0.02)
            await write(images, [picture(number) for number in range(20, 24)], capture, 20)
            await asyncio.sleep(0.1)
            assert await store.read(lambda t: t.fact("capture.history.front")) == first
            assert len(first["pictures"]) >= 16
    finally:
        await store.close()


async def test_an_unreadable_history_is_left(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db")
    try:
        junk = {"schema": 1, "place": str(tmp_path), "boot_id": "x", "at": time.time(), "pictures": [[1, 2]]}
        for value in (7, [], {"schema": 1}, junk):
            await store.write(lambda t, value=value: t.set_fact("capture.history.front", value))  # type: ignore[misc]
            async with capturing(tmp_path, store=store) as (capture, _):
                await until(lambda: front(capture)["state"] == "watching")
    finally:
        await store.close()


def swap_for_fifo(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.unlink()
    os.mkfifo(path)


async def test_a_fifo_in_the_place_of_an_image_blocks_nothing(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.jpg"
    os.mkfifo(fifo)
    link = tmp_path / "link.jpg"
    link.symlink_to("fifo.jpg")
    async with asyncio.timeout(LIMIT_S):
        for path in (fifo, link):
            (seen,) = await asyncio.to_thread(examine, [Found(str(path), 1.0, 1.0, 5, 1.0)])
            assert seen.vanished
            assert (await asyncio.to_thread(analyse, str(path)))[0] is None
    async with capturing(tmp_path) as (capture, _):
        await until(lambda: front(capture)["state"] == "watching")
        for number in range(100):
            await asyncio.to_thread(swap_for_fifo, tmp_path / f"r{number}.jpg", picture())
        await write(tmp_path, [picture(1)], capture, 0)


async def test_a_read_that_hangs_is_told_and_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang(_: object) -> list[Any]:
        hanging.set()
        release.wait(LIMIT_S)
        return []

    monkeypatch.setattr(captures, "examine", hang)
    monkeypatch.setattr(captures, "TICK_S", 0.02)
    monkeypatch.setattr(captures, "HANGS_S", 0.3)
    monkeypatch.setattr(alarms, "STOPPED_LEAST_S", 0.5)
    monkeypatch.setattr(threads, "LEAVE_AFTER_S", 0.1)
    try:
        async with capturing(tmp_path) as (capture, events):
            await until(lambda: front(capture)["state"] == "watching")
            await asyncio.to_thread(put, tmp_path / "a.jpg", picture())
            await until(lambda: any(event["condition"] == "capture.stopped" for event in events))
            assert hanging.is_set()
            await until(lambda: front(capture)["state"] == "hanging")
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 10
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "leavable")
    finally:
        release.set()


async def test_without_sources_it_waits(tmp_path: Path) -> None:
    task = asyncio.create_task(Capture({}, SETTINGS, on_event=print).run())
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_any_file_name_is_told_as_plain_text(tmp_path: Path) -> None:
    async with capturing(tmp_path) as (capture, _):
        await until(lambda: front(capture)["state"] == "watching")
        name = os.fsencode(tmp_path) + b"/bad\xff\x1b[31m\n\xc3\xa4.jpg"
        await asyncio.to_thread(lambda: Path(os.fsdecode(name)).write_bytes(picture()))
        await until(lambda: front(capture)["images"] == 1)
        told = front(capture)["last_image"]
        assert told.isprintable()
        assert told.endswith("bad\\xff\\x1b[31m\\n\u00e4.jpg")
        json.dumps(front(capture)).encode()
