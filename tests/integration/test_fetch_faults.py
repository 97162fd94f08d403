"""The download among login pages, capped links, servers that misbehave byte by byte, full disks and files tampered with."""

import asyncio
import gzip
import hashlib
import json
import os
import socket
import struct
import subprocess
import tempfile
import tracemalloc
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import FailedError
from agent.updates import fetch as fetching
from agent.updates import rate
from agent.updates.fetch import Limits, fetch
from agent.updates.part import Origin, Part
from agent.updates.sources import http
from tests.fakes_updates import Server, serving
from tests.integration.test_fetch import QUICK, answering, cut_in_the_middle, job, moved, some_bytes, whole

PAGE = b"<html>Welcome! Accept the terms to go on-line.</html>"
HTML = b"Content-Type: text/html\r\nConnection: close\r\n"


def page(status=b"200 OK", extra=HTML):
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, extra, len(PAGE), PAGE)


PORTAL = {
    "its page in place of the artifact": page(),
    "its page without a length": b"HTTP/1.1 200 OK\r\n" + HTML + b"\r\n" + PAGE,
    "its page in chunks": b"HTTP/1.1 200 OK\r\n%sTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    % (HTML, len(PAGE), PAGE),
    "something of another length, and no tag": page(extra=b""),
    "forbidden": page(b"403 Forbidden"),
    "not found": page(b"404 Not Found"),
    "network authentication required": page(b"511 Network Authentication Required"),
    "to nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    "to itself": moved(b"/again"),
    "no HTTP": b"please log in\r\n\r\n",
}


class Hours:
    """Stands in for `time` and `asyncio` where a download looks at the clock: hours pass when a test or a sleep says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch):
    clock = Hours()
    for module in (fetching, http, rate):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(rate, "asyncio", clock)
    return clock


IMPATIENT = Limits(chunk_bytes=64 * 1024, first_wait_s=0.001, longest_wait_s=0.001)


class PortalInBetween:
    """Gives the portal's answer, byte for byte, for fifty minutes: a minute passes with each."""

    def __init__(self, clock, answer):
        self.clock, self.answer, self.met = clock, answer, 0

    async def cut(self, server, request):
        return await server.serve(request, cut_after=1_500_000)

    async def __call__(self, server, request):
        self.met += 1
        self.clock.now += 60
        request.transport.write(self.answer)
        request.transport.close()
        return web.Response()


@pytest.mark.parametrize("name", PORTAL)
async def test_a_login_page_passes(clock, tmp_path, name):
    """It stands in between for fifty minutes from the middle of a download on; no byte is lost, no new URL asked for."""
    content, told = some_bytes(2_000_000), []
    portal = PortalInBetween(clock, PORTAL[name])
    async with serving(server := Server(content)) as base:
        server.faults = [portal.cut, *[portal] * 50]
        calls = job(content, tmp_path, limits=IMPATIENT, patience_s=86_400, on_wait=told.append)
        assert (await fetch([f"{base}/a"], **calls)).read_bytes() == content
        assert server.sent <= 1.1 * len(content)
    assert portal.met == 50
    assert len(server.requests) == 52
    assert all("Range" in request.headers for request in server.requests[1:])


async def test_a_login_page_elsewhere_passes(clock, tmp_path):
    content = some_bytes(1000)
    async with answering(page(extra=b'ETag: "portal"\r\n')) as (portal, _):
        login = f"http://localhost:{portal.rpartition(':')[2]}/login".encode()
        async with answering(*[moved(login)] * 30, whole(content)) as (base, asked):
            assert (await fetch([base], **job(content, tmp_path, limits=IMPATIENT))).read_bytes() == content
            assert len(asked) == 31


async def test_a_login_page_for_ever_is_given_up_after_an_hour(clock, tmp_path):
    portal = PortalInBetween(clock, page())
    async with serving(server := Server(b"x" * 100)) as base:
        server.faults = [portal] * 100
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(b"x" * 100, tmp_path, limits=IMPATIENT, patience_s=86_400))
    assert error.value.code == "download_wrong_size"
    assert "as a network's login page would, signed were 100, 61 times in 60 minutes" in error.value.message
    assert portal.met == 61


async def test_a_login_page_that_outlasts_the_patience(clock, tmp_path):
    portal = PortalInBetween(clock, page())
    async with serving(server := Server(b"x" * 100)) as base:
        server.faults = [portal] * 100
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(b"x" * 100, tmp_path, limits=IMPATIENT, patience_s=600))
    assert error.value.code == "download_timeout"
    assert portal.met == 10


@pytest.mark.parametrize("size", [900, 1100])
async def test_a_wrong_artifact_on_its_own_server_is_known_at_once(tmp_path, size):
    async with serving(server := Server(some_bytes(size))) as base:
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(some_bytes(1000), tmp_path, limits=Limits()))
    assert error.value.code == ("download_wrong_size" if size < 1000 else "download_too_large")
    assert len(server.requests) == 1


async def test_the_cap_holds_over_http_and_does_not_count_as_slow(clock, tmp_path):
    """1 KiB a second, which is no more than the least: five minutes for 300 KiB, in one request."""
    content, came = some_bytes(300 * 1024), []
    begun = clock.now
    async with serving(server := Server(content)) as base:
        calls = job(content, tmp_path, limits=Limits(chunk_bytes=8192, bytes_per_s=lambda: 1024), patience_s=86_400)
        calls["on_progress"] = lambda count: came.append((clock.now - begun, count))
        assert (await fetch([base], **calls)).read_bytes() == content
    assert len(server.requests) == 1
    assert clock.now - begun == pytest.approx(300, abs=2)
    assert all(count <= 1024 * (at + 2) for at, count in came)


async def test_reconnecting_earns_no_bytes(clock, tmp_path):
    """The cap is one for the whole download, however often its connections break."""
    content, begun = some_bytes(400_000), clock.now

    async def cut(server, request):
        return await server.serve(request, cut_after=20_000)

    async with serving(server := Server(content)) as base:
        server.faults = [cut] * 15
        calls = job(content, tmp_path, limits=Limits(first_wait_s=0.001, bytes_per_s=lambda: 10_000), patience_s=86_400)
        assert (await fetch([base], **calls)).read_bytes() == content
    assert clock.now - begun >= 39


class InMemory:
    """A stream's file that is read at once."""

    def __init__(self, content):
        self.content = content

    async def describe(self, stream_id, file_id):
        return 1, len(self.content)

    async def read(self, stream_id, file_id, *, version, offset, size, most):
        end = (offset // 16_384 + max(1, min(4, most // 16_384))) * 16_384
        return self.content[offset:end]


@pytest.mark.parametrize("cap", [1024, 20_000, 1_000_000])
async def test_the_cap_holds_over_a_stream(clock, tmp_path, cap):
    content, begun = some_bytes(cap * 100), clock.now
    limits = Limits(bytes_per_s=lambda: cap, streams=InMemory(content))
    assert (await fetch(["iot-stream:a/0"], **job(content, tmp_path, limits=limits))).read_bytes() == content
    assert clock.now - begun == pytest.approx(100, abs=1)


@asynccontextmanager
async def listening(serve):
    """A TCP server: `serve(reader, writer, number)` for each client, counted from 1; its base URL, and the requests."""
    asked, tasks = [], set()

    async def accept(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
            await serve(reader, writer, len(asked))
        except (ConnectionError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def give(writer, content, asked):
    """What a good server answers."""
    start = int(asked.partition("Range: bytes=")[2].partition("-")[0] or 0)
    status = b"206 P\r\nContent-Range: bytes %d-%d/%d" % (start, len(content) - 1, len(content)) if start else b"200 OK"
    writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content) - start, content[start:]))
    await writer.drain()


async def silent(writer, content):
    await asyncio.sleep(3600)


async def reset(writer, content):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def reset_in_the_middle(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content[:5000]))
    await writer.drain()
    await reset(writer, content)


async def silent_in_the_middle(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content[:5000]))
    await asyncio.sleep(3600)


async def endless_headers(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Filler: %s\r\n" % (b"x" * 4000))
        await writer.drain()


async def endless_hints(writer, content):
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)
        await writer.drain()
        await asyncio.sleep(0)


async def half_a_header(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")


async def closed_without_a_word(writer, content):
    pass


async def short_of_its_length(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content[:-1]))


async def chunks_that_break_off(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s" % (len(content), content[:7000]))


async def more_than_its_length(writer, content):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s and more" % (len(content), content))


FAULTS = [
    silent,
    reset,
    reset_in_the_middle,
    silent_in_the_middle,
    endless_headers,
    endless_hints,
    half_a_header,
    closed_without_a_word,
    short_of_its_length,
    chunks_that_break_off,
    more_than_its_length,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_after_a_fault_it_goes_on(tmp_path, fault):
    content = some_bytes(100_000)

    async def serve(reader, writer, number):
        await (fault(writer, content) if number == 1 else give(writer, content, asked[-1]))

    async with listening(serve) as (base, asked):
        limits = Limits(chunk_bytes=4096, slow_for_s=0.2, connect_s=0.3, first_wait_s=0.001, longest_wait_s=0.01)
        assert (await fetch([base], **job(content, tmp_path, limits=limits))).read_bytes() == content
    assert len(asked) == 2


@pytest.mark.parametrize("fault", [endless_headers, endless_hints], ids=lambda fault: fault.__name__)
async def test_headers_without_end_take_no_memory(tmp_path, fault):
    async def serve(reader, writer, number):
        await fault(writer, b"")

    async with listening(serve) as (base, _):
        limits = Limits(slow_for_s=0.5, connect_s=1, first_wait_s=0.001, longest_wait_s=0.01)
        tracemalloc.start()
        try:
            with pytest.raises(FailedError):
                await fetch([base], **job(b"x" * 100, tmp_path, limits=limits, patience_s=3))
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 16 * 2**20


async def test_packed_on_the_way_it_is_not_the_artifact(tmp_path):
    content = b"a line of text\n" * 10_000
    packed = gzip.compress(content)
    extra = b'ETag: "one"\r\nContent-Encoding: gzip\r\n'
    async with answering(whole(packed, extra)) as (base, _):
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(content, tmp_path))
        assert error.value.code == "download_wrong_size"
        assert "with Content-Encoding gzip" in error.value.message
        # An object stored with that header is what was signed, as it is.
        assert (await fetch([base], **job(packed, tmp_path))).read_bytes() == packed


@pytest.mark.parametrize("status", [b"206 P\r\nContent-Type: multipart/byteranges; boundary=x", b"416 R"])
async def test_without_ranges_it_is_whole_then(tmp_path, status):
    """A server that answers a range with many, or refuses what it has, is asked for the whole."""
    content = some_bytes(1_000_000)
    odd = b"HTTP/1.1 %s\r\nContent-Range: bytes */1000000\r\nContent-Length: 1\r\n\r\nx" % status
    async with answering(whole(content)[:-500_000], odd, whole(content)) as (base, asked):
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert ["Range" in request for request in asked] == [False, True, False]


@pytest.mark.parametrize("tag", [b"", b'ETag: "%d"\r\n'], ids=["no tag", "another tag each time"])
async def test_traffic_has_an_end_where_the_server_begins_again_each_time(tmp_path, tag):
    """Cut at 99 % each time: no more than three times the size, what is spared for it, and one attempt come."""
    content, sent = some_bytes(500_000), []
    most = 3 * len(content) + 200_000

    async def serve(reader, writer, number):
        extra = tag % number if tag else b""
        writer.write(whole(content, extra)[: -len(content) // 100])
        sent.append(len(content))
        await writer.drain()

    async with listening(serve) as (base, _):
        limits = Limits(
            chunk_bytes=64 * 1024, first_wait_s=0.001, longest_wait_s=0.01, connect_s=2, waste_bytes=200_000
        )
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(content, tmp_path, limits=limits, patience_s=120))
    assert error.value.code == "download_failed"
    assert "were taken and thrown away" in error.value.message
    assert "HTTP ranges" in error.value.hint
    assert most < sum(sent) <= most + 2 * len(content)


async def test_what_is_gone_on_with_is_no_waste(tmp_path):
    content = some_bytes(400_000)
    server = Server(content)

    async def cut(server, request):
        return await server.serve(request, cut_after=20_000)

    server.faults = [cut] * 15
    limits = Limits(chunk_bytes=4096, first_wait_s=0.001, longest_wait_s=0.01, waste_bytes=-3 * len(content))
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path, limits=limits))).read_bytes() == content
    assert len(server.requests) == 16


async def test_chunks_that_end_well_and_too_early_are_a_wrong_artifact(tmp_path):
    answer = b'HTTP/1.1 200 OK\r\nETag: "one"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n'
    async with answering(answer) as (base, asked):
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(b"hello world", tmp_path))
    assert error.value.code == "download_wrong_size"
    assert len(asked) == 1


async def test_a_mirror_goes_on_whatever_its_tags_are(tmp_path):
    content = some_bytes(1_000_000)
    one, two = Server(content), Server(content)
    two.etag = '"two"'
    one.faults = [cut_in_the_middle]

    async def forbidden(server, request):
        return web.Response(status=404)

    one.faults += [forbidden] * 9
    async with serving(one) as first, serving(two) as second:
        assert (await fetch([f"{first}/a", f"{second}/a"], **job(content, tmp_path))).read_bytes() == content
    assert "Range" in two.requests[0].headers
    assert "If-Range" not in two.requests[0].headers


def small_disk(tmp_path, mib):
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)], check=True)
    return place


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a small disk is mounted")
@pytest.mark.parametrize("filled_kib", [0, 500, 1000, 1500, 2000, 2040, 2048])
async def test_a_full_disk_fails_and_costs_nothing_that_was_there(tmp_path, filled_kib):
    content, safe = some_bytes(3 * 2**20), [0]
    server = Server(content)
    place = await asyncio.to_thread(small_disk, tmp_path, 2)
    try:
        (place / "filler").write_bytes(b"x" * filled_kib * 1024)
        async with serving(server) as base:
            calls = {**job(content, tmp_path), "folder": place / "downloads", "on_progress": safe.append}
            with pytest.raises(FailedError) as error:
                await fetch([base], **calls)
            assert error.value.code == "disk_full"
            most = max(safe)
            (place / "filler").unlink()
            await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=8m", str(place)], check=True)
            server.requests.clear()
            assert (await fetch([base], **calls)).read_bytes() == content
        kept = int(server.requests[0].headers.get("Range", "bytes=0-")[6:-1])
        assert kept == most
        print(f"full with {filled_kib} KiB elsewhere, {kept} bytes kept, tried")
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(place)], check=True)


def put_in_the_way(path: Path, kind: str, elsewhere: Path) -> None:
    match kind:
        case "symlink":
            path.symlink_to(elsewhere)
        case "dangling symlink":
            path.symlink_to(elsewhere.with_name("nothing"))
        case "second name":
            path.hardlink_to(elsewhere)
        case "folder":
            (path / "in" / "it").mkdir(parents=True)
            (path / "in" / "file").write_text("x")
        case "pipe":
            os.mkfifo(path)
        case "socket":
            folder = os.open(path.parent, os.O_RDONLY)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # its own name is too long for a socket
            os.close(folder)
        case "longer":
            path.write_bytes(b"x" * 500_000)
        case "empty":
            path.touch()


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("suffix", ["", ".part", ".json"])
@pytest.mark.parametrize(
    "kind", ["symlink", "dangling symlink", "second name", "folder", "pipe", "socket", "longer", "empty"]
)
async def test_whatever_stands_in_the_way(tmp_path, kind, suffix, noted):
    content = some_bytes(100_000)
    calls = job(content, tmp_path)
    folder, digest = calls["folder"], calls["sha256"]
    folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(content)
    if noted and suffix != ".json":
        record = {"etag": '"one"', "size": len(content), "verified_offset": 60_000}
        (folder / f"{digest}.json").write_text(json.dumps(record))
    put_in_the_way(folder / f"{digest}{suffix}", kind, elsewhere)
    async with serving(Server(content)) as base:
        path = await fetch([base], **calls)
    assert path.read_bytes() == content
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    assert elsewhere.read_bytes() == content
    assert [found.name for found in folder.iterdir()] == [digest]


SIDECARS = [
    {"verified_offset": 60_000.0},
    {"verified_offset": True},
    {"verified_offset": "60000"},
    {"verified_offset": None},
    {"verified_offset": 10**30},
    {"verified_offset": 100_001},
    {"verified_offset": -1},
    {"etag": '"a"\r\nX-Injected: 1'},
    {"etag": '"\u20ac"'},
    {"etag": "x" * 5000},
    {"etag": ["one"]},
    {"etag": 'W/"one"'},
    {"source": {"a": 1}},
    {"source": "\x00"},
    {"size": "100000"},
]


@pytest.mark.parametrize("changes", SIDECARS, ids=lambda changes: repr(changes)[:40])
async def test_a_note_tampered_with_costs_bytes_at_most(tmp_path, changes):
    content = some_bytes(100_000)
    calls = job(content, tmp_path)
    folder, digest = calls["folder"], calls["sha256"]
    folder.mkdir()
    async with serving(server := Server(content)) as base:
        record = {"etag": '"one"', "source": http.source_of(base), "size": 100_000, "verified_offset": 60_000}
        (folder / f"{digest}.part").write_bytes(content + b"and more")
        (folder / f"{digest}.json").write_text(json.dumps({**record, **changes}))
        assert (await fetch([base], **calls)).read_bytes() == content
    assert len(server.requests) == 1
    assert "X-Injected" not in server.requests[0].headers


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{" * 20_000, b"\xff" * 100, b"9" * 10_000, b'{"size":NaN}', b"null"]
)
async def test_a_note_of_nonsense_means_from_the_start(tmp_path, text):
    content = some_bytes(100_000)
    calls = job(content, tmp_path)
    calls["folder"].mkdir()
    (calls["folder"] / f"{calls['sha256']}.json").write_bytes(text)
    async with serving(Server(content)) as base:
        assert (await fetch([base], **calls)).read_bytes() == content


def flipped(content, place):
    return content[:place] + bytes((content[place] ^ (1 << place % 8),)) + content[place + 1 :]


def test_no_artifact_with_a_flipped_byte_is_accepted():
    """Each byte of the first and the last 4 KiB of 12, through the same file and digest that a download goes through."""
    content = some_bytes(12 * 1024)
    digest, accepted = hashlib.sha256(content).hexdigest(), 0
    places = [*range(4096), *range(8192, 12_288)]
    with memory_folder() as folder:
        for place in places:
            part = Part(folder, digest, len(content))
            assert not part.complete()
            part.append(flipped(content, place))
            accepted += part.finish()
            part.close()
            assert part.offset == 0
        assert not (folder / digest).exists()
        part = Part(folder, digest, len(content))
        part.complete()
        part.append(content)
        assert part.finish()
        part.close()
    print(f"{len(places)} artifacts with one flipped byte tried, {accepted} accepted")
    assert accepted == 0


@contextmanager
def memory_folder():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


async def test_a_flipped_byte_is_noticed_over_http(tmp_path):
    content, accepted = some_bytes(12 * 1024), 0
    places = [*range(0, 4096, 300), *range(8192, 12_288, 300), 12_287]
    async with serving(server := Server(content)) as base:
        for place in places:
            server.content = flipped(content, place)
            try:
                await fetch([base], **job(content, tmp_path))
                accepted += 1
            except FailedError as error:
                assert error.code == "digest_mismatch"
    print(f"{len(places)} artifacts with one flipped byte tried over HTTP, {accepted} accepted")
    assert accepted == 0
    assert len(server.requests) == 2 * len(places)


def test_bytes_after_a_failed_write_are_never_taken_for_those_before(tmp_path):
    """The disk fails once in the middle of a download and then works again: nothing lands in the wrong place."""
    content = some_bytes(400_000)

    async def run():
        calls = job(content, tmp_path)
        async with serving(Server(content)) as base:
            failing = FailsOnce(Part.append)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Part, "append", lambda part, data: failing(part, data))
                with pytest.raises(FailedError) as error:
                    await fetch([base], **calls)
            assert error.value.code == "disk_failed"
            assert len(failing.lengths) == 3
            part = Part(calls["folder"], calls["sha256"], len(content))
            assert not part.complete()
            assert part.offset == 2 * QUICK.chunk_bytes
            assert part.origin != Origin()
            part.close()
            kept = calls["folder"] / f"{calls['sha256']}.part"
            assert kept.read_bytes() == content[: 2 * QUICK.chunk_bytes]
            assert (await fetch([base], **calls)).read_bytes() == content

    asyncio.run(run())


class FailsOnce:
    def __init__(self, append):
        self.append, self.lengths = append, []

    def __call__(self, part, data):
        self.lengths.append(len(data))
        if len(self.lengths) == 3:
            raise OSError(5, "Input/output error")
        self.append(part, data)
