"""The download against a real HTTP server with every fault it must live with."""

import asyncio
import hashlib
import json
import random
import traceback
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from agent.errors import CloudError, FailedError, RefusedError
from agent.updates.addresses import is_local, redirected
from agent.updates.fetch import Limits, check_urls, fetch
from agent.updates.preflight import bytes_on_disk, discard_others
from tests.fakes_updates import Server, serving

QUICK = Limits(
    chunk_bytes=64 * 1024, doubtful_s=0, slow_for_s=0.3, first_wait_s=0.001, longest_wait_s=0.01, connect_s=2
)
SECRET = "X-Amz-Signature=canary-4711"


async def no_fresh_urls():
    raise CloudError("offline", "no connection", retryable=True)


def job(content, tmp_path, **changes):
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "folder": tmp_path / "downloads",
        "patience_s": 30,
        "fresh_urls": no_fresh_urls,
        "limits": QUICK,
        **changes,
    }


def some_bytes(count, seed=1):
    return random.Random(seed).randbytes(count)


async def test_whole(tmp_path):
    content, told = some_bytes(300_000), []
    async with serving(Server(content)) as base:
        path = await fetch([f"{base}/a?{SECRET}"], **job(content, tmp_path, on_progress=told.append))
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [hashlib.sha256(content).hexdigest()]
    assert told == sorted(told)
    assert told[-1] == len(content)


async def test_what_is_there_is_not_fetched_again(tmp_path):
    content = some_bytes(1000)
    async with serving(server := Server(content)) as base:
        await fetch([base], **job(content, tmp_path))
        await fetch([base], **job(content, tmp_path))
        assert len(server.requests) == 1
        (tmp_path / "downloads" / hashlib.sha256(content).hexdigest()).write_bytes(b"rotten")
        path = await fetch([base], **job(content, tmp_path))
    assert path.read_bytes() == content


async def test_fifty_cuts_cost_little(tmp_path):
    content = some_bytes(40 * 2**20)
    server, dice = Server(content), random.Random(5)

    def cut(after):
        async def fault(server, request):
            return await server.serve(request, cut_after=after)

        return fault

    server.faults = [cut(dice.randrange(1, 2 * len(content) // 51)) for _ in range(50)]
    async with serving(server) as base:
        path = await fetch([base], **job(content, tmp_path, patience_s=300, limits=Limits(first_wait_s=0.001)))
    print(f"{len(server.requests)} requests, {server.sent / len(content):.4f} times the bytes")
    assert path.read_bytes() == content
    assert len(server.requests) == 51
    assert server.sent <= 1.1 * len(content)


async def test_goes_on_after_the_agent_was_killed(tmp_path):
    content = some_bytes(500_000)
    server, arrived = Server(content), asyncio.Event()

    async def hang(server, request):
        response = web.StreamResponse(headers={"ETag": server.etag})
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:200_000])
        await asyncio.sleep(3600)

    server.faults = [hang]
    calls = job(
        content, tmp_path, limits=Limits(chunk_bytes=64 * 1024), on_progress=lambda n: n >= 128 * 1024 and arrived.set()
    )
    async with serving(server) as base:
        task = asyncio.create_task(fetch([base], **calls))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        part = calls["folder"] / f"{calls['sha256']}.part"
        with part.open("r+b") as file:
            file.seek(0, 2)
            file.write(b"bytes that were never fsynced")
        path = await fetch([base], **calls)
        assert path.read_bytes() == content
        offset = int(server.requests[1].headers["Range"].removeprefix("bytes=").removesuffix("-"))
        assert offset >= 128 * 1024
        assert server.requests[1].headers["If-Range"] == '"one"'


async def test_a_damaged_part_file_is_noticed(tmp_path):
    content = some_bytes(100_000)
    calls = job(content, tmp_path)
    calls["folder"].mkdir()
    (calls["folder"] / f"{calls['sha256']}.part").write_bytes(b"x" * 50_000)
    record = {"etag": '"one"', "size": len(content), "verified_offset": 50_000}
    (calls["folder"] / f"{calls['sha256']}.json").write_text(json.dumps(record))
    async with serving(server := Server(content)) as base:
        assert (await fetch([base], **calls)).read_bytes() == content
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "sidecar",
    [
        b"",
        b"[]",
        b'{"size":1,"verified_offset":1,"etag":""}',
        b'{"size":100000,"verified_offset":-5,"etag":""}',
        b'{"size":100000,"verified_offset":99999,"etag":""}',
    ],
)
async def test_a_bad_sidecar_means_from_the_start(tmp_path, sidecar):
    content = some_bytes(100_000)
    calls = job(content, tmp_path)
    calls["folder"].mkdir()
    (calls["folder"] / f"{calls['sha256']}.json").write_bytes(sidecar)
    async with serving(Server(content)) as base:
        assert (await fetch([base], **calls)).read_bytes() == content


async def cut_in_the_middle(server, request):
    return await server.serve(request, cut_after=200_000)


async def test_a_server_without_ranges_starts_over(tmp_path):
    content = some_bytes(400_000)
    server = Server(content)

    async def whole(server, request):
        return await server.serve(request, ranges=False)

    server.faults = [cut_in_the_middle, whole]
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert "Range" in server.requests[1].headers


async def test_a_changed_etag_starts_over(tmp_path):
    content = some_bytes(400_000)
    server = Server(some_bytes(400_000, seed=2))

    async def replaced(server, request):
        server.content, server.etag = content, '"two"'

    server.faults = [cut_in_the_middle, replaced]
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert len(server.requests) == 2


async def test_another_range_than_asked_for(tmp_path):
    content = some_bytes(400_000)
    server = Server(content)

    async def lies(server, request):
        return await server.serve(request, headers={"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"})

    server.faults = [cut_in_the_middle, lies]
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content


async def test_forbidden_in_the_middle_asks_for_new_urls(tmp_path):
    content = some_bytes(400_000)
    server, asked = Server(content), []

    async def forbidden(server, request):
        return web.Response(status=403)

    async with serving(server) as base:

        async def fresh():
            asked.append(len(server.requests))
            return [f"{base}/fresh?{SECRET}"]

        server.faults = [cut_in_the_middle, forbidden]
        path = await fetch([f"{base}/old?{SECRET}"], **job(content, tmp_path, fresh_urls=fresh))
    assert path.read_bytes() == content
    assert asked == [2]
    assert server.requests[2].path == "/fresh"
    assert "Range" in server.requests[2].headers


async def test_refused_for_good_gives_up_and_tells_no_secret(tmp_path, capsys):
    content = some_bytes(1000)
    server, asked = Server(content), []
    async with serving(server) as base:

        async def forbidden(server, request):
            return web.Response(status=403)

        async def fresh():
            asked.append(1)
            return [f"{base}/fresh?{SECRET}"]

        server.faults = [forbidden] * 20
        with pytest.raises(FailedError) as error:
            await fetch([f"{base}/old?{SECRET}"], **job(content, tmp_path, fresh_urls=fresh))
    assert error.value.code == "download_refused"
    assert "403" in error.value.message
    assert len(asked) == 3
    printed = capsys.readouterr()
    assert "canary" not in "".join(traceback.format_exception(error.value)) + printed.out + printed.err


async def test_nobody_there_ends_at_the_deadline_and_tells_no_secret(tmp_path, capsys):
    with pytest.raises(FailedError) as error:
        await fetch([f"http://127.0.0.1:1/a?{SECRET}"], **job(b"x", tmp_path, patience_s=0.2))
    assert error.value.code == "download_timeout"
    printed = capsys.readouterr()
    assert "canary" not in "".join(traceback.format_exception(error.value)) + printed.out + printed.err


async def test_the_next_url_is_tried(tmp_path):
    content = some_bytes(1000)
    server = Server(content)

    async def missing(server, request):
        return web.Response(status=404)

    server.faults = [missing]
    async with serving(server) as base:
        await fetch(["http://127.0.0.1:1/a", f"{base}/gone", f"{base}/here"], **job(content, tmp_path))
    assert [r.path for r in server.requests] == ["/gone", "/here"]


@pytest.mark.parametrize("declared", [True, False])
async def test_too_many_bytes_abort(tmp_path, declared):
    content = some_bytes(100_000)
    server = Server(content + b"more")

    async def chunked(server, request):
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"y" * 10_000)
                server.sent += 10_000
        except ConnectionError:
            return response

    server.faults = [] if declared else [chunked]
    async with serving(server) as base:
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(content, tmp_path))
    assert error.value.code == "download_too_large"
    kept = await asyncio.to_thread(bytes_on_disk, tmp_path / "downloads", hashlib.sha256(content).hexdigest())
    assert kept == 0


async def test_too_few_bytes(tmp_path):
    content = some_bytes(100_000)
    async with serving(Server(content[:-1])) as base:
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(content, tmp_path))
    assert error.value.code == "download_wrong_size"


async def test_wrong_bytes_are_fetched_twice_and_never_handed_out(tmp_path):
    content = some_bytes(100_000)
    async with serving(server := Server(some_bytes(100_000, seed=3))) as base:
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(content, tmp_path))
    assert error.value.code == "digest_mismatch"
    assert len(server.requests) == 2
    assert not (tmp_path / "downloads" / hashlib.sha256(content).hexdigest()).exists()


async def test_a_slow_drip_is_cut_and_gone_on_with(tmp_path):
    content = some_bytes(100_000)
    server = Server(content)

    async def drip(server, request):
        response = web.StreamResponse(headers={"ETag": server.etag})
        response.content_length = len(content)
        await response.prepare(request)
        for position in range(1000):
            try:
                await response.write(content[position : position + 1])
            except ConnectionError:
                break
            await asyncio.sleep(0.02)
        return response

    server.faults = [drip]
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert len(server.requests) == 2
    assert int(server.requests[1].headers["Range"].removeprefix("bytes=").removesuffix("-")) > 0


async def test_server_errors_are_waited_out(tmp_path):
    content = some_bytes(1000)
    server = Server(content)

    def answer(status):
        async def fault(server, request):
            return web.Response(status=status)

        return fault

    server.faults = [answer(500), answer(503), answer(429), answer(408)]
    async with serving(server) as base:
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content


@asynccontextmanager
async def answering(*answers):
    """A TCP server that gives its n-th client the n-th answer, later ones the last; its base URL and what was asked."""
    asked = []

    async def serve(reader, writer):
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        answer = answers[min(len(asked), len(answers)) - 1]
        writer.write(answer)
        try:
            await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()


def whole(content, extra=b""):
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (extra, len(content), content)


def moved(location):
    return b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % location


SENSELESS = {
    "no number as length": (b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\nxx", "Content-Length"),
    "negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "Content-Length"),
    "no status line": (b"\xff\0garbage\r\n\r\n", "Bad status line"),
    "no chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", "chunk"),
    "no chunk size later": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\nabc",
        "does not speak HTTP",
    ),
    "endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 50_000 + b"\r\n\r\n", "does not speak HTTP"),
    "another range": (
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99999999999999999999/99999999999999999999\r\nContent-Length: 5\r\n\r\nhello",
        "another range",
    ),
    "five thousand digits": (
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-1/%s\r\nContent-Length: 5\r\n\r\nhello" % (b"9" * 5000),
        "another range",
    ),
    "to a file": (moved(b"file:///etc/passwd"), "redirects to what is not an http"),
    "to ftp": (moved(b"ftp://127.0.0.1/x"), "redirects to what is not an http"),
    "to no host": (moved(b"http://[::1/"), "redirects to what is not an http"),
    "to nowhere": (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "redirects to nowhere"),
    "to itself": (moved(b"/again?" + SECRET.encode()), "redirects more than 5 times"),
}


@pytest.mark.parametrize("name", SENSELESS)
async def test_senseless_answers_end_soon(tmp_path, capsys, name):
    answer, said = SENSELESS[name]
    told = []
    async with answering(answer) as (base, asked):
        with pytest.raises(FailedError) as error:
            await fetch([f"{base}/a?{SECRET}"], **job(b"x" * 100, tmp_path, patience_s=86_400, on_wait=told.append))
    assert error.value.code == "download_failed"
    assert said in error.value.message
    assert "\n" not in error.value.message
    assert len(asked) == (18 if name == "to itself" else 3)
    assert len(told) == 2
    printed = capsys.readouterr()
    assert "canary" not in "".join(traceback.format_exception(error.value)) + printed.out + printed.err + "".join(told)


async def test_one_url_that_makes_sense_is_enough(tmp_path):
    content = some_bytes(1000)
    senseless = SENSELESS["no status line"][0]
    async with answering(senseless) as (bad, asked), answering(b"", b"", b"", b"", whole(content)) as (good, _):
        path = await fetch([f"{bad}/a", f"{good}/b"], **job(content, tmp_path))
    assert path.read_bytes() == content
    assert len(asked) == 3


async def test_only_answers_in_a_row_count(tmp_path):
    content = some_bytes(1000)
    bad, busy = SENSELESS["no status line"][0], b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    async with answering(bad, bad, busy, bad, bad, whole(content)) as (base, asked):
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert len(asked) == 6


async def test_a_busy_server_is_waited_for_and_named(tmp_path):
    told = []
    async with answering(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n") as (base, asked):
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(b"x" * 12_345, tmp_path, patience_s=0.3, on_wait=told.append))
    assert error.value.code == "download_timeout"
    assert len(asked) > 3
    assert told[0] == "downloading, 0 of 12 kB; waiting after: 127.0.0.1 answered HTTP 503"


async def test_redirects_are_followed_with_the_range(tmp_path):
    content = some_bytes(400_000)
    server = Server(content)
    server.faults = [cut_in_the_middle]
    async with (
        serving(server) as base,
        answering(moved(b"two"), moved(b"/three"), moved(b"x/"), moved(b"../y"), moved(f"{base}/end".encode())) as (
            first,
            asked,
        ),
    ):
        assert (await fetch([first], **job(content, tmp_path))).read_bytes() == content
    paths = [request.split()[1] for request in asked]
    assert paths[:5] == ["/", "/two", "/three", "/x/", "/y"]
    assert [request.path for request in server.requests] == ["/end", "/end"]
    assert "Range" in server.requests[1].headers


async def test_an_etag_that_is_none_is_not_sent_back(tmp_path):
    content = some_bytes(1_000_000)
    cut = whole(content, b'ETag: "\xff\xfe"\r\n')[:-500]
    async with answering(cut, whole(content)) as (base, asked):
        assert (await fetch([base], **job(content, tmp_path))).read_bytes() == content
    assert "Range" in asked[1]
    assert "If-Range" not in asked[1]


async def test_a_missing_file_beside_an_expired_url_still_asks_for_new_urls(tmp_path):
    content = some_bytes(1000)
    gone, expired = (b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status for status in (404, 403))
    async with answering(gone) as (one, _), answering(expired, whole(content)) as (two, asked):

        async def fresh():
            return [f"{one}/gone", f"{two}/new"]

        path = await fetch([f"{one}/gone", f"{two}/old"], **job(content, tmp_path, fresh_urls=fresh))
    assert path.read_bytes() == content
    assert [request.split()[1] for request in asked] == ["/old", "/new"]


async def test_over_a_proxy(tmp_path):
    content = some_bytes(1000)
    async with answering(whole(content)) as (proxy, asked):
        limits = Limits(proxy_url=lambda: proxy.replace("//", "//cam:p%40ss@"))
        path = await fetch(["http://artifacts.invalid/a?b"], **job(content, tmp_path, limits=limits))
    assert path.read_bytes() == content
    assert asked[0].startswith("GET http://artifacts.invalid/a?b HTTP/1.1")
    assert "Proxy-Authorization: Basic Y2FtOnBAc3M=" in asked[0]
    assert "p%40ss" not in repr(limits)


async def test_a_proxy_that_refuses_is_waited_for_and_tells_no_password(tmp_path):
    told = []
    refusal = b"HTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n"
    async with answering(refusal) as (proxy, asked):
        limits = Limits(proxy_url=lambda: proxy.replace("//", "//cam:canary@"), first_wait_s=0.001, longest_wait_s=0.01)
        calls = job(b"x", tmp_path, limits=limits, patience_s=0.3, on_wait=told.append)
        with pytest.raises(FailedError) as error:
            await fetch(["https://artifacts.invalid/a"], **calls)
    assert error.value.code == "download_timeout"
    assert asked[0].startswith("CONNECT artifacts.invalid:443 ")
    assert "the proxy answered HTTP 407" in told[0]
    assert "canary" not in "".join(traceback.format_exception(error.value)) + "".join(told)


@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        ("https://a/b/c?d", "e", "https://a/b/e"),
        ("http://a/", "https://b/", "https://b/"),
        ("https://a/", "//b/x", "https://b/x"),
        ("https://a/", "http://a/", ""),
        ("https://a/", "", ""),
        ("http://a/", "javascript:1", ""),
        ("http://a/", "http://b:99999/", ""),
        ("http://a/", "http://b/\x1b", ""),
        ("http://a/", "http://b..c/", ""),
    ],
)
def test_where_a_redirect_may_lead(url, location, target):
    if target:
        assert redirected(url, location, own=url) == target
    else:
        with pytest.raises(ValueError, match="redirects"):
            redirected(url, location, own=url)


LOCAL_HOSTS = [
    "localhost",
    "LocalHost.",
    "a.localhost",
    "loc%61lhost",
    "\u24dbocalhost",
    "127.0.0.1",
    "127.8.9.1:8080",
    "127.1",
    "127\u30020\u30020\u30021",
    "0x7f.1",
    "2130706433",
    "017700000001",
    "0.0.0.0",
    "0",
    "169.254.169.254",
    "user:word@169.254.0.1",
    "[::1]:80",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]",
    "[fe80::1]",
    "[fe80::1%25eth0]",
    "[febf::1]",
]


@pytest.mark.parametrize("host", LOCAL_HOSTS)
def test_no_redirect_leads_to_the_camera_itself(host):
    with pytest.raises(ValueError, match="redirects to the camera itself or its link"):
        redirected("http://b.example/", f"http://{host}/admin", own="http://a.example/")
    assert redirected("http://b.example/", f"http://{host}/x", own="http://127.0.0.1/") == f"http://{host}/x"


@pytest.mark.parametrize(
    "host",
    ["a.example", "localhost.example", "10.0.0.1", "192.168.1.1", "128.0.0.1", "[2001:db8::1]", "[fec0::1]", "127.a"],
)
def test_other_hosts_are_not_the_camera(host):
    assert not is_local(f"https://{host}/x")


async def test_a_redirect_to_the_camera_itself_is_not_asked_for(tmp_path):
    """The job's URL names another host, here by a name that a proxy knows; nothing of the camera is reached."""
    content = some_bytes(1000)
    location = f"http://127.0.0.1:1/admin?{SECRET}".encode()
    async with answering(moved(location)) as (proxy, asked):
        limits = Limits(
            proxy_url=lambda: proxy, doubtful_s=0, first_wait_s=0.001, longest_wait_s=0.01, strange_answers=2
        )
        with pytest.raises(FailedError) as error:
            await fetch(["http://artifacts.invalid/a"], **job(content, tmp_path, limits=limits))
    assert error.value.code == "download_failed"
    assert "artifacts.invalid redirects to the camera itself or its link" in error.value.message
    assert "canary" not in error.value.message
    assert [request.split()[1] for request in asked] == ["http://artifacts.invalid/a"] * 2


@pytest.mark.parametrize(
    "document", [KeyError("urls"), TypeError("NoneType"), None, 5, {}, [], [5], [None], ["ftp://u:canary@h/x"]]
)
async def test_a_fresh_document_without_urls_is_told_in_words(tmp_path, document):
    async def fresh():
        if isinstance(document, Exception):
            raise document
        return document

    async with answering(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as (base, _):
        with pytest.raises(FailedError) as error:
            await fetch([base], **job(b"x", tmp_path, fresh_urls=fresh))
    assert error.value.code == "download_refused"
    assert "canary" not in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "http://a:99999/",
        "http://a:0/",
        "http://a..b/",
        "${aws:iot:s3-presigned-url:https://s3/x}",
        "ftp://a/b",
        "file:///etc/passwd",
        "http://",
        "http://a b/",
        "",
        "http://[/",
    ],
)
def test_unusable_urls_are_refused(url):
    with pytest.raises(RefusedError) as error:
        check_urls([url])
    assert error.value.code == "url_invalid"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://user:canary@h/x", "ftp://h"),
        (f"ftp://user:{'canary' * 20}@h/x", "ftp://h"),
        ("https://canary@h:99999/x", "https://h"),
        ("https://h:99999/x?sig=canary", "https://h"),
        ("https://h:99999/x;sig=canary", "https://h"),
        ("https://h:99999/x#canary", "https://h"),
        ("https://canary:can/ary@h/x y", "https://…"),
        ("https://canary:ca?n@h/x y", "https://…"),
        ("HTTPS ://h/x?sig=canary", "a text without"),
        ("canary:4711", "a text without"),
        ("canary", "a text without"),
        ("http://[::1/canary", "can't be read"),
        ("http://h\u202e/canary", "http://…"),
        ("iot-stream:canary/+", "iot-stream:…"),
        ("${aws:iot:s3-presigned-url:https://s3/canary}", "a placeholder"),
        (None, "no text"),
    ],
)
def test_an_unusable_url_is_named_without_its_secrets(url, said):
    with pytest.raises(RefusedError) as error:
        check_urls(["https://good.example/x", url])
    assert error.value.code == "url_invalid"
    assert error.value.message.startswith("URL 2 (")
    assert said in error.value.message
    assert "canary" not in error.value.message
    assert error.value.message.isprintable()


def test_older_downloads_are_discarded(tmp_path):
    for name in ("a" * 64, "b" * 64 + ".part", "b" * 64 + ".json", "c" * 64 + ".part", "notes.txt"):
        (tmp_path / name).write_text("x")
    discard_others(tmp_path, "c" * 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c" * 64 + ".part", "notes.txt"]
