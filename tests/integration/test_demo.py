"""The guided tour as a person starts it: it proves every step, ends by itself, and leaves no process behind however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.sandbox.tour_steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
GONE_WITHIN_S = 60


class Demo:
    """A running tour whose files are all below `folder`; `printed` is what was read from it so far."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.printed = ""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent.sandbox.tour", "--dir", str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read lines until one matches; every wait of the tour has its own time limit, so this ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.printed += line
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"the tour ended before {pattern!r}:\n{self.printed[-4000:]}")

    def end(self) -> int:
        assert self.process.stdout
        self.printed += self.process.stdout.read()
        return self.process.wait()

    def left(self) -> dict[int, str]:
        """Processes that have to do with `folder`, by their command line or their environment."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
            except OSError:
                continue
            if os.fsencode(self.folder) in command + environment and int(process.name) != os.getpid():
                found[int(process.name)] = command.replace(b"\0", b" ").decode()
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.end()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    started = Demo(tmp_path_factory.mktemp("demo") / "tour")
    yield started
    started.close()


@pytest.mark.parametrize("number", range(1, len(STEPS) + 1), ids=[step.name for step in STEPS])
def test_step(demo: Demo, number: int) -> None:
    if f"[{number}/{len(STEPS)}]" not in demo.printed:
        demo.read_until(rf"^\[{number}/{len(STEPS)}\] ")
    ended = demo.read_until(r"^ {8}(ok|FAILED), [\d.]+ s$")
    assert ended[1] == "ok", demo.printed[-6000:]


def test_it_ends_by_itself_with_a_table_of_what_it_proved(demo: Demo) -> None:
    status = demo.end()
    _, _, table = demo.printed.partition("what was seen\n")
    assert status == 0, demo.printed[-6000:]
    rows = re.findall(r"^(\w[\w ]*?) +(ok|FAILED) +\S", table, re.MULTILINE)
    assert rows == [(step.name, "ok") for step in STEPS] + [("clean up", "ok")]
    words = " ".join(table.split())
    assert "/targets/pipeline/quality" in words
    assert "capture_worse" in words
    assert re.search(r"none missing, (none|1) twice", words), "a lost acknowledgement may repeat one"
    assert "All of it as it should be" in words
    assert demo.left() == {}


@pytest.mark.parametrize("moment", [r"a guided tour", r"\[2/"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    demo = Demo(tmp_path / "tour")
    try:
        demo.read_until(moment)
        demo.process.send_signal(number)
        demo.process.wait()
        killed = number == signal.SIGKILL
        assert demo.process.returncode == (-number if killed else 128 + number)
        deadline = time.monotonic() + (GONE_WITHIN_S if killed else 0)
        while (left := demo.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == {}
    finally:
        demo.close()
    assert "Traceback" not in demo.printed


def test_it_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    demo = Demo(tmp_path)
    demo.read_until("is not empty")
    assert demo.end() == 2
    demo.close()
