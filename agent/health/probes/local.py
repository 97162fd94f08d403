"""Checks on the camera itself: configuration, identity, clock, disks and capture sources."""

from __future__ import annotations

import fnmatch
import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.health.probes.model import ConfigProblem, Outcome, Site

MIB = 2**20
GIB = 2**30
# No camera with this program existed earlier, so a clock before it has lost its time.
OLDEST_TIME = datetime(2025, 1, 1, tzinfo=UTC).timestamp()
LATEST_TIME = datetime(2060, 1, 1, tzinfo=UTC).timestamp()
SCAN_LIMIT_S = 2.0
PROVISION = "sudo camera-agent provision --config {path}"


def check_config(site: Site) -> Outcome:
    """agent.toml can be read and parsed, and the keys used here have the right types."""
    host, _ = site.endpoint
    for name in ("state_dir", "socket_path", "certificate_file", "private_key_file", "ca_file", "first_hop"):
        getattr(site, name)
    for name, table in site.sources.items():
        if not isinstance(table.get("directory"), str):
            raise ConfigProblem(f"{site.config_path}: capture.sources.{name}.directory is missing")
    if not host:
        return Outcome(
            "warn",
            f"{site.config_path}: cloud.endpoint is empty",
            "the agent works off-line and reports nothing",
            f"set cloud.endpoint in {site.config_path}: `aws iot describe-endpoint --endpoint-type iot:Data-ATS`",
        )
    return Outcome("pass", str(site.config_path))


def check_clock(site: Site) -> Outcome:
    """The time is possible, and the kernel follows NTP."""
    now = site.now()
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if 0 <= now < 2**36 else f"{now:.0f} s"
    remedy = (
        "check NTP: `timedatectl`, `timedatectl timesync-status`; once by hand: `sudo date -u -s 'YYYY-MM-DD HH:MM'`"
    )
    if not OLDEST_TIME <= now <= LATEST_TIME:
        return Outcome(
            "fail", f"the clock says {shown}", "no certificate is valid at this time, so nothing connects", remedy
        )
    begin = _not_before(site)
    if begin is not None and now < begin - 86400:
        return Outcome(
            "fail",
            f"the clock says {shown}, earlier than this camera's certificate was made",
            "the clock is behind, so no certificate is valid yet",
            remedy,
        )
    synchronised = (site.clock_synchronised or _kernel_clock_synchronised)()
    if synchronised is False:
        return Outcome(
            "warn", f"{shown}, not synchronised by NTP", "the clock drifts, and times in reports with it", remedy
        )
    return Outcome("pass", shown + (", synchronised" if synchronised else ""))


def _not_before(site: Site) -> float | None:
    from agent.health.probes.certificates import validity

    try:
        return validity(site.certificate_file.read_text(encoding="ascii", errors="replace"))[0]
    except (OSError, ValueError, ConfigProblem):
        return None


def _kernel_clock_synchronised() -> bool | None:
    """adjtimex(2) without changing anything: STA_UNSYNC (0x40) is cleared by whoever disciplines the clock."""
    import ctypes

    buffer = (ctypes.c_char * 512)()
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(buffer))
    if state < 0:
        return None
    # struct timex: modes (int, padded), offset, freq, maxerror, esterror (long each), status (int).
    status = ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & 0x40


def check_identity(site: Site) -> Outcome:
    """Certificate and private key are there, readable, and private."""
    from agent.health.probes.certificates import validity

    remedy = PROVISION.format(path=site.config_path)
    for file in (site.certificate_file, site.private_key_file):
        try:
            text = file.read_text(encoding="ascii", errors="replace")
        except PermissionError:
            return _may_not_read(file)
        except OSError as error:
            return Outcome("fail", f"{file}: {error.strerror}", "this camera has no identity in AWS IoT", remedy)
        if file == site.certificate_file:
            try:
                validity(text)
            except ValueError as error:
                return Outcome("fail", f"{file}: {error}", "the certificate can't be used", remedy)
        elif "PRIVATE KEY-----" not in text:
            return Outcome("fail", f"{file}: it holds no PEM private key", "the private key can't be used", remedy)
    mode = stat.S_IMODE(site.private_key_file.stat().st_mode)
    if mode & 0o077:
        return Outcome(
            "warn",
            f"{site.private_key_file} has mode {mode:04o}",
            "other users of this camera can read its private key",
            f"sudo chmod 600 {site.private_key_file}",
        )
    return Outcome("pass", str(site.certificate_file))


def check_certificate(site: Site) -> Outcome:
    """The device certificate is valid now and for another month."""
    from agent.health.probes.certificates import validity

    try:
        begin, end = validity(site.certificate_file.read_text(encoding="ascii", errors="replace"))
    except PermissionError:
        return _may_not_read(site.certificate_file)
    now, until = site.now(), datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%d")
    remedy = PROVISION.format(path=site.config_path)
    if now > end:
        return Outcome("fail", f"it expired on {until}", "the cloud refuses this camera", remedy)
    if now < begin:
        since = datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return Outcome(
            "fail", f"it is not valid before {since}", "the camera's clock may be behind", "see `timedatectl`"
        )
    if end - now < 30 * 86400:
        return Outcome("warn", f"it expires on {until}", "soon the cloud will refuse this camera", remedy)
    return Outcome("pass", f"valid until {until}")


def check_key(site: Site) -> Outcome:
    """The private key belongs to the certificate."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            site.certificate_file, site.private_key_file, password=""
        )
    except PermissionError:
        return _may_not_read(site.private_key_file)
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        return Outcome(
            "fail",
            "the private key is not the certificate's"
            if mismatch
            else f"they can't be loaded: {error.reason or error}",
            "the camera can't prove its identity",
            PROVISION.format(path=site.config_path),
        )
    return Outcome("pass", "it belongs to the certificate")


def check_disk(site: Site) -> Outcome:
    """Space, inodes and write access of the file systems of the state and of the sources."""
    worst = Outcome("pass", "")
    seen, devices = [], set()
    for folder in [site.state_dir, *(Path(str(table["directory"])) for table in site.sources.values())]:
        place = _nearest_existing(folder)
        device = place.stat().st_dev
        if device in devices:
            continue
        devices.add(device)
        outcome = _check_space(place)
        seen.append(outcome.seen)
        if ("pass", "warn", "fail").index(outcome.status) > ("pass", "warn", "fail").index(worst.status):
            worst = outcome
    return Outcome(worst.status, "; ".join(seen), worst.meaning, worst.remedy)


def _check_space(place: Path) -> Outcome:
    usage = os.statvfs(place)
    total, free = usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize
    words = f"{free / MIB:.0f} MiB of {total / MIB:.0f} MiB free at {place}"
    clean = f"see what grows: `sudo du -xh --max-depth=2 {place} | sort -h | tail`, and delete or move it"
    if usage.f_flag & os.ST_RDONLY:
        return Outcome(
            "fail",
            f"{place} is on a read-only file system",
            "nothing can be saved there; the kernel does this when a disk fails",
            "see `sudo dmesg | grep -iE 'ext4|mmc|I/O error'`, then check or replace the disk",
        )
    if usage.f_files and usage.f_favail / usage.f_files < 0.05:
        few = usage.f_favail < 100
        words = f"{usage.f_favail} of {usage.f_files} inodes free at {place}"
        return Outcome("fail" if few else "warn", words, "too many files; soon none can be created", clean)
    if free < 16 * MIB:
        return Outcome("fail", words, "the disk is full: no state, report or image can be saved", clean)
    if free < 0.1 * total or (total >= GIB and free < 256 * MIB):
        return Outcome("warn", words, "the disk is nearly full", clean)
    return Outcome("pass", words)


def check_capture(site: Site) -> Outcome:
    """Each source's folder is there and readable, and its newest image is not older than it should be."""
    sources = site.sources
    if not sources:
        return Outcome("skip", "no capture source is configured")
    outcomes = [_check_source(site, name, table) for name, table in sources.items()]
    seen = "; ".join(outcome.seen for outcome in outcomes)
    for status in ("fail", "warn"):
        for outcome in outcomes:
            if outcome.status == status:
                return Outcome(outcome.status, seen, outcome.meaning, outcome.remedy)
    return Outcome("skip" if all(outcome.status == "skip" for outcome in outcomes) else "pass", seen)


def _check_source(site: Site, name: str, table: dict[str, Any]) -> Outcome:
    directory = Path(str(table["directory"]))
    pattern = str(table.get("pattern", "*.jpg"))
    interval = float(table.get("interval_s", 1.0))
    look = f"is the capture pipeline running? `systemctl list-units '*capture*'`, `ls -lt {directory} | head`"
    try:
        if not directory.is_dir():
            return Outcome("fail", f"{name}: {directory} does not exist", "no image can arrive there", look)
        newest = _newest_image(directory, pattern)
    except PermissionError as error:
        if os.geteuid() != 0:
            return Outcome("skip", f"{name}: this user may not read {error.filename or directory}")
        return Outcome("fail", f"{name}: {error.filename or directory} may not be read", "images can't be seen", look)
    if newest is None:
        return Outcome("fail", f"{name}: no {pattern} in {directory}", "the pipeline has written no image yet", look)
    age = max(site.now() - newest, 0)
    words = f"{name}: newest image {_duration(age)} old"
    if age > max(3 * interval, 60):
        return Outcome(
            "fail", f"{words}, expected every {interval:g} s", "the pipeline has stopped writing images", look
        )
    return Outcome("pass", words)


def _newest_image(directory: Path, pattern: str) -> float | None:
    """Modification time of the newest file that matches; the newest folders are searched first, for two seconds at most."""
    give_up = time.monotonic() + SCAN_LIMIT_S
    newest: float | None = None
    for entry in _files(directory, give_up):
        if fnmatch.fnmatch(entry.name, pattern):
            try:
                modified = entry.stat().st_mtime
            except FileNotFoundError:
                continue
            newest = modified if newest is None else max(newest, modified)
    return newest


def _files(directory: Path, give_up: float) -> Iterator[os.DirEntry[str]]:
    folders = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if time.monotonic() > give_up:
                return
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
            elif entry.is_file():
                yield entry
    for _, folder in sorted(folders, reverse=True):
        if time.monotonic() > give_up:
            return
        try:
            yield from _files(Path(folder), give_up)
        except FileNotFoundError:
            continue


def _may_not_read(file: Path) -> Outcome:
    if os.geteuid() == 0:
        return Outcome("fail", f"{file}: permission denied", "the file can't be read", f"ls -l {file}")
    return Outcome("skip", f"this user may not read {file}; use sudo to check it")


def _nearest_existing(path: Path) -> Path:
    while not os.access(path, os.F_OK) and path != path.parent:
        path = path.parent
    return path


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
