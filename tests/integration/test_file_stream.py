"""Artifacts from AWS IoT file streams, over a real session with the scripted server, with everything that may go wrong."""

import asyncio
import base64
import hashlib
import random

import pytest
from aiohttp import web

from agent.cloud.file_stream import FileStreams, Patience
from agent.cloud.stream_blocks import BLOCK_BYTES
from agent.errors import CloudError, FailedError
from agent.updates.fetch import Limits, fetch
from tests.fakes_updates import Server, serving
from tests.integration.connected import running
from tests.integration.mqtt_peer import SUBSCRIBE

STREAM = "$aws/things/cam-7/streams/s-1"
URL = "iot-stream:s-1/7"
PATIENCE = Patience(answer_s=0.1, first_wait_s=0.001, longest_wait_s=0.002)
UNHURRIED = Patience(answer_s=20, first_wait_s=0.001, longest_wait_s=0.002)
AT_ONCE = 131_072


class StreamService:
    """The stream `s-1` with the file 7, as AWS IoT serves it; `faults` change the answers to the next requests for blocks."""

    def __init__(self, peer, content, version=1):
        self.content = content
        self.version = version
        self.faults = []
        self.gets = []
        self.describes = 0
        self.refusal = None
        self.long_keys = False
        self.with_token = True
        peer.serve(f"{STREAM}/describe/json", self.describe)
        peer.serve(f"{STREAM}/get/json", self.get)

    def describe(self, packet):
        self.describes += 1
        files = [{"f": 3, "z": 1}, {"f": 7, "z": len(self.content)}]
        answer = {"c": packet.json()["c"], "s": self.version, "d": "firmware", "r": files}
        return [(f"{STREAM}/description/json", answer)]

    def get(self, packet):
        asked = packet.json()
        self.gets.append(asked)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, str):
            return self.refused(asked, fault)
        if self.refusal:
            return self.refused(asked, self.refusal)
        if asked["s"] != self.version:
            return self.refused(asked, "VersionMismatch")
        answers = [(f"{STREAM}/data/json", block) for block in self.blocks(asked)]
        return fault(answers) if fault else answers

    def blocks(self, asked):
        size, count = asked["l"], min(asked["n"], AT_ONCE // asked["l"])
        for number in range(asked["o"], asked["o"] + count):
            part = self.content[number * size : (number + 1) * size]
            if part:
                content = base64.b64encode(part).decode()
                yield {"c": asked["c"], "f": asked["f"], "l": len(part), "i": number, "p": content}

    def refused(self, asked, code):
        names = ("code", "message", "clientToken") if self.long_keys else ("o", "m", "c")
        answer = dict(zip(names, (code, "as told", asked["c"]), strict=True))
        if not self.with_token:
            del answer[names[2]]
        return [(f"{STREAM}/rejected/json", answer)]


def some_bytes(count, seed=1):
    return random.Random(seed).randbytes(count)


async def no_fresh_urls():
    raise CloudError("offline", "no connection", retryable=True)


@pytest.fixture
def job(tmp_path):
    """Arguments of fetch() for an artifact from `streams`."""

    def arguments(content, streams, **limits):
        limits = {"chunk_bytes": 64 * 1024, "first_wait_s": 0.001, "longest_wait_s": 0.01, "connect_s": 2, **limits}
        return {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "folder": tmp_path / "downloads",
            "patience_s": 60,
            "fresh_urls": no_fresh_urls,
            "limits": Limits(streams=streams, **limits),
        }

    return arguments


@pytest.mark.conformance("C-STRM-01", "C-STRM-02")
async def test_whole(peer, session, job):
    content = some_bytes(1_000_001)
    service = StreamService(peer, content)
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content
    blocks = [number for asked in service.gets for number in range(asked["o"], asked["o"] + asked["n"])]
    assert blocks == list(range(-(-len(content) // BLOCK_BYTES)))
    assert all(asked["l"] * asked["n"] <= AT_ONCE for asked in service.gets)
    assert {(asked["s"], asked["f"]) for asked in service.gets} == {(1, 7)}
    filters = [name for packet in peer.of(SUBSCRIBE) for name in packet.filters]
    assert filters == [f"$aws/things/cam-7/streams/+/{kind}/json" for kind in ("description", "data", "rejected")]


@pytest.mark.conformance("C-STRM-02")
async def test_the_next_request_waits_for_the_answers_to_the_former(peer, session, job):
    """Each answer has a block missing until the test lets it go; meanwhile nothing is asked for."""
    content = some_bytes(12 * BLOCK_BYTES)
    service, held = StreamService(peer, content), []

    def hold_last(answers):
        held.append(answers[-1])
        return answers[:-1]

    service.faults = [hold_last] * 3
    async with running(session):
        download = asyncio.create_task(fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED))))
        for number in (1, 2, 3):
            await peer.until(lambda count=number: len(service.gets) == count)
            peer.send(*held[-1])
        assert (await download).read_bytes() == content
    assert [(asked["o"], asked["n"]) for asked in service.gets] == [(0, 4), (4, 4), (8, 4)]


@pytest.mark.conformance("C-STRM-03", "C-STRM-04")
@pytest.mark.parametrize("seed", range(3))
async def test_lost_swapped_repeated_and_damaged_blocks(peer, session, job, seed):
    content, dice = some_bytes(30 * BLOCK_BYTES + 5, seed), random.Random(seed)
    service, late, done = StreamService(peer, content), [], [0]

    def disturb(answers):
        given = late[:]
        late.clear()
        for topic, block in answers:
            done[0] += 1
            match dice.randrange(8):
                case 0:
                    pass
                case 1:
                    given += [(topic, block), (topic, block)]
                case 2:
                    late.append((topic, block))
                case 3:
                    given.append((topic, {**block, "l": block["l"] - 1}))
                case 4:
                    other = base64.b64encode(b"wrong" * 9).decode()
                    given += [(topic, {**block, "p": other}), (topic, b"{" * 30), (topic, {**block, "i": 10**6})]
                case _:
                    given.append((topic, block))
        dice.shuffle(given)
        return given

    service.faults = [disturb] * 400
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", PATIENCE)))
        assert path.read_bytes() == content
    print(f"{done[0]} blocks, {done[0] - 31} of them again, in {len(service.gets)} requests tried")


@pytest.mark.conformance("C-STRM-05")
@pytest.mark.parametrize("code", ["VersionMismatch", "ETagMismatch"])
async def test_a_stream_that_changes_is_read_anew_from_the_start(peer, session, job, code):
    content = some_bytes(20 * BLOCK_BYTES)
    service = StreamService(peer, some_bytes(len(content), seed=2))

    def replaced(answers):
        service.content, service.version = content, 1 if code == "ETagMismatch" else 2
        return service.refused(service.gets[-1], code)

    service.faults = [None, None, replaced]
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content
    assert service.describes == 2
    assert [asked["o"] for asked in service.gets[:4]] == [0, 4, 8, 0]
    assert service.gets[-1]["s"] == service.version


@pytest.mark.conformance("C-STRM-05")
async def test_a_stream_that_changed_between_two_attempts_is_read_anew(peer, session, job):
    content = some_bytes(12 * BLOCK_BYTES)
    service = StreamService(peer, some_bytes(len(content), seed=2))

    def cut(answers):
        service.content, service.version = content, 2
        peer.cut()
        return []

    service.faults = [None, cut]
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content
    assert [(asked["s"], asked["o"]) for asked in service.gets] == [(1, 0), (1, 4), (2, 0), (2, 4), (2, 8)]


async def test_a_stream_that_changes_for_ever_is_given_up(peer, session, job):
    content = some_bytes(12 * BLOCK_BYTES)
    service = StreamService(peer, content)
    service.refusal = "ETagMismatch"
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
    assert error.value.code == "download_failed"
    assert "ETagMismatch" in error.value.message
    assert (service.describes, len(service.gets)) == (3, 3)


@pytest.mark.conformance("C-STRM-06")
@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("long_keys", [True, False])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("Unauthorized", "download_refused"),
        ("ResourceNotFound", "download_refused"),
        ("BlockSizeOutOfBounds", "download_failed"),
        ("InvalidRequest", "download_failed"),
    ],
)
async def test_a_refusal_ends_it(peer, session, job, code, reason, long_keys, with_token):
    content = some_bytes(1000)
    service = StreamService(peer, content)
    service.refusal, service.long_keys, service.with_token = code, long_keys, with_token
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
    assert error.value.code == reason
    assert f"AWS IoT refuses stream s-1: {code} as told" in error.value.message
    assert len(service.gets) == 1


async def test_another_requests_refusal_is_nothing(peer, session, job):
    content = some_bytes(1000)
    service = StreamService(peer, content)
    service.faults = [lambda answers: [(f"{STREAM}/rejected/json", {"o": "InvalidJson", "c": "other"})]]
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", PATIENCE)))
        assert path.read_bytes() == content
    assert len(service.gets) == 2


async def test_an_error_inside_the_service_is_waited_out(peer, session, job):
    content = some_bytes(1000)
    service = StreamService(peer, content)
    service.faults = ["InternalError"] * 4
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content
    assert len(service.gets) == 5


@pytest.mark.conformance("C-STRM-08")
@pytest.mark.parametrize("silent", [True, False])
async def test_five_requests_in_vain_end_it(peer, session, job, silent):
    content = some_bytes(20 * BLOCK_BYTES)
    service = StreamService(peer, content)
    service.faults = [None, *([(lambda answers: []) if silent else "InternalError"] * 5)]
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(content, FileStreams(session, "cam-7", PATIENCE if silent else UNHURRIED)))
    assert error.value.code == "download_failed"
    assert ("5 requests in a row" if silent else "InternalError as told, 5 times in a row") in error.value.message
    assert [asked["o"] for asked in service.gets] == [0, 4, 4, 4, 4, 4]


@pytest.mark.conformance("C-STRM-08")
async def test_five_descriptions_in_vain_end_it(peer, session, job):
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(b"x", FileStreams(session, "cam-7", PATIENCE)))
    assert error.value.code == "download_failed"
    assert len([p for p in peer.packets if p.topic.endswith("/describe/json")]) == 5


async def test_a_refused_subscription_does_no_harm(peer, session, job):
    content = some_bytes(100_000)
    StreamService(peer, content)
    peer.refuse_filters = {f"$aws/things/cam-7/streams/+/{kind}/json": 0x87 for kind in ("description", "data")}
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content


@pytest.mark.parametrize("size", [999, 1001])
async def test_a_file_of_another_size_is_not_read(peer, session, job, size):
    service = StreamService(peer, some_bytes(size))
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(some_bytes(1000), FileStreams(session, "cam-7", UNHURRIED)))
    assert error.value.code == ("download_too_large" if size > 1000 else "download_wrong_size")
    assert not service.gets


@pytest.mark.parametrize("url", ["iot-stream:s-1/8", "iot-stream:s-1/7"])
async def test_a_file_that_is_not_there_or_that_nobody_can_read(peer, session, job, url):
    content = some_bytes(1000)
    StreamService(peer, content)
    streams = FileStreams(session, "cam-7", UNHURRIED) if url.endswith("8") else None
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([url], **job(content, streams))
    assert error.value.code == "download_refused"


async def test_cut_again_and_again_it_goes_on_where_it_was(peer, session, job):
    content = some_bytes(40 * BLOCK_BYTES + 77)
    service = StreamService(peer, content)

    def cut_before(answers):
        peer.cut()
        return []

    service.faults = [None, cut_before, None, None, cut_before, cut_before, None]
    async with running(session):
        path = await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
        assert path.read_bytes() == content
    asked = [get["o"] for get in service.gets]
    assert sorted(set(asked)) == list(range(0, 41, 4))
    assert len(asked) == 11 + 3
    assert len({packet.connection for packet in peer.packets}) == 4


async def test_off_line_it_waits_and_goes_on(peer, session, job):
    content, told = some_bytes(100_000), asyncio.Event()
    service = StreamService(peer, content)
    calls = job(content, FileStreams(session, "cam-7", UNHURRIED))
    said = []

    def on_wait(words):
        said.append(words)
        if len(said) == 8:
            told.set()

    download = asyncio.create_task(fetch([URL], **calls, on_wait=on_wait))
    await told.wait()
    assert "no connection to AWS IoT" in said[0]
    async with running(session):
        assert (await download).read_bytes() == content
    assert service.describes >= 1


@pytest.mark.conformance("C-STRM-07")
async def test_what_was_read_stays_when_the_agent_is_killed(peer, session, job):
    content, arrived = some_bytes(40 * BLOCK_BYTES), asyncio.Event()
    service = StreamService(peer, content)
    service.faults = [None] * 5 + [lambda answers: []]
    async with running(session):
        calls = job(content, FileStreams(session, "cam-7", UNHURRIED))
        first = asyncio.create_task(
            fetch([URL], **calls, on_progress=lambda count: count >= 20 * BLOCK_BYTES and arrived.set())
        )
        await arrived.wait()
        first.cancel()
        await asyncio.wait({first})
        before = len(service.gets)
        assert (await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))).read_bytes() == content
    assert service.gets[before]["o"] == 20


@pytest.mark.conformance("C-STRM-07")
async def test_without_the_signed_digest_it_is_never_handed_out(peer, session, job, tmp_path):
    content = some_bytes(5 * BLOCK_BYTES)
    service = StreamService(peer, some_bytes(5 * BLOCK_BYTES, seed=2))
    async with running(session):
        with pytest.raises(FailedError) as error:
            await fetch([URL], **job(content, FileStreams(session, "cam-7", UNHURRIED)))
    assert error.value.code == "digest_mismatch"
    assert not (tmp_path / "downloads" / hashlib.sha256(content).hexdigest()).exists()
    assert len(service.gets) == 4


async def test_http_comes_first_and_the_stream_goes_on_from_its_bytes(peer, session, job):
    """The web server breaks off at an odd place and is gone; the stream has the rest."""
    content = some_bytes(30 * BLOCK_BYTES)
    service, web_server, kept = StreamService(peer, content), Server(content), asyncio.Event()

    async def breaks_off(server, request):
        response = web.StreamResponse()
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:100_001])
        await kept.wait()
        gone.set()
        request.transport.close()
        return response

    gone = asyncio.Event()
    web_server.faults = [breaks_off]
    async with running(session):
        calls = job(content, FileStreams(session, "cam-7", UNHURRIED))
        async with serving(web_server) as base:
            download = asyncio.create_task(fetch([URL, f"{base}/a"], **calls, on_progress=lambda _: kept.set()))
            await gone.wait()
        assert (await download).read_bytes() == content
    assert len(web_server.requests) == 1
    assert service.gets[0]["o"] >= 65_536 // BLOCK_BYTES


async def test_the_web_goes_on_from_the_bytes_of_a_stream(peer, session, job):
    content = some_bytes(30 * BLOCK_BYTES)
    service, web_server = StreamService(peer, content), Server(content)
    service.faults = [None, "Unauthorized"]
    async with running(session):
        calls = job(content, FileStreams(session, "cam-7", UNHURRIED))
        with pytest.raises(FailedError):
            await fetch([URL], **calls)
        async with serving(web_server) as base:
            assert (await fetch([f"{base}/a"], **calls)).read_bytes() == content
    assert web_server.requests[0].headers["Range"] == f"bytes={4 * BLOCK_BYTES}-"
    assert "If-Range" not in web_server.requests[0].headers


async def test_expired_urls_are_asked_for_anew_before_a_stream_is_used(peer, session, job):
    content = some_bytes(1000)
    service, web_server = StreamService(peer, content), Server(content)

    async def forbidden(server, request):
        return web.Response(status=403)

    async with running(session), serving(web_server) as base:

        async def fresh():
            return [URL, f"{base}/new"]

        web_server.faults = [forbidden]
        calls = job(content, FileStreams(session, "cam-7", UNHURRIED)) | {"fresh_urls": fresh}
        assert (await fetch([URL, f"{base}/old"], **calls)).read_bytes() == content
        assert not service.gets
        calls["folder"] /= "again"
        web_server.faults = [forbidden] * 20
        assert (await fetch([URL, f"{base}/old"], **calls)).read_bytes() == content
    assert len(web_server.requests) == 2 + 4
    assert len(service.gets) == 1
