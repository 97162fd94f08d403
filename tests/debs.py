"""Small real Debian packages, and a private tree for dpkg to install them into, without root."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.errors import FailedError, RefusedError
from agent.updates.installers.deb import Deb, Direct
from agent.updates.installers.deb_store import DebStore
from agent.updates.installers.deb_work import DebWork
from agent.updates.installers.dpkg import ENVIRONMENT, Dpkg
from agent.updates.manifest import digest_of, parse_envelope, parse_manifest
from tests.fakes_updates import root_payload, signed_manifest, signed_root

needs_dpkg = pytest.mark.skipif(
    not (shutil.which("dpkg") and shutil.which("dpkg-deb")), reason="needs dpkg and dpkg-deb"
)
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: it kills dpkg at a system call")

FORCE = ("--force-not-root", "--force-bad-path", "--force-script-chrootless")

KILLABLE = """#!/bin/sh
# Ends dpkg, its parent, where the file kill.<script>.<argument> asks for it, once.
mark="$DPKG_ROOT/kill.{script}.{version}.$1"
if [ -e "$mark" ]; then rm "$mark"; kill -9 $PPID; sleep 1; fi
echo "{script} {version} $*" >> "$DPKG_ROOT/scripts.log"
exit 0
"""
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")


def build(
    folder: Path,
    package: str = "capture-pipeline",
    version: str = "1.0",
    *,
    fields: str = "",
    architecture: str = "all",
    files: Mapping[str, str] | None = None,
    conffiles: Mapping[str, str] | None = None,
    scripts: Mapping[str, str] | None = None,
) -> Path:
    """A .deb below `folder`, uncompressed, with a version file and a handful of data files."""
    tree = folder / f"tree-{package}-{version}"
    shutil.rmtree(tree, ignore_errors=True)
    control = tree / "DEBIAN"
    control.mkdir(parents=True)
    stanza = (
        f"Package: {package}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: Fleet <fleet@example.com>\n"
        f"{fields}Description: part of a test\n"
    )
    (control / "control").write_text(stanza)
    content = {
        f"opt/{package}/version": version,
        f"opt/{package}/data": version * 1000,
        f"opt/{package}/a-{version}": "",
        f"opt/{package}/z-{version}": "",
        **(files or {}),
    }
    for name, text in {**content, **(conffiles or {})}.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if conffiles:
        (control / "conffiles").write_text("".join(f"/{name}\n" for name in conffiles))
    for name, text in (scripts or {}).items():
        (control / name).write_text(text)
        (control / name).chmod(0o755)
    deb = folder / f"{package}_{version.replace(':', '%3a')}_{architecture}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, deb], check=True, capture_output=True)
    return deb


def killable(version: str) -> dict[str, str]:
    """Maintainer scripts that end dpkg when asked to; see KILLABLE."""
    return {script: KILLABLE.format(script=script, version=version) for script in SCRIPTS}


def tree_of(folder: Path) -> Path:
    """A private tree for dpkg with nothing installed."""
    for name in ("info", "updates", "triggers"):
        (folder / "var/lib/dpkg" / name).mkdir(parents=True)
    for name in ("status", "available", "lock", "lock-frontend"):
        (folder / "var/lib/dpkg" / name).touch()
    (folder / "bin").mkdir()
    (folder / "bin/sh").symlink_to("/bin/sh")
    return folder


PACKAGE = "capture-pipeline"
FAILING = "#!/bin/sh\n[ -e $DPKG_ROOT/mended ] || { echo the sensor is not there >&2; exit 1; }\n"
"""A maintainer script that fails until the file `mended` is there."""
USER_SETTINGS = {"HOME": "/nonexistent"}


def dpkg(root: Path, *arguments: str | Path, check: bool = True) -> str:
    """The real dpkg on a private tree, as an administrator would use it; its output."""
    done = subprocess.run(
        ["dpkg", f"--root={root}", *FORCE, *arguments],
        env=ENVIRONMENT | USER_SETTINGS,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def state_of(root: Path, package: str = "capture-pipeline") -> str:
    """`ii 1.0`, `iF 2.0`, … or nothing, as dpkg-query tells it."""
    done = subprocess.run(
        ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${db:Status-Abbrev}|${Version}", package],
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
    )
    short, _, version = done.stdout.partition("|")
    return f"{short.strip()} {version}".strip()


def assemble(path: Path, control: bytes, *members: tuple[tarfile.TarInfo, bytes], body: bytes | None = None) -> Path:
    """A .deb put together by hand: an ar archive of whatever control file and members, also those dpkg-deb would not make."""

    def tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as archive:
            for info, content in entries:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return plain.getvalue()

    parts = (
        ("debian-binary", b"2.0\n"),
        ("control.tar", tar((tarfile.TarInfo("./control"), control))),
        ("data.tar", tar(*members) if body is None else body),
    )
    content = b"!<arch>\n"
    for name, data in parts:
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(content)
    return path


def refused(code: str) -> Any:
    """Of either kind of error: a refusal comes as a failure where it is too late for refusing."""
    return pytest.raises((FailedError, RefusedError), check=lambda error: error.code == code)


class Camera:
    """A machine below `home`: a tree for dpkg, root's store, the fleet's keys, and the agent's folder of downloads."""

    def __init__(self, home, command=("dpkg",), lock_wait_s=20.0):
        self.home = home
        self.root, self.keys, self.downloads = home / "root", home / "keys", home / "downloads"
        if not self.root.exists():
            tree_of(self.root)
            self.keys.mkdir()
            self.downloads.mkdir()
            (self.keys / "root.json").write_text(json.dumps(signed_root(root_payload())))
        self.store = DebStore(home / "store", apt_cache=home / "archives")
        self.dpkg = Dpkg(self.root, command=command, lock_wait_s=lock_wait_s)
        self.work = DebWork(self.store, self.dpkg, keys_dir=self.keys)
        self.deb = Deb("pipeline", PACKAGE, Direct(self.work), store=self.store, dpkg=self.dpkg)

    def offer(self, version, *signers, deb=None, terms=None, **built):
        """A signed update: its artifact, manifest and envelope."""
        path = deb or build(self.downloads, PACKAGE, version, **built)
        terms = {"installed_size": 1_000_000, "security_counter": 1, **(terms or {})}
        envelope = signed_manifest(
            *signers,
            installer="deb",
            name="pipe",
            version=version,
            size=path.stat().st_size,
            sha256=digest_of(path),
            **terms,
        )
        return SimpleNamespace(
            artifact=path, envelope=envelope, manifest=parse_manifest(parse_envelope(envelope).payload), version=version
        )

    def has(self, version):
        """Nothing but this version, all of it, with dpkg's database in order; None for no version."""
        folder = self.root / "opt" / PACKAGE
        assert dpkg(self.root, "--audit") == ""
        assert not list((self.root / "var/lib/dpkg/updates").iterdir())
        if version is None:
            assert state_of(self.root) in ("", f"rc {state_of(self.root)[3:]}")
            assert not folder.exists()
            return True
        assert state_of(self.root) == f"ii {version}"
        assert {path.name for path in folder.iterdir()} == {"version", "data", f"a-{version}", f"z-{version}"}
        assert (folder / "version").read_text() == version
        return (folder / "data").read_text() == version * 1000

    async def stage(self, offer):
        await self.deb.install(offer.artifact, offer.manifest, offer.envelope, lambda _: None)

    async def bring(self, offer, *, commit=True):
        before, _ = await self.deb.running()
        await self.stage(offer)
        await self.deb.arm(offer.manifest)
        assert await self.deb.verify_running(offer.manifest)
        if commit:
            await self.deb.commit(offer.manifest, before)
        return before

    def debs(self):
        return {path.stem for path in (self.home / "store" / "pipeline").glob("*.deb")}

    def copy(self, home, command=("dpkg",)):
        shutil.copytree(self.home, home, symlinks=True)
        return Camera(home, command)
