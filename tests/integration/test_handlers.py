"""The handlers that ship for AWS's managed job templates, as real processes: real downloads, real apt and dpkg below another root."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import RefusedError
from agent.jobs.document import parse
from agent.jobs.operations import policy
from agent.settings import Jobs
from tests.certificates import Authority
from tests.fakes_updates import Server, serving

REPOSITORY = Path(__file__).parents[2]
HANDLERS = REPOSITORY / "packaging" / "handlers"
SECRET = "X-Amz-Signature=canary-4711&X-Amz-Credential=canary"
TOOLS = [
    *("awk", "bash", "cat", "chmod", "cut", "df", "dirname", "find", "flock", "id", "mkdir", "mv"),
    *("realpath", "rm", "sha256sum", "sleep", "stat", "sync", "tail"),
]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: dpkg installs nothing without it, nor can tmpfs be mounted"
)
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg is not installed")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def template(handler: str, *args: str):
    step = {
        "name": "Step",
        "type": "runHandler",
        "input": {"handler": handler, "args": list(args), "path": "${aws:iot:parameter:pathToHandler}"},
        "runAsUser": "",
    }
    return {"version": "1.0", "steps": [{"action": step}]}


# ---- All of them


@pytest.mark.conformance("C-DOC-01")
def test_every_managed_template_has_a_handler_that_the_agent_accepts(tmp_path):
    folder = tmp_path / "handlers"
    shutil.copytree(HANDLERS, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~0o022)
    jobs = Jobs(handler_dir=folder)
    documents = {
        "AWS-Reboot": template("reboot.sh"),
        "AWS-Download-File": template(
            "download-file.sh", "https://bucket/key?sig", "/var/lib/camera-agent/files/model"
        ),
        "AWS-Install-Application": template("install-packages.sh", "vim curl"),
        "AWS-Remove-Application": template("remove-packages.sh", "vim curl"),
        "AWS-Start-Application": template("start-services.sh", "a b"),
        "AWS-Stop-Application": template("stop-services.sh", "a b"),
        "AWS-Restart-Application": template("restart-services.sh", "a b"),
    }
    for name, document in documents.items():
        operation, parsed = parse(document)
        assert operation == "run", name
        asked = document["steps"][0]["action"]["input"]
        handler = asked["handler"]
        argv = policy.command(jobs, parsed["steps"][0]["action"])
        assert argv == [str(folder / handler), "", *asked["args"]]
        assert f"({name})" in (HANDLERS / handler).read_text().splitlines()[1]
    for name in ("common.sh", "nosuch.sh"):
        with pytest.raises(RefusedError):
            policy.command(jobs, parse(template(name))[1]["steps"][0]["action"])


def test_reboot_asks_the_agent_for_it():
    done = subprocess.run([HANDLERS / "reboot.sh", ""], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (194, "a reboot is asked for\n", "")


# ---- download-file.sh


class Download:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "files"
        self.folder.mkdir()
        self.policy = folder / "download.allow"
        self.policy.write_text(f"# where files may go\n{self.folder}   # and below\n")
        self.policy.chmod(0o644)
        self.environment = {
            "PATH": os.environ["PATH"],
            "CAMERA_AGENT_DOWNLOAD_ALLOW": str(self.policy),
            "CAMERA_AGENT_DOWNLOAD_WAIT_S": "0",
        }

    async def start(self, *args):
        return await asyncio.create_subprocess_exec(
            HANDLERS / "download-file.sh",
            "",
            *map(str, args),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )

    async def __call__(self, *args):
        """(status, stdout, stderr) of a download; nothing it says may hold the secret of the URL."""
        process = await self.start(*args)
        async with asyncio.timeout(120):
            out, err = await process.communicate()
        out, err = out.decode(), err.decode()
        assert "canary" not in out + err
        assert (process.returncode == 0) == (err == "")
        return process.returncode, out, err

    def left(self):
        return sorted(path.name for path in self.folder.rglob("*"))


@pytest.fixture
def download(tmp_path):
    return Download(tmp_path)


def some_bytes(count, seed=1):
    return random.Random(seed).randbytes(count)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def cut(after, **how):
    async def fault(server, request):
        return await server.serve(request, cut_after=after, **how)

    return fault


def answer(status, **headers):
    async def fault(server, request):
        return web.Response(status=status, headers=headers)

    return fault


async def test_a_file_is_fetched_with_its_mode_and_not_twice(download):
    content = some_bytes(300_000)
    target = download.folder / "new" / "model.bin"
    async with serving(server := Server(content)) as base:
        status, out, _ = await download(f"{base}/key?{SECRET}", target)
        assert (status, out.split(",")[-1]) == (0, " no sha256 was given)\n")
        assert f"{target}: 300000 bytes from {base}/key, sha256 {sha256(content)}" in out
        assert target.stat().st_mode & 0o777 == 0o644
        for mark in (f"#sha256={sha256(content)}", f"#sha256={sha256(content).upper()}"):
            status, out, _ = await download(f"{base}/key?{SECRET}{mark}", target, "mode=0755")
            assert (status, out) == (0, f"already there: {target}, sha256 {sha256(content)}\n")
        assert target.stat().st_mode & 0o777 == 0o755
        assert len(server.requests) == 1
        server.content = some_bytes(1000, 2)
        status, out, _ = await download(f"{base}/key", target, f"sha256={sha256(server.content)}", "")
    assert (status, target.read_bytes()) == (0, server.content)
    assert "(checked)" in out
    assert download.left() == ["model.bin", "new"]


async def test_cut_anywhere_it_goes_on(download):
    content = some_bytes(400_000)
    dice = random.Random(7)
    cuts = [0, 1, *(dice.randrange(2, 40_000) for _ in range(18))]
    server = Server(content)
    server.faults = [cut(after) for after in cuts]
    async with serving(server) as base:
        status, _, err = await download(f"{base}/key?{SECRET}", download.folder / "a")
    assert (status, err) == (0, "")
    assert (download.folder / "a").read_bytes() == content
    assert len(server.requests) == len(cuts) + 1
    assert server.sent <= 1.1 * len(content)
    assert download.left() == ["a"]
    print(f"{len(cuts)} cuts of a download tried")


async def test_killed_it_goes_on_in_the_next_job(download):
    content = some_bytes(5_000_000)
    server, halfway, never = Server(content), asyncio.Event(), asyncio.Event()

    async def stalls(server, request):
        response = web.StreamResponse(headers={"ETag": server.etag})
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:2_000_000])
        halfway.set()
        await never.wait()

    server.faults = [stalls]
    async with serving(server) as base:
        process = await download.start(f"{base}/key?{SECRET}", download.folder / "a")
        async with asyncio.timeout(60):
            await halfway.wait()
            while not any(path.suffix == ".part" and path.stat().st_size for path in download.folder.iterdir()):
                await asyncio.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
        never.set()
        assert not (download.folder / "a").exists()
        status, _, _ = await download(f"{base}/key?another-signature", download.folder / "a")
    assert status == 0
    assert (download.folder / "a").read_bytes() == content
    assert server.requests[1].headers["If-Range"] == '"one"'
    assert int(re.fullmatch(r"bytes=(\d+)-", server.requests[1].headers["Range"])[1]) > 0
    assert download.left() == ["a"]


@pytest.mark.parametrize("etag", ['"one"', 'W/"one"'])
async def test_two_versions_are_never_mixed(download, etag):
    old, new = some_bytes(200_000), some_bytes(200_000, 2)
    server = Server(old)
    server.etag = etag

    async def changes(server, request):
        response = await server.serve(request, cut_after=100_000)
        server.content = new
        server.etag = etag.replace("one", "two")
        return response

    server.faults = [changes]
    async with serving(server) as base:
        status, _, _ = await download(base + "/key", download.folder / "a")
    assert status == 0
    assert (download.folder / "a").read_bytes() == new


async def test_a_wrong_checksum_leaves_the_target_as_it_was(download):
    content, target = some_bytes(100_000), download.folder / "a"
    target.write_bytes(b"before")
    server = Server(content)
    async with serving(server) as base:
        status, _, err = await download(f"{base}/key?{SECRET}#sha256={'0' * 64}", target)
        assert (status, "wanted was 0000" in err) == (1, True)
        assert len(server.requests) == 1
        # After a resume the parts may not belong together: once more from the start, then it is the file that is wrong.
        server.faults = [cut(50_000)]
        status, _, _ = await download(f"{base}/key?{SECRET}", target, f"sha256={'0' * 64}")
        assert (status, len(server.requests)) == (1, 4)
        status, _, err = await download(f"{base}/key#sha256={'0' * 64}", target, f"sha256={'1' * 64}")
        assert (status, "different checksums" in err) == (2, True)
    assert target.read_bytes() == b"before"
    assert download.left() == ["a"]


async def test_answers_that_are_no_file(download):
    content, target = some_bytes(50_000), download.folder / "a"
    again = [answer(503), answer(429), answer(408), answer(500), cut(20_000, ranges=False), cut(30_000, ranges=False)]
    for_good = {400: "HTTP 400", 401: "presigned URL", 403: "presigned URL", 404: "HTTP 404", 410: "HTTP 410"}
    async with serving(server := Server(content)) as base:
        for status, words in for_good.items():
            server.requests.clear()
            server.faults = [answer(status)]
            code, _, err = await download(f"{base}/key?{SECRET}", target)
            assert (code, len(server.requests), words in err) == (1, 1, True), err
        server.requests.clear()
        server.faults = [answer(302, Location=f"{base}/elsewhere?{SECRET}")]
        code, _, err = await download(f"{base}/key?{SECRET}", target)
        assert (code, len(server.requests), "redirects" in err) == (1, 1, True), err
        server.requests.clear()
        server.faults = [answer(503)] * 100
        code, _, err = await download(f"{base}/key?{SECRET}", target)
        assert (code, len(server.requests), "given up after 8 tries (HTTP 503" in err) == (1, 8, True), err
        assert download.left() == []
        server.faults = list(again)
        assert (await download(f"{base}/key?{SECRET}", target))[0] == 0
        assert target.read_bytes() == content
    print(f"{len(for_good) + len(again) + 2} bad answers to a download tried")


async def test_what_was_whole_already_is_not_asked_for_again(download):
    content = some_bytes(50_000)

    async def nothing_more(server, request):
        assert request.headers["Range"] == f"bytes={len(part_of_it)}-"
        return web.Response(status=416, headers={"Content-Range": "bytes */50000"})

    async with serving(server := Server(content)) as base:
        part = sha256(f"{base}/key".encode())[:16]
        for part_of_it, requests in ((content, 1), (content + b"too much", 2)):
            (download.folder / f".a.{part}.part").write_bytes(part_of_it)
            (download.folder / f".a.{part}.part.headers").write_text('HTTP/1.1 200 OK\r\nETag: "one"\r\n\r\n')
            server.requests.clear()
            server.faults = [nothing_more]
            assert (await download(base + "/key", download.folder / "a"))[0] == 0
            assert len(server.requests) == requests
            assert (download.folder / "a").read_bytes() == content
            assert download.left() == ["a"]


async def test_https_needs_a_certificate_that_is_trusted(download, tmp_path):
    authority = Authority(tmp_path / "authority")
    pair = authority.server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate_file, pair.private_key_file)
    server = Server(b"content")
    async with tls_serving(server, context) as base:
        status, _, err = await download(f"{base}/key?{SECRET}", download.folder / "a")
        assert (status, "clock" in err, server.requests) == (1, True, [])
        download.environment["CURL_CA_BUNDLE"] = str(authority.ca_file)
        server.faults = [answer(302, Location=f"{base}/other?{SECRET}")]
        assert (await download(f"{base}/key?{SECRET}", download.folder / "a"))[0] == 0
        server.faults = [answer(302, Location=f"http://localhost:1/other?{SECRET}")]
        status, _, err = await download(f"{base}/key?{SECRET}", download.folder / "b")
        assert (status, "to https only" in err) == (1, True)
    assert download.left() == ["a"]


@asynccontextmanager
async def tls_serving(server, context):
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield f"https://localhost:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


async def test_urls_that_are_refused(download):
    urls = [
        *("", "key", "/etc/passwd", "file:///etc/passwd", "ftp://host/a", "HTTPS://host/a", "https://"),
        *("https:///a", "-o/etc/x"),
        *("https://user:canary@host/a", "https://canary@host/a", "http://localhost@host/a"),
        "http://localhost:80@host/a",
        *("http://host/a", "http://localhost.host/a", "http://127.0.0.1.host/a", "http://127.0.0.2/a"),
        "http://[::2]/a",
        *("http://localhost\\@host/a", "https://host/a b", "https://host/a\nb", "https://host/'\""),
        "https://ho{a,b}st/",
        *("https://host:port/a", "https://host/#md5=1", "https://host/#sha256=12", "https://host/#sha256=" + "g" * 64),
    ]
    for url in urls:
        status, _, err = await download(url, download.folder / "a")
        assert status in (2, 3), (url, err)
        assert err.startswith("download: "), err
        assert len(err.splitlines()) == 1, err
    download.policy.write_text(f"{download.folder}\nhttp://depot.invalid\n")
    status, _, err = await download("http://depot.invalid/a", download.folder / "a")
    assert (status, "given up" in err) == (1, True)
    for option in ("sha256=1", "mode=4755", "mode=x", "--output=/etc/x", "-K/etc/x", "sha512=" + "0" * 128):
        assert (await download("https://localhost/a", download.folder / "a", option))[0] == 2, option
    print(f"{len(urls)} URLs that can't be used tried")


async def test_paths_that_are_refused(download, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "files-too").mkdir()
    (download.folder / "folder").mkdir()
    (download.folder / "link").symlink_to(outside)
    (download.folder / "link-to-file").symlink_to(outside / "file")
    (download.folder / "loop").symlink_to(download.folder / "loop")
    inside = str(download.folder)
    paths = [
        *("", "a", "./a", "../a", "-a", inside, inside + "/", inside + "/a/", inside + "/folder"),
        *(f"{inside}/../outside/a", f"{inside}/link/a", f"{inside}/link-to-file", f"{inside}/folder/../../a"),
        f"{inside}-too/a",
        *("/etc/passwd", "/etc/camera-agent/agent.toml", "/var/lib/camera-agent/state.db", "/", "/a", inside + "/a\nb"),
    ]
    async with serving(server := Server(b"content")) as base:
        for path in paths:
            status, _, err = await download(base + "/key", path)
            assert status in (2, 3), (path, err)
            assert len(err.splitlines()) == 1, err
        assert (await download(base + "/key", f"{inside}/loop/a"))[0] == 1
        download.policy.write_text("/\n")
        for path in ("/etc/camera-agent/agent.toml", "/var/lib/camera-agent/identity/private-key.pem"):
            assert (await download(base + "/key", path))[0] == 3
        for policy in ("", "# nothing\n", "files\n", f"{inside}\nrelative\n"):
            download.policy.write_text(policy)
            assert (await download(base + "/key", f"{inside}/a"))[0] == 3, policy
        download.policy.write_text(inside)
        download.policy.chmod(0o666)
        status, _, err = await download(base + "/key", f"{inside}/a")
        assert (status, "changed by others" in err) == (3, True)
        download.policy.unlink()
        status, _, err = await download(base + "/key", f"{inside}/a")
        assert (status, "(/var/lib/camera-agent/files)" in err) == (3, True)
        assert server.requests == []
    assert list(outside.iterdir()) == []
    print(f"{len(paths)} paths that may not be written tried")


@needs_root
@pytest.mark.parametrize("told", [True, False], ids=["length is told", "length is not told"])
async def test_a_full_disk_leaves_nothing_behind(download, told):
    # Told: much too large, and hardly any of it is sent. Not told: it would fit, but only into what must stay free.
    content = bytes(64 * 2**20) if told else some_bytes(4 * 2**20 - 100_000)

    async def endless(server, request):
        response = web.StreamResponse(headers={"ETag": server.etag})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(content), 65536):
            await response.write(content[start : start + 65536])
        return response

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", download.folder], check=True)
    try:
        (download.folder / "a").write_bytes(b"before")
        server = Server(content)
        server.faults = [] if told else [endless]
        async with serving(server) as base:
            status, _, err = await download(base + "/key", download.folder / "a")
        assert (status, "not enough space" in err) == (1, True), err
        assert len(server.requests) == 1
        assert server.sent < len(content) / 2
        assert (download.folder / "a").read_bytes() == b"before"
        assert download.left() == ["a"]
        assert shutil.disk_usage(download.folder).free > 3.9 * 2**20
    finally:
        subprocess.run(["umount", download.folder], check=True)


async def test_without_curl_it_says_so(download, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    download.environment["PATH"] = str(tmp_path / "bin")
    status, _, err = await download("https://localhost/a", download.folder / "a")
    assert (status, "curl is not installed" in err) == (1, True)


# ---- start-, stop- and restart-services.sh

SYSTEMCTL = """#!/bin/bash
# A stand-in: each unit is a file, its text the state; what was asked for goes to `asked`.
cd "$(dirname "$0")/../units"
unit=${!#}
for verb; do [[ $verb == -* ]] || break; done
case $verb in
  is-system-running) cat ../running; exit ;;
  show)
    if [ ! -e "$unit" ]; then printf 'Id=%s\\nLoadState=not-found\\nActiveState=inactive\\n' "$unit"; exit; fi
    printf 'Id=%s\\nLoadState=loaded\\n%s\\n' "$(cat "$unit.id" 2>/dev/null || echo "$unit")" "$(cat "$unit")"
    if [ -e "$unit.next" ]; then mv "$unit.next" "$unit"; fi
    exit ;;
esac
echo "$*" >>../asked
if [ -e "$unit.$verb" ]; then . "./$unit.$verb"; fi
case $verb in
  start | restart) printf 'ActiveState=active\\nNRestarts=0' >"$unit" ;;
  stop) echo ActiveState=inactive >"$unit" ;;
esac
"""


class Services:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program(folder / "bin" / "systemctl", SYSTEMCTL)
        (folder / "running").write_text("running\n")
        (folder / "units").mkdir()
        for name in ("a.service", "b.service", "c.timer", "d.x.service", "camera-agent.service", "at@1.service"):
            self.unit(name, "ActiveState=inactive")

    def unit(self, name, text):
        (self.folder / "units" / name).write_text(text + "\n")

    def __call__(self, verb, *services):
        """(status, stdout, stderr) of a handler and what it asked systemctl for."""
        asked = self.folder / "asked"
        asked.write_text("")
        done = subprocess.run(
            [HANDLERS / f"{verb}-services.sh", "", *services],
            env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CAMERA_AGENT_SETTLE_S": "0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode == 0) == (done.stderr == "")
        assert len((done.stdout + done.stderr).splitlines()) == 1
        return done.returncode, done.stdout + done.stderr, asked.read_text().splitlines()


@pytest.fixture
def services(tmp_path):
    return Services(tmp_path)


@pytest.mark.conformance("C-DOC-07")
@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_services_in_one_argument_are_split(services, verb):
    past = {"start": "started", "stop": "stopped", "restart": "restarted"}[verb]
    status, said, asked = services(verb, "  a b.service  c.timer d.x at@1 ")
    units = ["a.service", "b.service", "c.timer", "d.x.service", "at@1.service"]
    assert (status, said) == (0, f"{past}: {', '.join(units)}\n")
    assert asked == [f"--no-ask-password {verb} -- {unit}" for unit in units]
    assert services(verb, "a", "b")[1] == f"{past}: a.service, b.service\n"


def test_names_that_are_no_services(services):
    names = [
        *("", " ", "-a", "--all", "a\nb", "a\tb", "a;b", "a/b", "../a", "a*", "[a]", "a?", "$(a)", "`a`"),
        *("a=b", "ä", "a" * 250),
    ]
    names += [
        *("multi-user.target", "system.slice", "init.scope", "-.mount", "dev-sda.swap", "a|b", "a&b", "'a'"),
        *('"a"', "a\x7f"),
    ]
    for name in names:
        status, said, asked = services("stop", f"a {name}" if name.strip() else name)
        assert (status, asked) == (2, []), (name, said)
        assert said.startswith("services: "), said
    print(f"{len(names)} names that are no services tried")


def test_the_agent_itself_is_left_alone(services):
    services.unit("alias.service", "ActiveState=active")
    services.unit("alias.service.id", "camera-agent.service")
    services.unit("camera-agent-packages@x.service", "ActiveState=inactive")
    for name in ("camera-agent", "camera-agent.service", "alias", "camera-agent-packages@x"):
        for verb in ("start", "stop", "restart"):
            status, said, asked = services(verb, f"a {name}")
            assert (status, asked, "nothing was changed" in said) == (3, [], True), said


def test_the_first_failure_ends_it_and_it_says_what_is_done(services):
    (services.folder / "units" / "b.service.start").write_text("echo 'Job for b.service failed.' >&2; exit 1\n")
    status, said, asked = services("start", "a b c.timer")
    assert (status, len(asked)) == (1, 2)
    assert "could not start b.service: Job for b.service failed; done before: a.service; not tried: c.timer;" in said
    (services.folder / "units" / "b.service.start").write_text(
        "echo 'Failed to start b.service: Access denied' >&2; echo 'See system logs' >&2; exit 4\n"
    )
    status, said, _ = services("start", "b")
    assert (status, "Access denied; " in said, "polkit" in said) == (3, True, True)
    status, said, asked = services("start", "a nosuch")
    assert (status, asked, "nosuch.service can't be used on this camera (not-found)" in said) == (1, [], True)


def test_success_is_what_is_so_afterwards(services):
    ends = {
        "ActiveState=failed\nSubState=failed": 1,
        "ActiveState=activating\nSubState=auto-restart": 1,
        "ActiveState=inactive\nType=simple\nResult=success": 1,
        "ActiveState=inactive\nType=oneshot\nResult=exit-code": 1,
        "ActiveState=inactive\nType=oneshot\nResult=success": 0,
        "ActiveState=active\nNRestarts=3": 0,
    }
    for end, wanted in ends.items():
        (services.folder / "units" / "a.service.start").write_text(f"echo '{end}' >a.service; exit 0\n")
        assert services("start", "a")[0] == wanted, end
    for later in ("ActiveState=failed\nResult=signal", "ActiveState=active\nNRestarts=1"):
        (services.folder / "units" / "a.service.start").write_text(
            f"printf 'ActiveState=active\\nNRestarts=0' >a.service; echo '{later}' >a.service.next; exit 0\n"
        )
        status, said, _ = services("start", "a")
        assert (status, "did not stay up" in said) == (1, True), later
    (services.folder / "units" / "a.service.stop").write_text("exit 0\n")
    status, said, _ = services("stop", "a")
    assert (status, "could not stop a.service" in said) == (1, True)
    print(f"{len(ends) + 3} ends of a service tried")


def test_without_systemd_it_says_so(services):
    (services.folder / "running").write_text("offline\n")
    status, said, asked = services("start", "a")
    assert (status, asked) == (1, [])
    assert said == "services: systemd does not run here, so no service can be started\n"


# ---- install- and remove-packages.sh

HELPER = REPOSITORY / "packaging" / "privileged" / "packages"
UNITS = REPOSITORY / "systemd"

UNIT_STARTER = """#!/bin/bash
# A stand-in for systemd: starts the root helper as the unit camera-agent-packages@.service does.
case " $* " in
  *" is-system-running "*) cat "$STATE/running" ;;
  *" show "*) echo inactive ;;
  *" start "*)
    unit=${!#}; request=${unit#camera-agent-packages@}
    echo "$unit" >>"$STATE/asked"
    if [ -e "$STATE/denied" ]; then cat "$STATE/denied" >&2; exit 1; fi
    exec "$CAMERA_AGENT_PACKAGES_HELPER" "${request%.service}" >/dev/null ;;
esac
"""


class Machine:
    """A Debian below another root, with a package source of its own: real apt and dpkg, nothing of the machine around it is touched."""

    def __init__(self, folder: Path) -> None:
        self.root, self.source, self.state = folder / "root", folder / "source", folder / "state"
        for path in (
            "var/lib/dpkg/info",
            "var/lib/dpkg/updates",
            "var/lib/apt/lists/partial",
            "var/cache/apt/archives/partial",
        ):
            (self.root / path).mkdir(parents=True)
        for path in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "var/log/apt"):
            (self.root / path).mkdir(parents=True)
        self.source.mkdir()
        self.state.mkdir()
        self.status_file.write_text("")
        (self.root / "etc/apt/sources.list").write_text(f"deb [trusted=yes] file:{self.source} ./\n")
        (folder / "apt.conf").write_text(
            f'Dir "{self.root}"; Dir::State::status "{self.status_file}"; APT::Sandbox::User "root"; Acquire::Languages "none";'
        )
        self.policy = folder / "packages.allow"
        self.allow("hello", "lib*", "old")
        program(folder / "bin" / "systemctl", UNIT_STARTER)
        self.through("offline")
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "APT_CONFIG": str(folder / "apt.conf"),
            "DPKG_ROOT": str(self.root),
            "DPKG_FORCE": "script-chrootless",
            "STATE": str(self.state),
            "CAMERA_AGENT_PACKAGES_HELPER": str(HELPER),
            "CAMERA_AGENT_PACKAGES_ALLOW": str(self.policy),
            "CAMERA_AGENT_PACKAGES_RUN": str(self.state / "results"),
            "CAMERA_AGENT_PACKAGES_LOCK_S": "60",
        }

    @property
    def status_file(self):
        return self.root / "var/lib/dpkg/status"

    def through(self, state):
        """`running`: as under systemd, by the unit; `offline`: the handler, as root, starts the helper itself."""
        (self.state / "running").write_text(state + "\n")

    def allow(self, *lines):
        self.policy.write_text("".join(line + "\n" for line in lines))
        self.policy.chmod(0o644)

    def package(self, name, version="1.0", *, fields="", postinst="", files=None):
        """Puts a package into the source."""
        built = self.source.parent / "build"
        program(built / "DEBIAN" / "postinst", f"#!/bin/sh\n{postinst}\n")
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: t <t@example.com>\n{fields}Description: t\n"
        (built / "DEBIAN" / "control").write_text(control)
        for path, text in (files or {}).items():
            (built / path).parent.mkdir(parents=True, exist_ok=True)
            (built / path).write_text(text)
            (built / "DEBIAN" / "conffiles").write_text(f"/{path}\n")
        for path in (built, built / "DEBIAN"):
            path.chmod(0o755)
        file = self.source / f"{name}_{version.replace(':', '%3a')}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", built, file], check=True, capture_output=True)
        shutil.rmtree(built)
        with (self.source / "Packages").open("a") as index:
            digest = sha256(file.read_bytes())
            index.write(f"{control}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n\n")

    def state_of(self, name):
        """What dpkg says of a package: state and version, or nothing."""
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    def start(self, verb, *packages):
        return subprocess.Popen(
            [HANDLERS / f"{verb}-packages.sh", "", *packages],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, verb, *packages):
        """(status, what it said) of a handler."""
        with self.start(verb, *packages) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode == 0) == (err == "")
        assert (process.returncode == 0) == (out != "")
        return process.returncode, (out + err).strip()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.package("hello")
    machine.package("libfine", fields="Depends: helper\n")
    machine.package("helper")
    return machine


@needs_root
@needs_dpkg
@pytest.mark.conformance("C-DOC-07")
@pytest.mark.parametrize("way", ["offline", "running"], ids=["started as root", "by the unit"])
def test_packages_in_one_argument_are_installed_and_removed(machine, way):
    machine.through(way)
    assert machine("install", " hello  libfine ") == (0, "installed: hello 1.0, libfine 1.0")
    assert [machine.state_of(name) for name in ("hello", "libfine", "helper")] == ["installed 1.0"] * 3
    before = machine.status_file.read_text()
    shutil.move(machine.source, machine.source.with_name("gone"))
    assert machine("install", "hello libfine") == (0, "already installed: hello 1.0, libfine 1.0")
    assert machine("remove", "nosuch lib-nosuch")[0] == 3
    assert machine("remove", "lib-nosuch") == (0, "not installed: lib-nosuch")
    assert machine.status_file.read_text() == before
    assert machine("remove", "hello lib-nosuch") == (0, "removed: hello, was not installed: lib-nosuch")
    assert machine("remove", "hello", "libfine") == (0, "removed: libfine, was not installed: hello")
    assert [machine.state_of(name) for name in ("hello", "libfine", "helper")] == ["", "", "installed 1.0"]
    if way == "running":
        asked = (machine.state / "asked").read_text().splitlines()
        rules = (UNITS / "51-camera-agent-packages.rules").read_text()
        allowed = re.search(r"/\^(.*)\$/\.test", rules)[1]
        assert len(asked) == 6
        assert all(re.fullmatch(allowed, unit) for unit in asked)


@needs_root
@needs_dpkg
def test_versions_and_odd_names(machine):
    machine.allow("g++", "hello", "gtk+3.0", "x")
    machine.package("g++", "4:12.2.0-3+b1~rc1")
    machine.package("gtk+3.0")
    machine.through("running")
    assert machine("install", "g++=4:12.2.0-3+b1~rc1 gtk+3.0") == (0, "installed: g++ 4:12.2.0-3+b1~rc1, gtk+3.0 1.0")
    assert machine("install", "hello=1.0")[0] == 0
    machine.package("hello", "2.0", files={"etc/hello.conf": "new"})
    # Not an upgrade by the way: a newer version must be asked for.
    assert machine("install", "hello") == (0, "already installed: hello 1.0")
    assert machine("install", "hello=2.0") == (0, "installed: hello 2.0")
    (machine.root / "etc/hello.conf").write_text("mine")
    machine.package("hello", "3.0", files={"etc/hello.conf": "newer"})
    assert machine("install", "hello=3.0") == (0, "installed: hello 3.0")
    assert (machine.root / "etc/hello.conf").read_text() == "mine"
    status, said = machine("install", "hello=1.0")
    assert (status, "downgrade" in said.lower()) == (1, True), said
    status, said = machine("install", "hello=9.9")
    assert (status, "9.9" in said) == (1, True), said
    assert machine.state_of("hello") == "installed 3.0"
    # apt reads "g+" as "install g" and "hello-" as "remove hello".
    for verb in ("install", "remove"):
        assert machine(verb, "hello-")[0] == 2
    machine.allow("hell*")
    for name in ("hello+", "hell"):
        status, said = machine("install", name)
        assert (status, f"no package {name} in" in said) == (1, True)
    assert machine("remove", "hello+") == (0, "not installed: hello+")
    assert machine.state_of("hello") == "installed 3.0"


@needs_root
@needs_dpkg
def test_an_unknown_package(machine):
    status, said = machine("install", "hello lib-nosuch")
    assert status == 1
    assert (
        said.splitlines()[-1] == "packages: no package lib-nosuch in this camera's package sources; nothing was changed"
    )
    shutil.rmtree(machine.source)
    status, said = machine("install", "lib-nosuch")
    assert (status, "the package lists could not be refreshed" in said) == (1, True)
    assert machine.state_of("hello") == ""


@needs_root
@needs_dpkg
def test_only_what_the_camera_allows(machine):
    status, said = machine("install", "hello other libfine another")
    assert status == 3
    assert (
        said
        == f"packages: not allowed on this camera: other, another; add to {machine.policy} what may be; nothing was changed"
    )
    useless = {
        "": "names none",
        "# hello\n\n": "names none",
        "hello world\n": "line 1",
        "hello\n[a-z]*\n": "line 2",
        "-x /\n": "line 1",
    }
    for text, words in useless.items():
        machine.policy.write_text(text)
        for verb in ("install", "remove"):
            status, said = machine(verb, "hello")
            assert (status, words in said) == (3, True), said
    machine.allow("hello")
    for mode, owner in ((0o666, 0), (0o664, 0), (0o644, 12345)):
        machine.policy.chmod(mode)
        os.chown(machine.policy, owner, 0)
        status, said = machine("install", "hello")
        assert (status, "changed by others" in said) == (3, True), said
    machine.policy.unlink()
    status, said = machine("install", "hello")
    assert (status, f"{machine.policy} is missing" in said) == (3, True)
    assert machine.status_file.read_text() == ""
    machine.allow("h?llo   # the greeting")
    assert machine("install", "hello")[0] == 0
    print(f"{len(useless) + 4} policies that allow nothing tried")


@needs_root
@needs_dpkg
def test_the_agent_is_not_a_package_like_others(machine):
    machine.allow("*")
    machine.package("camera-agent")
    machine.package("pulls", fields="Depends: camera-agent\n")
    for name, words in {"camera-agent": "the agent itself", "pulls": "would also change camera-agent"}.items():
        status, said = machine("install", name)
        assert (status, words in said) == (3, True), said
    assert machine.state_of("camera-agent") == ""


@needs_root
@needs_dpkg
def test_nothing_else_is_removed(machine):
    machine.package("old")
    machine.package("libnew", fields="Conflicts: old\n")
    machine.package("needs-lib", fields="Depends: libfine\n")
    machine.allow("*")
    assert machine("install", "old needs-lib")[0] == 0
    machine.allow("old", "lib*")
    status, said = machine("install", "libnew")
    assert (status, said.split(";")[0]) == (3, "packages: to install libnew apt would remove old")
    status, said = machine("remove", "libfine")
    assert (status, said.split(",")[0]) == (3, "packages: with libfine apt would also remove needs-lib")
    assert [machine.state_of(name) for name in ("old", "libnew", "libfine", "needs-lib")][::2] == ["installed 1.0"] * 2
    machine.allow("old", "lib*", "needs-*")
    assert machine("remove", "libfine old")[0] == 0
    assert machine("install", "libnew") == (0, "installed: libnew 1.0")


@needs_root
@needs_dpkg
def test_what_a_power_cut_left_is_mended(machine):
    cuts = {"in the package's script": 'kill -9 "$PPID"', "with an error": "exit 7"}
    for number, (cut_off, how) in enumerate(cuts.items()):
        name = f"lib-cut-{number}"
        machine.package(name, postinst=f"[ -e $DPKG_ROOT/power ] || {how}")
        (machine.root / "power").unlink(missing_ok=True)
        status, said = machine("install", name)
        assert (status, "apt-get install ended with status 100" in said.splitlines()[-1]) == (1, True), cut_off
        assert machine.state_of(name) == "half-configured 1.0"
        (machine.root / "power").touch()
        assert machine("install", "hello")[0] == 0, cut_off
        assert machine("install", name) == (0, f"already installed: {name} 1.0")
        assert machine("remove", f"hello {name}")[0] == 0
    print(f"{len(cuts)} cuts of an installation tried")


@needs_root
@needs_dpkg
def test_another_program_that_holds_the_lock_is_waited_for(machine):
    lock = machine.root / "var/lib/dpkg/lock-frontend"
    holder = subprocess.Popen(
        [
            "python3",
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()",
            lock,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()
        process = machine.start("install", "hello")
        with process:
            log = machine.state / "results"
            until(lambda: any("lock" in path.read_text() for path in log.glob(".log.*")))
            holder.communicate(b"\n")
            out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "installed: hello 1.0\n", "")


@needs_root
@needs_dpkg
def test_nobody_else_can_hold_the_lock(machine):
    """Whoever can read the lock file can lock it, and block every request."""
    results = machine.state / "results"
    for left_over in (False, True):
        if left_over:
            (results / ".lock").chmod(0o644)
        assert machine("remove", "hello") == (0, "not installed: hello")
        assert (results / ".lock").stat().st_mode & 0o777 == 0o600


@needs_root
@needs_dpkg
def test_apt_goes_on_when_the_handler_is_ended(machine):
    machine.package("lib-slow", postinst="touch $DPKG_ROOT/begun; until [ -e $DPKG_ROOT/go ]; do sleep 0.1; done")
    process = machine.start("install", "lib-slow")
    with process:
        until((machine.root / "begun").exists)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert machine.state_of("lib-slow") == "half-configured 1.0"
        (machine.root / "go").touch()
    until(lambda: machine.state_of("lib-slow") == "installed 1.0")
    until(lambda: [p for p in (machine.state / "results").iterdir() if re.fullmatch("[0-9a-f]{8}", p.name)])


def until(happened, patience_s=60):
    give_up = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.05)


BAD = [
    *("-y", "--allow-unauthenticated", "-oDir=/", "/tmp/evil.deb", "./evil.deb", "http://evil/a.deb"),
    *("file:/a.deb", "a", "Hello", "hello/stable"),
]
BAD += [
    *("hello=", "=1", "hello==1", "hello=1=2", "hello=-1", "hello=1-", "hello=1+", "hello=1:", "hello=a1"),
    *("hello:amd64", "hello^", "?obsolete"),
]
BAD += [
    *("~i", "hello*", "^hello$", "hello,libfine", "hello;id", "$(id)", "`id`", "hello_libfine", "../hello"),
    *("héllo", "hello\\x2f", "h" * 200, "+hello", ".hello"),
]
BAD += [
    f"{left}{sign}{right}"
    for sign in "\t\n\r\x1b\x7f|&<>(){}[]'\"!#%@"
    for left, right in (("", "hello"), ("hel", "lo"), ("hello", ""))
]


@needs_root
@needs_dpkg
def test_names_that_are_no_packages(machine):
    machine.allow("*")
    machine.through("running")
    before = sorted(machine.root.rglob("*"))
    for name in BAD:
        for verb in ("install", "remove"):
            status, said = machine(verb, name)
            assert status == 2, (name, said)
            assert len(said.splitlines()) == 1, said
    for text in ("", "  ", "hello " * 60):
        assert machine("install", text)[0] == 2, text
    assert machine("remove", "hello=1.0")[0] == 2
    assert sorted(machine.root.rglob("*")) == before
    print(f"{len(BAD)} names that are no packages tried")


@needs_root
@needs_dpkg
def test_the_root_helper_trusts_no_request(machine):
    machine.allow("*")
    requests = [
        *("", "install", "install_00000000", "install_00000000_", "purge_00000000_hello"),
        *("install_0000000_hello", "install_0000000G_hello"),
    ]
    requests += [
        "install_../../x_hello",
        "--help",
        "install_00000000_hello\nremove_00000000_hello",
        "install_00000000_-y",
        "install_00000000_hello_-y",
    ]
    requests += [f"install_00000000_{name.replace('=', '@')}" for name in BAD if "_" not in name and name != "hello@"]
    requests += [
        f"install_00000000_hello_{name.replace('=', '@')}" for name in BAD if "_" not in name and name != "hello@"
    ]
    before = sorted(machine.root.rglob("*"))
    for request in requests:
        done = subprocess.run(
            [HELPER, request], env=machine.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (2, 1, ""), (request, done)
    assert sorted(machine.root.rglob("*")) == before
    print(f"{len(requests)} requests to the root helper tried")


@needs_root
@needs_dpkg
def test_where_the_unit_may_not_be_started(machine):
    machine.through("running")
    (machine.state / "denied").write_text(
        "Failed to start x.service: Interactive authentication required.\nSee system logs.\n"
    )
    status, said = machine("install", "hello")
    assert (status, "51-camera-agent-packages.rules" in said) == (3, True)
    (machine.state / "denied").write_text("Failed to start x.service: Unit x.service not found.\n")
    status, said = machine("install", "hello")
    assert (status, "Unit x.service not found; is it installed" in said) == (1, True)


def test_the_rules_name_nothing_but_the_units_of_packages():
    rules = (UNITS / "51-camera-agent-packages.rules").read_text()
    assert 'action.lookup("verb") === "start"' in rules
    assert 'subject.user === "camera-agent"' in rules
    allowed = re.search(r"/(\^.*\$)/\.test", rules)[1]
    good = ["install_0123abcd_hello", r"remove_0123abcd_g\x2b\x2b_libc6", "install_0123abcd_hello@1:2.0-1"]
    bad = [
        *("", "hello", "purge_0123abcd_hello", "install__hello", "install_0123abcd_", "install_0123abcd_a/b"),
        *("install_0123abcd_a b", "install_0123abcd_a\n"),
    ]
    for instance in good:
        assert re.search(allowed, f"camera-agent-packages@{instance}.service")
    for unit in [
        *(f"camera-agent-packages@{i}.service" for i in bad),
        "ssh.service",
        "camera-agent-packages@install_0123abcd_a.socket",
    ]:
        assert not re.search(allowed, unit)
        assert not re.search(allowed, f"x{unit}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_valid(tmp_path):
    shipped = (UNITS / "camera-agent-packages@.service").read_text()
    assert "ExecStart=/usr/libexec/camera-agent/packages %i\n" in shipped
    unit = tmp_path / "camera-agent-packages@install_00000000_hello.service"
    unit.write_text(shipped.replace("/usr/libexec/camera-agent/packages", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
