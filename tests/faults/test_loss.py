"""The real agent where a third of the packets is lost, and where its server's name can't be resolved: in a network of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.cloud import authority
from tests.faults.scene import scene
from tests.integration.mqtt_peer import CONNECT

NAME = "cloud.test"
LOSS = """
table ip loss {
  chain leaving { type filter hook output priority 0; numgen random mod 100 < 30 drop; }
  chain arriving { type filter hook input priority 0; numgen random mod 100 < 30 drop; }
}
"""


@dataclass(frozen=True)
class Network:
    """A network namespace with one line to us; `host` is our end of it."""

    name: str
    host: str

    @property
    def hosts(self) -> Path:
        """Its /etc/hosts; to be changed in place."""
        return Path("/etc/netns") / self.name / "hosts"

    def know(self, name: str) -> None:
        """Resolve `name` to our end from now on."""
        with self.hosts.open("a", encoding="ascii") as file:
            file.write(f"{self.host} {name}\n")


@contextlib.contextmanager
def network(rules: str = "") -> Iterator[Network]:
    """A network of its own, with nftables `rules` in it; skips where one can't be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a network namespace")
    for tool in ("ip", "nft"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}: packages iproute2 and nftables")
    number = os.getpid() % 16384
    made = Network(f"camera-{number}", f"10.203.{number // 64 % 256}.{number % 64 * 4 + 1}")
    inside = made.host.rpartition(".")[0] + f".{number % 64 * 4 + 2}"
    near, far = f"cam{number}a", f"cam{number}b"
    try:
        made.hosts.parent.mkdir(parents=True)
        made.hosts.write_text("127.0.0.1 localhost\n", encoding="ascii")
        (made.hosts.parent / "resolv.conf").write_text("nameserver 127.0.0.1\n", encoding="ascii")
        (made.hosts.parent / "nsswitch.conf").write_text("hosts: files dns\n", encoding="ascii")
        try:
            _run("ip", "netns", "add", made.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        _run("ip", "-n", made.name, "link", "set", "lo", "up")
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", made.name)
        _run("ip", "addr", "add", f"{made.host}/30", "dev", near)
        _run("ip", "link", "set", near, "up")
        _run("ip", "-n", made.name, "addr", "add", f"{inside}/30", "dev", far)
        _run("ip", "-n", made.name, "link", "set", far, "up")
        if rules:
            _run("ip", "netns", "exec", made.name, "nft", "-f", "-", stdin=rules)
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", made.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)
        shutil.rmtree(made.hosts.parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            made.hosts.parent.parent.rmdir()


def _run(*argv: str, stdin: str = "") -> None:
    subprocess.run(argv, check=True, input=stdin, capture_output=True, text=True)


def _in(place: Network):
    """The scene's keywords that put the agent into `place`, and give its server the name NAME."""

    def prepare(cloud):
        cloud.peer._tls = authority().server_context(authority().server(NAME))

    def wrap(agent):
        agent.prefix = ("ip", "netns", "exec", place.name)

    return {"host": place.host, "prepare": prepare, "wrap": wrap, "cloud": {"endpoint": NAME}}


@pytest.fixture
def lossy() -> Iterator[Network]:
    with network(LOSS) as made:
        yield made


@pytest.fixture
def own() -> Iterator[Network]:
    with network() as made:
        yield made


async def test_thirty_percent_loss(tmp_path, lossy):
    lossy.know(NAME)
    async with scene(tmp_path, **_in(lossy)) as s:
        await s.agent.start()
        for _ in range(4):
            for handler in ("note", "bad"):
                s.offer(handler)
            await s.all_end(120)
        await s.ends_well(120)
        codes = {line["code"] for line in s.offline_lines()}
        assert codes <= {"no_answer", "lost", "closed", "tcp"}
        connects = len(s.cloud.peer.of(CONNECT))
        print(f"8 jobs tried at 30 % loss each way, {connects} connections, off-line for {codes or 'nothing'}")


async def test_a_name_that_is_resolved_only_later(tmp_path, own):
    async with scene(tmp_path, **_in(own)) as s:
        s.offer()
        await s.agent.start()
        await s.shows("dns", hint="DNS server")
        own.know(NAME)
        await s.ends_well()
