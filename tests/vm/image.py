"""What the virtual camera is made of: kernel, Debian, the agent with its libraries, slot images and RAUC bundles."""

from __future__ import annotations

import compileall
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTFS = Path(__file__).parent / "rootfs"
PACKAGES = "systemd-sysv,udev,kmod,dbus,python3,rauc,rauc-service"
LIBRARIES = ("aiohttp", "cryptography", "dbus-fast", "pydantic", "structlog")
MODULES = ("drivers/block/loop.ko", "drivers/block/virtio_blk.ko", "drivers/md", "drivers/net/virtio_net.ko", "drivers/net/net_failover.ko",
           "drivers/virtio", "fs/squashfs", "fs/autofs", "fs/binfmt_misc.ko", "lib", "crypto", "net/core/failover.ko")  # fmt: skip
USELESS = (
    "usr/lib/*/perl", "usr/lib/*/libperl*", "usr/share/perl", "usr/share/zoneinfo", "usr/lib/*/gconv", "usr/share/i18n",
    "var/lib/dpkg/info", "var/lib/apt", "var/cache", "etc/systemd/system/timers.target.wants",
    "etc/systemd/system/getty.target.wants", "etc/systemd/system/multi-user.target.wants/e2scrub_reap.service",
    "usr/lib/udev/hwdb.d", "usr/lib/udev/hwdb.bin", "usr/bin/perl*", "usr/lib/*/perl-base", "usr/lib/*/libapt-pkg*", "boot",
)  # fmt: skip
MASKED = (
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "systemd-binfmt.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
    "systemd-pstore.service", "systemd-user-sessions.service", "modprobe@configfs.service", "modprobe@efi_pstore.service",
    "modprobe@fuse.service", "modprobe@drm.service", "e2scrub_reap.service", "systemd-random-seed.service",
)  # fmt: skip
SLOT_BYTES = 200 << 20
DATA_BYTES = 512 << 20


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return what it says. Raises RuntimeError with its words when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def kernel(cache: Path) -> tuple[Path, str]:
    """Debian's cloud kernel, unpacked in the cache and not installed: the image and its release."""
    meta = run("apt-cache", "depends", "--important", "linux-image-cloud-amd64")
    package = next(line.split()[-1] for line in meta.splitlines() if "Depends: linux-image-" in line)
    folder = cache / package
    if not folder.exists():
        work = cache / "kernel.tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=work)
        run("dpkg-deb", "-x", next(work.glob("*.deb")), work / "files")
        (work / "files").rename(folder)
        shutil.rmtree(work)
    image = next((folder / "boot").glob("vmlinuz-*"))
    return image, image.name.removeprefix("vmlinuz-")


def debian(cache: Path, modules: Path, release: str) -> Path:
    """A minimal Debian 12 with systemd, D-Bus, RAUC and the few kernel modules it needs; made once."""
    stamp = hashlib.sha256(repr((PACKAGES, MODULES, USELESS, release)).encode()).hexdigest()[:12]
    root = cache / f"debian-{stamp}"
    if root.exists():
        return root
    work = cache / "debian.tmp"
    shutil.rmtree(work, ignore_errors=True)
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", *excluded, "bookworm", work)
    for pattern in USELESS:
        for path in work.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (work / "data").mkdir()
    target = work / "lib" / "modules" / release
    for name in MODULES:
        place = modules / "kernel" / name
        into = target / "kernel" / name
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(place, into) if place.is_dir() else shutil.copy(place, into)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(modules / name, target)
    run("chroot", work, "depmod", release)
    (work / "etc/machine-id").write_text("")
    (work / "etc/hostname").write_text("camera-vm\n")
    work.rename(root)
    return root


def closure(names: Iterable[str]) -> list[Distribution]:
    """These libraries and all they need, as they are installed beside this Python."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name.lower() in found:
            continue
        found[name.lower()] = library = distribution(name)
        for text in library.requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return list(found.values())


def add_agent(tree: Path) -> None:
    """The agent and its libraries into /opt/camera-agent."""
    site = tree / "opt" / "camera-agent"
    site.mkdir(parents=True)
    shutil.copytree(REPOSITORY / "agent", site / "agent", ignore=shutil.ignore_patterns("__pycache__", "sandbox"))
    for library in closure(LIBRARIES):
        for file in library.files or []:
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                into = site.joinpath(*file.parts)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), into)
    compileall.compile_dir(site, stripdir=str(tree), quiet=2, workers=1)


class Images:
    """Slot images of any number of versions, and bundles of them, all in one folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self._tree = folder / "tree"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run("cp", "-al", base, self._tree)
        for source in (path for path in ROOTFS.rglob("*") if path.is_file()):
            self._put(str(source.relative_to(ROOTFS)), source.read_bytes(), mode=source.stat().st_mode & 0o777)
        for unit in MASKED:
            (self._tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
        wants = self._tree / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(parents=True, exist_ok=True)
        (wants / "camera-vm.service").symlink_to("/etc/systemd/system/camera-vm.service")
        (wants / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")
        add_agent(self._tree)
        self._make_keys()
        self._first = self._make("1")

    def image(self, version: str, *, broken: str = "") -> Path:
        """A slot image. `broken`: `boot` has no init, `probe` starts with a probe that fails, `agent` never starts ours."""
        if version == "1" and not broken:
            return self._first
        image = self.folder / f"slot-{version}.img"
        run("cp", "--sparse=always", self._first, image)
        changes = {"/etc/image-version": version, "/etc/image-broken": broken}
        commands = []
        for name, text in changes.items():
            (self.folder / "text").write_text(f"{text}\n")
            commands += [f"rm {name}", f"write {self.folder / 'text'} {name}"]
            self._debugfs(image, commands)
            commands = []
        if broken == "boot":
            self._debugfs(image, ["rm /usr/sbin/init", "rm /usr/lib/systemd/systemd", "rm /bin/sh", "rm /usr/bin/sh"])
        if broken == "agent":
            self._debugfs(image, ["rm /etc/systemd/system/multi-user.target.wants/camera-vm.service"])
        return image

    def bundle(self, version: str, *, form: str = "verity", broken: str = "") -> Path:
        """A bundle signed by the camera's own authority."""
        content = self.folder / f"content-{version}"
        content.mkdir()
        self.image(version, broken=broken).rename(content / "rootfs.img")
        (content / "manifest.raucm").write_text(
            f"[update]\ncompatible=camera-vm\nversion={version}\n\n[bundle]\nformat={form}\n\n"
            "[image.rootfs]\nfilename=rootfs.img\n"
        )
        bundle = self.folder / f"{version}-{form}.raucb"
        certificate, key, authority = (self.folder / name for name in ("cert.pem", "key.pem", "keyring.pem"))
        run("rauc", "bundle", f"--cert={certificate}", f"--key={key}", f"--keyring={authority}",
            "--mksquashfs-args=-comp lz4 -processors 2", content, bundle)  # fmt: skip
        (self.folder / f"slot-{version}.sha256").write_text(digest(content / "rootfs.img"))
        shutil.rmtree(content)
        return bundle

    def disks(self, folder: Path) -> None:
        """The disks of a new camera: version 1 in slot A, nothing in B, an empty data partition."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run("cp", "--sparse=always", self._first, folder / "A.img")
        with (folder / "B.img").open("wb") as file:
            file.truncate(SLOT_BYTES)
        run("mke2fs", "-q", "-t", "ext4", folder / "data.img", f"{DATA_BYTES >> 10}k")

    def digest(self, version: str) -> str:
        """SHA-256 of a slot that holds this version."""
        return (self.folder / f"slot-{version}.sha256").read_text()

    def _make(self, version: str) -> Path:
        self._put("etc/image-version", f"{version}\n".encode())
        self._put("etc/image-broken", b"\n")
        image = self.folder / f"slot-{version}.img"
        run(
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-b",
            "4096",
            "-i",
            "16384",
            "-d",
            self._tree,
            image,
            f"{SLOT_BYTES >> 10}k",
        )
        (self.folder / f"slot-{version}.sha256").write_text(digest(image))
        return image

    def _make_keys(self) -> None:
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=camera-vm authority",
            "-keyout", self.folder / "authority.key", "-out", self.folder / "keyring.pem")  # fmt: skip
        run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=camera-vm release",
            "-keyout", self.folder / "key.pem", "-out", self.folder / "request.pem")  # fmt: skip
        extensions = self.folder / "extensions"
        extensions.write_text("extendedKeyUsage=codeSigning,emailProtection\nkeyUsage=digitalSignature\n")
        run("openssl", "x509", "-req", "-in", self.folder / "request.pem", "-CA", self.folder / "keyring.pem",
            "-CAkey", self.folder / "authority.key", "-days", "30", "-extfile", extensions,
            "-out", self.folder / "cert.pem")  # fmt: skip
        self._put("etc/rauc/keyring.pem", (self.folder / "keyring.pem").read_bytes())
        run(sys.executable, REPOSITORY / "scripts" / "sign-update", "keys", self.folder / "keys")
        self._put("etc/camera-agent/update-keys/root.json", (self.folder / "keys" / "root.json").read_bytes())

    def _put(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        """Into the tree, without touching what is linked to it."""
        path = self._tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def _debugfs(self, image: Path, commands: list[str]) -> None:
        script = self.folder / "debugfs"
        script.write_text("\n".join(commands) + "\n")
        run("debugfs", "-w", "-f", script, image)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
