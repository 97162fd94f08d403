"""A real RAUC for tests: a bus of its own, `rauc service` in a mount namespace of its own, slots that are plain files, and a boot loader that is a shell script."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent.updates.manifest import Manifest
from tests.fakes_updates import manifest as manifest_document

COMPATIBLE = "test-camera"
NAME_TIMEOUT_S = 60.0
SLOTS = {"A": "rootfs.0", "B": "rootfs.1"}
OPEN_POLICY = """<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
<allow send_type="method_return"/><allow send_type="error"/><allow receive_type="method_call"/>
<allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/></policy>"""
BUS_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>custom</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>{policy}</busconfig>"""
SYSTEM = """[system]
compatible={compatible}
bootloader=custom
statusfile={folder}/rauc.status
mountprefix={folder}/mnt
{activate}
[handlers]
bootloader-custom-backend={folder}/boot-loader
[keyring]
path={authority}
[slot.rootfs.0]
device={folder}/A.img
type=raw
bootname=A
[slot.rootfs.1]
device={folder}/B.img
type=raw
bootname=B
"""
BOOT_LOADER = """#!/bin/sh
state={folder}/boot.state
. $state
echo "$@" >> $state.log
[ -e {folder}/boot.broken ] && exit 1
save() {{
    printf 'PRIMARY=%s\\nSTATE_A=%s\\nSTATE_B=%s\\nCURRENT=%s\\n' $PRIMARY $STATE_A $STATE_B $CURRENT > $state.new
    mv $state.new $state
}}
case $1 in
get-primary) echo $PRIMARY ;;
set-primary) PRIMARY=$2; eval STATE_$2=good; save ;;
get-state) eval echo \\$STATE_$2 ;;
set-state) eval STATE_$2=$3; save ;;
get-current) echo $CURRENT ;;
*) exit 1 ;;
esac
"""
EXTENSIONS = """[req]
distinguished_name=name
[name]
[signer]
basicConstraints=CA:FALSE
keyUsage=digitalSignature
extendedKeyUsage=codeSigning,emailProtection
"""


def missing() -> str:
    """Why a real RAUC can't be had here; empty when it can."""
    for tool in ("rauc", "dbus-daemon", "mksquashfs", "unshare", "openssl"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if os.geteuid() != 0:
        return "needs root: RAUC mounts bundles"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return "unshare -m is not permitted here"
    return ""


class Signer:
    """An authority and a certificate of it that may sign bundles."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.authority, self.certificate, self.key = folder / "ca.pem", folder / "signer.pem", folder / "signer.key"
        (folder / "extensions").write_text(EXTENSIONS)
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        for command in (
            ["req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "30"],
            ["req", *curve, "-keyout", "signer.key", "-out", "signer.csr", "-subj", "/CN=signer"],
            [
                *["x509", "-req", "-in", "signer.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"],
                *["-days", "30", "-extfile", "extensions", "-extensions", "signer", "-out", "signer.pem"],
            ],
        ):
            subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)

    def bundle(self, path: Path, version: str, image: bytes, compatible: str = COMPATIBLE) -> Path:
        """A signed `plain` bundle with one image for the slots of class rootfs."""
        content = path.with_suffix(".content")
        content.mkdir()
        (content / "rootfs.img").write_bytes(image)
        (content / "manifest.raucm").write_text(
            f"[update]\ncompatible={compatible}\nversion={version}\n[bundle]\nformat=plain\n[image.rootfs]\nfilename=rootfs.img\n"
        )
        command = ["rauc", f"--cert={self.certificate}", f"--key={self.key}", "bundle", "--mksquashfs-args=-noI -noD"]
        subprocess.run([*command, str(content), str(path)], check=True, capture_output=True)
        shutil.rmtree(content)
        return path


def describe(bundle: Path, version: str, **changes: object) -> Manifest:
    """The manifest for a bundle."""
    data = bundle.read_bytes()
    return Manifest.model_validate(
        manifest_document(
            target="system",
            installer="rauc",
            name="system",
            version=version,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            restart="reboot",
            **changes,
        )
    )


@contextmanager
def bus(folder: Path, configuration: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A dbus-daemon that listens at `folder`/bus.sock."""
    text = configuration or BUS_CONFIGURATION.format(socket=folder / "bus.sock", policy=OPEN_POLICY)
    (folder / "bus.conf").write_text(text)
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", "--nopidfile", "--print-address"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert daemon.stdout
        assert daemon.stdout.readline().startswith(b"unix:path=")
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()
        if daemon.stdout:
            daemon.stdout.close()


@dataclass
class Camera:
    """A camera with two slots in a folder `name`, whose RAUC is found on the bus in `bus_folder`."""

    bus_folder: Path
    name: str
    signer: Signer
    slot_bytes: int = 4 * 2**20
    activate: bool = True
    folder: Path = field(init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.bus_folder / self.name
        (self.folder / "mnt").mkdir(parents=True)
        for slot in SLOTS:
            (self.folder / f"{slot}.img").write_bytes(b"factory".ljust(4096, b"\0"))
            os.truncate(self.folder / f"{slot}.img", self.slot_bytes)
        script = self.folder / "boot-loader"
        script.write_text(BOOT_LOADER.format(folder=self.folder))
        script.chmod(0o755)
        self.set_boot(PRIMARY="A", STATE_A="good", STATE_B="bad", CURRENT="A")
        self.set_up()

    @property
    def address(self) -> str:
        return f"unix:path={self.bus_folder / 'bus.sock'}"

    def set_up(self, compatible: str = COMPATIBLE, extra: str = "") -> None:
        """Write system.conf; RAUC reads it when it starts."""
        activate = "" if self.activate else "activate-installed=false"
        text = SYSTEM.format(
            folder=self.folder, compatible=compatible, authority=self.signer.authority, activate=activate
        )
        (self.folder / "system.conf").write_text(text + extra)

    @property
    def pid(self) -> int:
        """RAUC's process."""
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Start RAUC as it is after a boot from the slot CURRENT, and wait until it has its name."""
        command = ["unshare", "-m", "--propagation", "slave", "rauc", f"--conf={self.folder / 'system.conf'}"]
        with (self.folder / "rauc.log").open("ab") as out:
            self._process = subprocess.Popen(
                [*command, f"--override-boot-slot={self.boot()['CURRENT']}", "service"],
                env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": self.address},
                stdout=out,
                stderr=out,
            )
        until = time.monotonic() + NAME_TIMEOUT_S
        while b"true" not in self._asked("NameHasOwner", "de.pengutronix.rauc"):
            assert self._process.poll() is None, (self.folder / "rauc.log").read_text()
            assert time.monotonic() < until, "RAUC does not come up"

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End RAUC, as a power cut does."""
        if self._process:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def reboot(self) -> str:
        """Stop RAUC and start it from the slot that the boot loader starts next, which is returned."""
        self.stop()
        boot = self.boot()
        slot = boot["PRIMARY"] if boot[f"STATE_{boot['PRIMARY']}"] == "good" else "AB".replace(boot["PRIMARY"], "")
        self.set_boot(**boot | {"CURRENT": slot})
        self.start()
        return slot

    def boot(self) -> dict[str, str]:
        """What the boot loader knows."""
        return dict(line.split("=") for line in (self.folder / "boot.state").read_text().split())

    def hold_back(self, step: str = "pre-install") -> None:
        """From the next start on, RAUC waits in its `pre-install` or `post-install` handler until `let_go`."""
        handler = self.folder / "wait"
        handler.write_text(
            f"#!/bin/sh\ntouch {self.folder}/held\nwhile [ -d {self.folder} ] && [ ! -e {self.folder}/go ]; do sleep 0.02; done\n"
        )
        handler.chmod(0o755)
        self.set_up(extra=f"[handlers]\n{step}={handler}\n")

    @property
    def held(self) -> bool:
        return (self.folder / "held").exists()

    def let_go(self) -> None:
        (self.folder / "go").touch()

    def set_boot(self, **values: str) -> None:
        (self.folder / "boot.state").write_text("".join(f"{key}={value}\n" for key, value in values.items()))

    def marks(self) -> list[str]:
        """What was asked of the boot loader to change, in order."""
        log = self.folder / "boot.state.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith("set-")]

    def holds(self, slot: str, image: bytes) -> bool:
        with (self.folder / f"{slot}.img").open("rb") as file:
            return file.read(len(image)) == image

    def client(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run the command `rauc`, as somebody at the camera."""
        return subprocess.run(
            ["rauc", f"--conf={self.folder / 'system.conf'}", *arguments],
            env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": self.address},
            capture_output=True,
        )

    def _asked(self, method: str, name: str) -> bytes:
        command = ["dbus-send", f"--bus={self.address}", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
        result = subprocess.run(
            [*command, f"org.freedesktop.DBus.{method}", f"string:{name}"], check=True, capture_output=True
        )
        return result.stdout
