"""The work on a target's package that needs root: keep, install, restore, commit, forget. It believes nobody but itself.

Every artifact is copied to where only root writes, and verified there: signatures, target, floor, version, size, digest
and control fields. Each verb may be done again after a cut anywhere. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from agent.errors import FailedError, RefusedError
from agent.host.clock import clock_synchronised
from agent.updates import trust
from agent.updates.installers.deb_store import DebStore, Staged, State, Trust
from agent.updates.installers.dpkg import Dpkg, Status, read_control, unpacked_size
from agent.updates.manifest import Manifest
from agent.updates.records import believable_time
from agent.updates.trust import Installed, Verified

VERBS = ("keep", "install", "restore", "commit", "forget")
LOCK_WAIT_S = 60.0
"""Short: who waits is a process of its own. The agent tries again."""
POLL_S = 0.2


class DebWork:
    """The verbs, for one private dpkg and one store; `artifact_owners` are the users whose files are read as artifacts."""

    def __init__(
        self,
        store: DebStore,
        dpkg: Dpkg,
        *,
        keys_dir: Path,
        artifact_owners: frozenset[int] | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.store = store
        self.dpkg = dpkg
        self._keys_dir = keys_dir
        self._owners = frozenset({os.geteuid()}) if artifact_owners is None else artifact_owners
        self._lock_wait_s = lock_wait_s

    def do(self, verb: str, target: str, package: str, request: Mapping[str, Any]) -> str:
        """Do one verb for the target's package; what was done, in words. Raises RefusedError, FailedError, OSError."""
        with self._alone():
            if verb == "keep":
                return self._keep(target, package, request.get("envelope"), Path(str(request.get("artifact", ""))))
            if verb == "install":
                return self._install(target, package, str(request.get("sha256")))
            if verb == "restore":
                version = request.get("version")
                return self._restore(target, package, None if version is None else str(version))
            if verb == "commit":
                return self._commit(target, package, str(request.get("sha256")))
            if verb == "forget":
                return self._forget(target, str(request.get("sha256")))
        raise RefusedError("request_malformed", f"there is no verb {verb!r:.40}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.store.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        until = time.monotonic() + self._lock_wait_s
        descriptor = os.open(self.store.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "rb") as file:
            os.fchmod(descriptor, 0o600)  # whoever could read it could lock it
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise FailedError(
                            "deb_busy",
                            "another change of a package has not ended",
                            "see journalctl -u 'camera-agent-deb@*'",
                        ) from None
                    time.sleep(POLL_S)
            yield

    # ---- keep

    def _keep(self, target: str, package: str, envelope: Any, artifact: Path) -> str:
        verified = self._verify(envelope)
        manifest = verified.manifest
        if (manifest.target, manifest.installer) != (target, "deb"):
            raise RefusedError(
                "wrong_target", f"the manifest is for target {manifest.target} and installer {manifest.installer}"
            )
        state, status = self.store.state(target), self.dpkg.status(package)
        staged = state.staged
        if staged and staged.new.sha256 == manifest.sha256 and staged.phase in ("armed", "done"):
            return "it is being installed already"
        self._judge(verified, status, state)
        if not self.store.whole(target, manifest.sha256):
            self.store.take(target, artifact, owners=self._owners, signed=(manifest.size, manifest.sha256))
        deb = self.store.deb(target, manifest.sha256)
        try:
            self._check_package(deb, package, manifest.version)
            unpacked_size(deb, manifest.installed_size)
            self.dpkg.check_fit(deb, package)
            before = self._keep_before(target, package, status, state, manifest)
        except BaseException:
            if manifest.sha256 not in state.kept():
                deb.unlink(missing_ok=True)
            raise
        new = Staged(
            new=Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter),
            before=before,
            downgrade=status is not None and self.dpkg.newer(status.version, manifest.version),
            held=_held(status) or (staged is not None and staged.held and not (status and status.complete)),
            envelope=envelope,
        )
        self.store.save(target, replace(state, staged=new))
        return f"kept {package} {before.version if before else ''} and {manifest.version}"

    def _verify(self, envelope: Any) -> Verified:
        """Signatures count here as they do for the agent, with a root document, floors and time of root's own."""
        for path in (self._keys_dir, *self._keys_dir.glob("*root.json")):
            check_believed(path)
        kept = self.store.trust()
        root = trust.load_root(self._keys_dir, kept.root)
        now = believable_time(time.time(), kept.last_time, clock_synchronised)
        verified = trust.verify(envelope, root, now)
        known = Trust(dict(root.source), kept.floors, now or kept.last_time)
        self.store.save_trust(known)
        return verified

    def _judge(self, verified: Verified, status: Status | None, state: State) -> None:
        """Floor and version; a version that dpkg does not call newer needs the permission of the emergency role. Raises RefusedError."""
        manifest = verified.manifest
        floor = self.store.trust().floors.get(manifest.name, 0)
        installed = None
        if status:
            known = state.of_version(status.version) if status.complete else None
            installed = known or Installed(manifest.name, status.version, "")
            if installed.name == manifest.name:
                floor = max(floor, installed.security_counter)
        try:
            verdict = trust.check_version(verified, installed, floor)
        except RefusedError as error:
            if error.code != "version_unknown":  # one that only dpkg can order
                raise
            verdict = "install"
        permitted = manifest.allow_downgrade and "emergency" in verified.roles
        if status and verdict == "install" and not permitted and not self.dpkg.newer(manifest.version, status.version):
            raise RefusedError(
                "version_not_newer",
                f"{manifest.name} {manifest.version} is not newer than the installed {status.version}",
                "going back needs --allow-downgrade and an emergency signature",
            )

    def _check_package(self, deb: Path, package: str, version: str) -> None:
        control = read_control(deb)
        if control.package != package:
            _wrong_package(f"it is the package {control.package!r:.80}, the target's is {package}")
        if control.version != version:
            _wrong_package(f"it has version {control.version!r:.80}, not {version}")
        if control.architecture not in ("all", self.dpkg.architecture()):
            _wrong_package(f"it is built for {control.architecture!r:.40}, this is {self.dpkg.architecture()}")

    def _keep_before(
        self, target: str, package: str, status: Status | None, state: State, manifest: Manifest
    ) -> Installed | None:
        """The version to come back to, its .deb in the store if it is to be had at all."""
        if status is None:
            return None
        if state.staged and not status.complete:
            return state.staged.before  # that update was left half-way: what it replaced is the last that was whole
        version = status.version
        known = state.of_version(version)
        if known and self.store.whole(target, known.sha256):
            return known
        source = self.store.find(package, version)
        if source:
            check_believed(source)
            sha256 = self.store.take(target, source, owners=frozenset({0, os.geteuid()}))
            self._check_package(self.store.deb(target, sha256), package, version)
            counter = known.security_counter if known and known.sha256 == sha256 else 0
            return Installed(known.name if known else manifest.name, version, sha256, counter)
        if manifest.rollback == "yes":
            raise old_package_missing(package, version, self.store)
        return Installed(manifest.name, version, "")

    # ---- install

    def _install(self, target: str, package: str, sha256: str) -> str:
        state, status = self.store.state(target), self.dpkg.status(package)
        staged = state.staged
        if staged is None or staged.new.sha256 != sha256:
            if state.installed and state.installed.sha256 == sha256 and _runs(status, state.installed.version):
                return "it is installed and kept already"
            raise FailedError("not_staged", "this version was not kept for installing", "start the job again")
        new = staged.new
        if staged.phase == "done" and _runs(status, new.version):
            return "it is installed already"
        if staged.phase == "restoring":
            raise FailedError("not_staged", "the version before is coming back", "start a new job")
        if not self.store.whole(target, sha256):
            raise FailedError("package_damaged", f"the kept .deb of {new.version} is damaged", "start the job again")
        if staged.phase == "staged":
            self._judge(self._verify_kept(staged), status, replace(state, staged=None))
        self.store.save(target, replace(state, staged=replace(staged, phase="armed")))
        with self.dpkg.alone():
            self._finish_others(package)
            self.dpkg.install(self.store.deb(target, sha256), downgrade=staged.downgrade)
            if staged.held:
                self.dpkg.hold(package)
        status = self.dpkg.status(package)
        if not _runs(status, new.version):
            raise FailedError(
                "not_installed", f"dpkg ended well, but {package} {new.version} is not installed: {_words(status)}"
            )
        self.store.save(target, replace(state, staged=replace(staged, phase="done")))
        return f"{package} {new.version} is installed"

    def _verify_kept(self, staged: Staged) -> Verified:
        """What was verified when it was kept; it may have waited for a window since, so that its expiry does not count any more."""
        root = trust.load_root(self._keys_dir, self.store.trust().root)
        return trust.verify(staged.envelope, root, None)

    def _finish_others(self, package: str) -> None:
        """What a cut left of other packages, which dpkg would stumble over. Whether it mattered shows in what comes after."""
        names = [name for name in self.dpkg.unfinished() if name.split(":")[0] != package]
        if names:
            with contextlib.suppress(FailedError):
                self.dpkg.configure(names)

    # ---- restore

    def _restore(self, target: str, package: str, version: str | None) -> str:
        state, status = self.store.state(target), self.dpkg.status(package)
        there = status is None if version is None else _runs(status, version)
        if there and (state.staged is None or state.staged.phase == "staged"):
            self.store.save(target, replace(state, staged=None))
            return f"{package} {version or ''} is there as before"
        wanted = self._kept_as(target, state, version)
        self._check_floor(state, wanted)
        if version is not None and not (wanted and self.store.whole(target, wanted.sha256)):
            raise old_package_missing(package, version, self.store)
        if state.staged:
            state = replace(state, staged=replace(state.staged, phase="restoring"))
            self.store.save(target, state)
        with self.dpkg.alone():
            self._own_up(target, state.staged, status)
            if wanted:
                deb = self.store.deb(target, wanted.sha256)
                self._insist(package, lambda: self.dpkg.install(deb, downgrade=True), version)
            elif status:
                self._insist(package, lambda: self.dpkg.remove(package), None)
            self._finish_others(package)
            if self.dpkg.interrupted():
                self.dpkg.configure()
            if wanted and (state.staged.held if state.staged else _held(status)):
                self.dpkg.hold(package)
        status = self.dpkg.status(package)
        if not (status is None if version is None else _runs(status, version)):
            raise FailedError("not_installed", f"{package} {version or ''} did not come back: {_words(status)}")
        others = [known for known in (state.installed, state.previous) if known and known.version != version]
        self.store.save(target, State(installed=wanted, previous=others[0] if others else None))
        return f"{package} {version or ''} is back"

    def _check_floor(self, state: State, wanted: Installed | None) -> None:
        """Only the version that an update under way replaced may come back below the floor. Raises RefusedError counter_too_low."""
        staged = state.staged
        if wanted is None or (staged and staged.phase != "staged" and staged.before == wanted):
            return
        floor = self.store.trust().floors.get(wanted.name, 0)
        if wanted.security_counter < floor:
            raise RefusedError(
                "counter_too_low",
                f"{wanted.name} {wanted.version} has security counter {wanted.security_counter}, below {floor}",
                "it has known faults and is not installed again; send an update",
            )

    def _own_up(self, target: str, staged: Staged | None, status: Status | None) -> None:
        """Let dpkg know every file of a version whose unpacking was cut; of those it does not know it would leave some behind."""
        if staged and status and status.state == "half-installed" and self.store.whole(target, staged.new.sha256):
            with contextlib.suppress(FailedError):
                self.dpkg.unpack(self.store.deb(target, staged.new.sha256))

    def _kept_as(self, target: str, state: State, version: str | None) -> Installed | None:
        """What root itself kept under that version. Raises RefusedError when it kept none."""
        staged = state.staged
        if version is None:
            if staged and staged.before is None:
                return None
            raise RefusedError("not_kept", f"target {target} had a version before, its package is not removed")
        candidates = (staged.before if staged else None, state.previous, state.installed)
        found = [known for known in candidates if known and known.version == version]
        if not found:
            raise RefusedError("not_kept", f"version {version!r:.80} was not kept for target {target}")
        return next((known for known in found if self.store.whole(target, known.sha256)), found[0])

    def _insist(self, package: str, act: Callable[[], None], version: str | None) -> None:
        """Do it, if need be after finishing what is half done, at last without the scripts of the version that has to go."""
        before = self.dpkg.status(package)

        def came_about() -> bool:
            """Although dpkg failed, over something else: the trigger of another package, say."""
            now = self.dpkg.status(package)
            return now != before and (now is None if version is None else _runs(now, version))

        try:
            act()
            return
        except FailedError as error:
            if came_about():
                return
            hangs = error.code == "dpkg_hangs"
        if not hangs:
            with contextlib.suppress(FailedError):
                self.dpkg.configure()
            with contextlib.suppress(FailedError):
                act()
                return
        if came_about() or not self.dpkg.disarm_scripts(package):
            return
        act()

    # ---- commit, forget

    def _commit(self, target: str, package: str, sha256: str) -> str:
        state, status = self.store.state(target), self.dpkg.status(package)
        staged = state.staged
        if staged is None and state.installed and state.installed.sha256 == sha256:
            return "it is kept already"
        if staged is None or staged.new.sha256 != sha256 or staged.phase != "done":
            raise FailedError("not_staged", "this version was not installed by an update")
        if not _runs(status, staged.new.version):
            raise FailedError("not_installed", f"{package} {staged.new.version} is not there: {_words(status)}")
        self.store.raise_floor(staged.new.name, staged.new.security_counter)
        before = staged.before if staged.before and staged.before.sha256 else None
        self.store.save(target, State(installed=staged.new, previous=before))
        return f"{package} {staged.new.version} is kept"

    def _forget(self, target: str, sha256: str) -> str:
        state = self.store.state(target)
        if state.staged and state.staged.new.sha256 == sha256 and state.staged.phase == "staged":
            state = replace(state, staged=None)
        self.store.save(target, state)
        return "nothing of it is kept"


def old_package_missing(package: str, version: str, store: DebStore) -> RefusedError:
    return RefusedError(
        "old_package_missing",
        f"{package} {version} could not come back: its .deb is not on this camera",
        f"put it into {store.folder / 'seed'} (apt-get download {package}={version}), or sign with rollback = no",
    )


def check_believed(path: Path) -> None:
    """Whether only root, or who runs this, can change `path` or a folder above it. Raises RefusedError not_trusted."""
    believed = {0, os.geteuid()}
    for place in {*_chain(path.absolute()), *_chain(path.resolve())}:
        found = place.lstat()
        others_write = found.st_mode & 0o022 and not found.st_mode & 0o1000 and not place.is_symlink()
        if found.st_uid not in believed or others_write:
            raise RefusedError(
                "not_trusted", f"{place} can be changed by others than root", f"chown root {place}; chmod go-w {place}"
            )


def _chain(path: Path) -> tuple[Path, ...]:
    return (path, *path.parents)


def _held(status: Status | None) -> bool:
    return status is not None and status.want == "hold"


def _runs(status: Status | None, version: str) -> bool:
    return status is not None and status.complete and status.version == version


def _words(status: Status | None) -> str:
    return f"{status.version} is {status.state}" if status else "nothing is installed"


def _wrong_package(why: str) -> NoReturn:
    raise FailedError("wrong_package", f"the artifact is not the target's package: {why}", "sign the right .deb")
