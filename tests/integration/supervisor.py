"""What systemd does with camera-agent.service, small: starts the loader, hears READY, ends what is late, runs `stopped`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LOADER = Path(__file__).resolve().parents[2] / "packaging" / "loader" / "camera-agent-loader"
SHELLS = {"dash": ["dash"], "busybox": ["busybox", "sh"]}
APPLETS = ("ln", "mv", "sync", "rm", "tee", "readlink", "grep", "cat", "sleep")
HANG_LIMIT_S = 60.0

SAY = f"""
say() {{ {sys.executable} -S -E -c '
import os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
    s.sendto(sys.argv[1].encode(), os.environ["NOTIFY_SOCKET"])' "$1"; }}
"""
AGENTS = {
    "good": "say READY=1; say STATUS=stays; exec sleep 600",
    "exits at once": "exit 1",
    "refuses agent.toml": "exit 2",
    "crashes after READY": "say READY=1; kill -SEGV $$",
    "ends well after READY": "say READY=1; exit 0",
    "never READY": "exec sleep 600",
    "hangs after READY": "say READY=1; say STATUS=hangs; exec sleep 600",
    "its Python is missing": "exit 126",
}
"""What a version does, in words of a shell; it has written its name into the log before."""


@dataclass(frozen=True)
class Life:
    """One start: the version that ran (None: none was executed), how it ended in systemd's words, whether it got READY.

    `result` is SERVICE_RESULT, or `stays` for one that was well and was ended by the test.
    """

    version: str | None
    result: str
    ready: bool


class Camera:
    """A folder with the agent's root, the packaged version and versions in slots; `shell` runs the loader."""

    def __init__(self, folder: Path, shell: str = "dash", root: Path | None = None) -> None:
        self.folder = folder
        self.root = root or folder / "opt"
        self.packaged = folder / "packaged"
        self.runtime = folder / "run"
        self.log = folder / "started"
        self._shell = SHELLS[shell]
        self._path = os.environ["PATH"]
        for place in (self.root / "slots", self.runtime):
            place.mkdir(parents=True, exist_ok=True)
        if shell == "busybox":
            (folder / "applets").mkdir()
            for name in APPLETS:
                (folder / "applets" / name).symlink_to("/bin/busybox")
            self._path = f"{folder / 'applets'}:{self._path}"

    def version(self, name: str, behaviour: str, *, packaged: bool = False, ends: bool = False) -> str:
        """Make a version; returns its link. With `ends` it does nothing but say that it was started."""
        folder = self.packaged if packaged else self.root / "slots" / name
        program = folder / "bin" / "camera-agent"
        program.parent.mkdir(parents=True)
        words = "exit 1" if ends else AGENTS.get(behaviour, "exit 1")
        first = "#!/no/such/interpreter" if behaviour == "missing interpreter" else "#!/bin/sh"
        says = SAY if "say " in words else ""
        program.write_text(f'{first}\n{says}echo "{name} $CAMERA_AGENT_SLOT $*" >>"{self.log}"\n{words}\n')
        program.chmod(0o644 if behaviour == "not executable" else 0o755)
        if behaviour == "empty":
            program.write_text("")
        return "" if packaged else f"slots/{name}"

    def trial(self, before: str, to: str, starts: int = 0) -> None:
        (self.root / "trial").write_text(f"from={before}\nto={to}\nstarts={starts}\n")

    def point(self, link: str) -> None:
        (self.root / "current").unlink(missing_ok=True)
        if link:
            (self.root / "current").symlink_to(link)

    @property
    def current(self) -> str:
        """What `current` leads to; empty when it is not there."""
        try:
            return str((self.root / "current").readlink())
        except FileNotFoundError:
            return ""

    def started(self) -> list[str]:
        """The versions that were executed, in order."""
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def fell_back(self) -> dict[str, str]:
        """What the loader left about a version that it took back."""
        try:
            text = (self.root / "fell_back").read_text()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in text.splitlines())

    def command(self, *arguments: str) -> list[str]:
        return [*self._shell, str(LOADER), *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": self._path,
            "CAMERA_AGENT_ROOT": str(self.root),
            "CAMERA_AGENT_FALLBACK": str(self.packaged),
            "RUNTIME_DIRECTORY": str(self.runtime),
            **more,
        }

    def loader(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the loader to its end, as with agents that end by themselves."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=HANG_LIMIT_S,
            start_new_session=True,
            check=False,
        )

    def live(self, *, start_limit_s: float = HANG_LIMIT_S, watchdog: bool = True) -> Life:
        """Start the unit once and see how it ends; a version that is well is ended, and is said to stay.

        One that has not said READY at `start_limit_s` is killed, and so is, with `watchdog`, one that says that it hangs.
        """
        before = len(self.started())
        with _notify_socket() as (address, receiver):
            process = subprocess.Popen(
                self.command("run", "--config", "agent.toml"),
                env=self.environment(NOTIFY_SOCKET=address),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                said = _hear(process, receiver, start_limit_s)
            finally:
                ended = process.poll()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ready = "READY=1" in said
        result = _result(ended, ready=ready, hangs="STATUS=hangs" in said and watchdog)
        started = self.started()[before:]
        if result != "stays":
            code = {"EXIT_CODE": "exited", "EXIT_STATUS": str(ended)} if ended is not None and ended >= 0 else {}
            self.loader("stopped", SERVICE_RESULT=result, **code)
        return Life(started[0] if started else None, result, ready)

    def lives(self, most: int, **limits: float) -> list[Life]:
        """Start it again and again, until a version stays, `most` times at most."""
        lives = []
        while len(lives) < most and (not lives or lives[-1].result != "stays"):
            lives.append(self.live(**limits))  # type: ignore[arg-type]
        return lives


def _result(ended: int | None, *, ready: bool, hangs: bool) -> str:
    """SERVICE_RESULT of a unit with Type=notify."""
    if ended is None:
        return "watchdog" if hangs else "stays" if ready else "timeout"
    if ended < 0:
        return "core-dump" if -ended == signal.SIGSEGV else "signal"
    if ended > 0:
        return "exit-code"
    return "success" if ready else "protocol"


@contextlib.contextmanager
def _notify_socket() -> Iterator[tuple[str, socket.socket]]:
    with (
        tempfile.TemporaryDirectory(prefix="n-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        receiver.bind(f"{folder}/notify")
        receiver.setblocking(False)
        yield f"{folder}/notify", receiver


def _hear(process: subprocess.Popen[bytes], receiver: socket.socket, limit_s: float) -> list[str]:
    """What was said until the process ended, said what becomes of it, or was not ready in time."""
    said: list[str] = []
    until = time.monotonic() + limit_s
    pid = os.pidfd_open(process.pid)
    try:
        while not any(words.startswith("STATUS=") for words in said):
            left = HANG_LIMIT_S if "READY=1" in said else until - time.monotonic()
            readable, _, _ = select.select([receiver, pid], [], [], max(0.0, left))
            said += _drain(receiver)
            if pid in readable or not readable:
                break
        if pid in select.select([pid], [], [], 0)[0]:
            process.wait()
            said += _drain(receiver)
    finally:
        os.close(pid)
    return said


def _drain(receiver: socket.socket) -> list[str]:
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said += receiver.recv(4096).decode().splitlines()
    return said


def shims(folder: Path, names: tuple[str, ...], path: str) -> tuple[Path, Mapping[str, str]]:
    """Programs that stand before the real `names`, count their calls, and at the CUT_AT-th end the whole process group.

    CUT_WHEN says when: `before` the program runs, `after`, or `within`, where `tee` has written only a part.
    Returns the folder of the count, and the environment that puts them into force.
    """
    (folder / "shims").mkdir()
    for name in names:
        real = next(str(Path(place) / name) for place in path.split(":") if (Path(place) / name).exists())
        shim = folder / "shims" / name
        shim.write_text(
            f"""#!/bin/dash
read -r count <"{folder}/count"
count=$((count + 1))
echo "$count" >"{folder}/count"
cut() {{ if [ "$count" = "$CUT_AT" ] && [ "$CUT_WHEN" = "$1" ]; then kill -9 0; fi; }}
cut before
if [ {name} = tee ] && [ "$count" = "$CUT_AT" ] && [ "$CUT_WHEN" = within ]; then
  IFS= read -r line; printf '%s' "$line" >"$1"
  kill -9 0
fi
{real} "$@"
status=$?
cut after
exit $status
"""
        )
        shim.chmod(0o755)
    return folder / "count", {"PATH": f"{folder / 'shims'}:{path}"}
