"""dpkg, run so that its end can be believed: alone, within a time limit, with packages looked at before and after.

dpkg's exit status is not trusted: whether a version is installed says `Dpkg.status`. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from agent.errors import FailedError

LOCK_WAIT_S = 600.0
SCRIPTS_LIMIT_S = 1800.0
"""Time for one run of dpkg, maintainer scripts included."""
READ_LIMIT_S = 600.0
POLL_S = 0.2
TERMINATION_GRACE_S = 5.0
MAX_CONTROL_BYTES = 16 * 2**20
FIELDS = "${db:Status-Want} ${db:Status-Eflag} ${db:Status-Status} ${Version} ${Architecture} ${binary:Package}\n"
GONE = ("not-installed", "config-files")
UNFINISHED = ("unpacked", "half-configured", "triggers-awaited", "triggers-pending")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_SUSPEND": "1",
    "UCF_FORCE_CONFFOLD": "1",
}


@dataclass(frozen=True)
class Status:
    """What dpkg's database says of a package; `state` is installed, half-configured, unpacked, half-installed, …"""

    want: str
    flag: str
    state: str
    version: str
    architecture: str

    @property
    def complete(self) -> bool:
        """Installed without anything left to do. A package that is held back from apt is as good as any other."""
        return self.state == "installed" and self.flag == "ok" and self.want in ("install", "hold")


@dataclass(frozen=True)
class Control:
    """The fields of a .deb that say what it is."""

    package: str
    version: str
    architecture: str


class Dpkg:
    """dpkg of this machine, or of the tree below `root`, where maintainer scripts run outside with DPKG_ROOT set."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        command: Sequence[str] = ("dpkg",),
        lock_wait_s: float = LOCK_WAIT_S,
        scripts_limit_s: float = SCRIPTS_LIMIT_S,
    ) -> None:
        self.root = root
        self.database = (root or Path("/")) / "var/lib/dpkg"
        self._command = list(command)
        self._lock_wait_s = lock_wait_s
        self._scripts_limit_s = scripts_limit_s

    def status(self, package: str) -> Status | None:
        """What is there of `package`, None for nothing or for configuration files only. Raises FailedError."""
        found = [status for status in self._statuses(package).values() if status.state not in GONE]
        if len(found) > 1:
            raise FailedError(
                "package_ambiguous", f"{package} is installed for several architectures", "keep one of them"
            )
        return found[0] if found else None

    def unfinished(self) -> list[str]:
        """The packages that are unpacked and not configured, or wait for triggers."""
        return [name for name, status in self._statuses().items() if status.state in UNFINISHED]

    def interrupted(self) -> bool:
        """Whether dpkg was cut and its journal is yet to be taken in, without which apt refuses to work."""
        return any((self.database / "updates").iterdir())

    def _statuses(self, *names: str) -> dict[str, Status]:
        query = ["dpkg-query", f"--admindir={self.database}", "-W", "-f", FIELDS, "--", *names]
        done = subprocess.run(
            query, env=ENVIRONMENT, capture_output=True, check=False, timeout=READ_LIMIT_S, stdin=subprocess.DEVNULL
        )
        if done.returncode == 1 and names:
            return {}
        lines = [line.split(" ") for line in done.stdout.decode("utf-8", "replace").splitlines()]
        if done.returncode or not all(len(words) == 6 for words in lines):
            raise FailedError(
                "dpkg_broken",
                f"dpkg's database can't be read: {_last(done.stderr.decode('utf-8', 'replace'))}",
                "look at /var/lib/dpkg/status; /var/lib/dpkg/status-old and /var/backups have older copies",
            )
        return {w[5]: Status(w[0], w[1], w[2], w[3], w[4]) for w in lines}

    def newer(self, version: str, other: str) -> bool:
        """Whether `version` comes after `other`, as dpkg orders them."""
        done = subprocess.run(
            ["dpkg", "--compare-versions", version, "gt", other], env=ENVIRONMENT, check=False, capture_output=True
        )
        return done.returncode == 0

    def architecture(self) -> str:
        """The machine's own architecture, as packages name it."""
        return subprocess.run(
            ["dpkg", "--print-architecture"], env=ENVIRONMENT, check=True, capture_output=True, text=True
        ).stdout.strip()

    def check_fit(self, deb: Path, package: str) -> None:
        """Whether `deb` can be installed: what it depends on is there and nothing else would go. Changes nothing. Raises FailedError."""
        force = ["--no-act", "--force-downgrade", "--force-confold"]
        code, said = self._run([*force, "-i", str(deb)], READ_LIMIT_S)
        going = re.findall(r"will remove (\S+) in favour of", said)
        if going:
            raise FailedError(
                "package_conflicts", f"to install it dpkg would remove {', '.join(going)}", "remove it first"
            )
        if code:
            raise FailedError(
                "package_does_not_fit", f"dpkg would not install it: {_last(said)}", "see dpkg --no-act -i"
            )
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            for name in ("info", "updates", "triggers"):
                (scratch / name).mkdir()
            stanzas = (self.database / "status").read_text("utf-8", "replace").split("\n\n")
            others = [text for text in stanzas if text.strip() and f"\nPackage: {package}\n" not in f"\n{text}\n"]
            control = _fields_of(deb).strip()
            head, _, rest = control.partition("\n")
            mine = f"{head}\nStatus: install ok unpacked\n{rest}"
            (scratch / "status").write_text("\n\n".join([*others, mine]) + "\n", "utf-8")
            (scratch / "available").touch()
            code, said = self._run(["--no-act", f"--admindir={scratch}", "--configure", package], READ_LIMIT_S)
        if code:
            lacks = re.findall(r"depends on (.+?)[;.]", said)
            raise FailedError(
                "dependency_missing",
                f"it needs {'; '.join(lacks) or _last(said)}, which this camera does not have",
                "install that first, for example by AWS-Install-Application",
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold dpkg's frontend lock, as apt does, when no dpkg runs. Raises FailedError dpkg_locked after the time limit."""
        until = time.monotonic() + self._lock_wait_s
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._held("lock-frontend", until))
            # An apt that was killed may have left a dpkg behind, which has this one.
            with self._held("lock", until):
                pass
            yield

    @contextlib.contextmanager
    def _held(self, name: str, until: float) -> Iterator[IO[bytes]]:
        descriptor = os.open(self.database / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        with os.fdopen(descriptor, "rb") as file:
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):
                    if time.monotonic() >= until:
                        raise FailedError(
                            "dpkg_locked",
                            f"another program (apt?) has held dpkg's {name} for {self._lock_wait_s:g} s",
                            "let it end, or end it, and start the job again",
                        ) from None
                    time.sleep(POLL_S)
            yield file

    def install(self, deb: Path, *, downgrade: bool) -> None:
        """`dpkg -i`; configuration files changed by hand stay. Call within `alone`. Raises FailedError."""
        order = "--force-downgrade" if downgrade else "--refuse-downgrade"
        self._change("installing it", "--force-confold", order, "-i", str(deb))

    def unpack(self, deb: Path) -> None:
        """`dpkg --unpack`, whatever version there is. Call within `alone`. Raises FailedError."""
        self._change("unpacking it", "--force-confold", "--force-downgrade", "--unpack", str(deb))

    def configure(self, names: Sequence[str] = ()) -> None:
        """Finish what is unpacked: these packages, or all. Call within `alone`. Raises FailedError."""
        what = ["--", *names] if names else ["--pending"]
        self._change(f"configuring {', '.join(names) or 'all packages'}", "--force-confold", "--configure", *what)

    def hold(self, package: str) -> None:
        """Hold a package back from apt again: `install` makes dpkg forget it. Call within `alone`. Raises FailedError."""
        self._change(f"holding {package}", "--set-selections", words=f"{package} hold\n")

    def remove(self, package: str) -> None:
        """Remove a package in whatever state it is; its configuration files stay. Call within `alone`. Raises FailedError."""
        self._change(f"removing {package}", "--force-remove-reinstreq", "--remove", "--", package)

    def disarm_scripts(self, package: str) -> bool:
        """Set aside the prerm and postrm of what is installed, which dpkg runs before it goes; whether there were any.

        The last resort when those of a broken version keep the version before from coming back.
        """
        there = False
        for script in ("prerm", "postrm"):
            for path in (self.database / "info").glob(f"{package}*.{script}"):
                if path.name.split(":")[0] in (f"{package}.{script}", package):
                    path.rename(path.with_name(f".{path.name}.broken"))
                    there = True
        return there

    def audit(self) -> str:
        """What `dpkg --audit` finds wrong; empty when nothing is."""
        return self._run(["--audit"], READ_LIMIT_S)[1]

    def _change(self, doing: str, *arguments: str, words: str = "") -> None:
        code, said = self._run(arguments, self._scripts_limit_s, words)
        if code:
            how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            raise FailedError(
                "dpkg_failed",
                f"{doing}: dpkg: {how}: {_last(said)}",
                "see the journal of this camera and /var/log/dpkg.log",
            )

    def _run(self, arguments: Sequence[str], limit_s: float, words: str = "") -> tuple[int, str]:
        """The exit status, negative for a signal, and what was printed; `words` is its input. Nothing of it runs any more."""
        root = (
            [f"--root={self.root}", "--force-not-root", "--force-bad-path", "--force-script-chrootless"]
            if self.root
            else []
        )
        environment = {**ENVIRONMENT, "DPKG_FRONTEND_LOCKED": "1"}
        # A file, not a pipe: what a script leaves running may hold it for ever.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as given:
            given.write(words.encode())
            given.seek(0)
            child = subprocess.Popen(
                [*self._command, *root, *arguments],
                env=environment,
                cwd="/",
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                umask=0o022,
                start_new_session=True,
            )
            code = _wait(child, limit_s)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 65536))
            said = output.read().decode("utf-8", "replace")
        if code is None:
            raise FailedError(
                "dpkg_hangs", f"dpkg did not end within {limit_s:g} s: {_last(said)}", "look at the package's scripts"
            )
        return code, said


def _wait(child: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit status of dpkg, None when it had to be ended; with it ends its process group."""
    code: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = child.wait(limit_s)
    if code is None or code < 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM if code is None else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATION_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return code


def read_control(deb: Path) -> Control:
    """What a .deb says that it is. Raises FailedError not_a_package."""
    fields: dict[str, str] = {}
    for line in _fields_of(deb).splitlines():
        name, colon, value = line.partition(":")
        if colon and not line[:1].isspace():
            fields[name.lower()] = value.strip()
    try:
        return Control(fields["package"], fields["version"], fields["architecture"])
    except KeyError as error:
        _not_a_package(f"its control file has no field {error}")


def _fields_of(deb: Path) -> str:
    """The control file of a .deb as dpkg reads it, which unpacks all of the control archive: first its size is looked at."""
    with _stream("--ctrl-tarfile", deb) as stream:
        size = 0
        while block := stream.read(65536):
            size += len(block)
            if size > MAX_CONTROL_BYTES:
                _not_a_package(f"its control archive has more than {MAX_CONTROL_BYTES} bytes")
    done = subprocess.run(
        ["dpkg-deb", "-f", str(deb)],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=READ_LIMIT_S,
    )
    if done.returncode:
        _not_a_package(_last(done.stderr.decode("utf-8", "replace")))
    return done.stdout.decode("utf-8", "replace")


def unpacked_size(deb: Path, at_most: int | None = None) -> int:
    """Bytes of all files of a .deb, read to its end. Raises FailedError not_a_package, package_too_large."""
    total = 0
    with _stream("--fsys-tarfile", deb) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if ".." in member.name.split("/"):
                _not_a_package(f"it has a path that leads out of the machine's tree: {member.name!r:.80}")
            total += member.size if member.isreg() else 0
            if at_most is not None and total > at_most:
                raise FailedError(
                    "package_too_large",
                    f"the package's files have more than the {at_most} bytes that were signed",
                    "sign it again with its true installed_size",
                )
    return total


@contextlib.contextmanager
def _stream(part: str, deb: Path) -> Iterator[IO[bytes]]:
    """A part of a .deb as a plain tar archive; a reader that stops early ends dpkg-deb. Raises FailedError not_a_package."""
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            ["dpkg-deb", part, str(deb)],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert child.stdout
        try:
            yield child.stdout
            while child.stdout.read(65536):
                pass
            if child.wait(READ_LIMIT_S):
                raise tarfile.TarError
        except tarfile.TarError as error:
            child.kill()
            child.wait()
            errors.seek(0)
            _not_a_package(_last(errors.read(65536).decode("utf-8", "replace")) or str(error))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _not_a_package(why: str) -> NoReturn:
    raise FailedError(
        "not_a_package", f"the artifact is not a Debian package that can be installed: {why}", "build it with dpkg-deb"
    ) from None


def _last(said: str) -> str:
    """The last lines of a program's output that tell something, on one line."""
    noise = re.compile(r"^(\(Reading database|Errors were encountered|Preparing to|Unpacking |Setting up |Selecting )")
    lines = [line.strip() for line in said.splitlines() if line.strip() and not noise.match(line)]
    return "; ".join(lines[-4:])[-500:]
