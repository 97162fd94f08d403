"""The acts of an update one after the other, without engine, job or cloud: download, install, arm, then commit or roll back.

What is to be done next is kept in state.db before it is done, as `agent.updates.flow` does. Small and quick, so that it
also shows that the cutter finds what it is there to find.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agent.store import Store
from agent.updates.manifest import parse_envelope, parse_manifest
from agent.updates.part import Part
from agent.updates.preflight import discard_others
from agent.updates.slots import Slots
from tests.faults.powercut.artifacts import Artifact
from tests.faults.powercut.place import Place, tree

CHUNK = 8192
ACTS = ("download", "install", "arm", "commit", "tidy", "end")
ACTS_BACK = ("download", "install", "arm", "roll_back", "tidy", "end")


class LinkMadeAnew(Slots):
    """How not to do it: `current` is deleted and created."""

    def _point(self, link: str) -> None:
        self.current.unlink(missing_ok=True)
        self.current.symlink_to(link)


class Acts:
    """`way` is `commit` or `roll_back`, or `anew` for a commit with LinkMadeAnew."""

    def __init__(self, way: str) -> None:
        self._acts = ACTS_BACK if way == "roll_back" else ACTS
        self._slots = LinkMadeAnew if way == "anew" else Slots
        self.old, self.new = Artifact("1.0"), Artifact("2.0")

    def prepare(self, place: Place) -> None:
        slots = Slots(place.folder / "pipeline")
        manifest = _manifest(self.old)
        slots.install(self.old.write(place.world), manifest)
        slots.arm(manifest.sha256)
        slots.commit(manifest, None)
        self.new.write(place.world)

    def boot(self, place: Place) -> None:
        asyncio.run(self._boot(place))

    async def _boot(self, place: Place) -> None:
        slots = self._slots(place.folder / "pipeline")
        await asyncio.to_thread(self._look, place)
        store = await Store.open(place.folder / "state.db")
        place.expect(store.quarantined is None, "state.db was quarantined")
        kept = await store.read(lambda t: t.fact("act", self._acts[0]))
        said = place.world / "said"
        told = said.read_text() if said.exists() else self._acts[0]
        place.expect(self._acts.index(kept) >= self._acts.index(told), f"state.db says {kept}, but {told} was durable")
        for number in range(self._acts.index(kept), len(self._acts)):
            act = self._acts[number]
            await store.write(lambda t, act=act: t.set_fact("act", act))
            said.write_text(act)
            place.label(act)
            await asyncio.to_thread(self._do, act, slots, place)
        await store.close()
        await asyncio.to_thread(self._look_at_the_end, place)

    def _do(self, act: str, slots: Slots, place: Place) -> None:
        manifest, back = _manifest(self.new), f"slots/{self.old.sha256}"
        downloads = place.folder / "downloads"
        match act:
            case "download":
                self._download(place.world / self.new.name, downloads)
            case "install":
                if not (downloads / manifest.sha256).exists():
                    place.expect(False, "the finished download is gone")
                    self._download(place.world / self.new.name, downloads)
                slots.install(downloads / manifest.sha256, manifest)
            case "arm":
                slots.arm(manifest.sha256)
            case "commit":
                place.expect(slots.verify_running(manifest.sha256), "what was armed durably is not what runs")
                slots.commit(manifest, back)
            case "roll_back":
                slots.roll_back(back)
            case "tidy":
                wanted = self.old if "roll_back" in self._acts else self.new
                place.expect(slots.verify_running(wanted.sha256), f"{wanted.version} should run after {self._acts}")
                slots.clean_up(frozenset({back}))
                discard_others(downloads, "-")

    def _download(self, source: Path, downloads: Path) -> None:
        part = Part(downloads, self.new.sha256, self.new.size)
        try:
            if not part.complete():
                data = source.read_bytes()
                while part.offset < len(data):
                    part.append(data[part.offset : part.offset + CHUNK])
                assert part.finish()
        finally:
            part.close()

    def _look(self, place: Place) -> None:
        look_at_slots(place, place.folder / "pipeline", [self.old, self.new])

    def _look_at_the_end(self, place: Place) -> None:
        self._look(place)
        slots = place.folder / "pipeline" / "slots"
        kept = [self.old] if "roll_back" in self._acts else [self.old, self.new]
        names = {name for artifact in kept for name in (artifact.sha256, f"{artifact.sha256}.json")}
        left = {path.name for path in slots.iterdir()} ^ names
        left |= {path.name for path in (place.folder / "downloads").iterdir()}
        left |= {path.name for path in slots.parent.iterdir()} - {"slots", "current"}
        place.expect(not left, f"left over or missing at the end: {sorted(left)}")


def look_at_slots(place: Place, root: Path, versions: list[Artifact]) -> Artifact | None:
    """Which version `current` points to; a violation where it, or a slot that has its final name, is not whole."""
    whole: dict[str, Artifact] = {}
    for artifact in versions:
        slot = root / "slots" / artifact.sha256
        if slot.is_symlink() or slot.exists():
            broken = _differences(tree(slot), artifact.tree)
            place.expect(not broken, f"the slot of {artifact.version} is not whole: {broken}")
            if not broken:
                whole[f"slots/{artifact.sha256}"] = artifact
    current = root / "current"
    if not current.is_symlink():
        place.expect(False, "current is not there" if not current.exists() else "current is no link")
        return None
    link = str(current.readlink())
    place.expect(link in whole, f"current points to {link}, which is not whole")
    return whole.get(link)


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _manifest(artifact: Artifact) -> Any:
    return parse_manifest(parse_envelope(artifact.envelope()).payload)
