"""The log under systemd: structured entries in the journal's own protocol, received on a real socket at its place."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOURNAL = Path("/run/systemd/journal/socket")
SCRIPT = """
from agent import logs
logs.configure()
log = logs.get_logger("test")
log.warning("disk is filling", path="/x", url="https://h/p?X-Amz-Signature=abc")
"""


@pytest.fixture
def journal():
    pytest.importorskip("systemd.journal", reason="systemd-python is not installed")
    if JOURNAL.exists():
        pytest.skip("a journal runs on this machine, its socket can't be taken")
    if os.geteuid() != 0:
        pytest.skip(f"only root can listen at {JOURNAL}")
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(JOURNAL))
        receiver.settimeout(20)
        try:
            yield receiver
        finally:
            JOURNAL.unlink()


def fields(datagram):
    """The journal's protocol: `NAME=text`, or `NAME`, a 64-bit length and the bytes."""
    found = {}
    while datagram:
        name, _, datagram = datagram.partition(b"\n")
        if b"=" in name:
            key, _, value = name.partition(b"=")
        else:
            key, size = name, int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + size], datagram[9 + size :]
        found[key.decode()] = value.decode()
    return found


def test_entries_are_structured_and_redacted(journal, tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr:
        status = os.fstat(stderr.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run([sys.executable, "-c", SCRIPT], stderr=stderr, env=environment, check=True)
    entry = fields(journal.recv(65536))
    assert entry["MESSAGE"].startswith("test: disk is filling")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["PATH"]) == ("4", "camera-agent", "/x")
    assert "abc" not in str(entry)
    assert (tmp_path / "stderr").read_text() == "", "nothing is written twice"
