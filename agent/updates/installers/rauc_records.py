"""What is in RAUC's slots, as far as it was installed by this agent: one small file, replaced as a whole. Reading and writing block.

A file that can't be read is put aside: then nothing is known of any slot, and everything is installed anew.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from agent.host.files import write_atomic
from agent.host.rauc import RaucSlot
from agent.logs import get_logger
from agent.updates.trust import Installed

log = get_logger("updates")

Progress = Literal["installing", "installed", "good", "bad"]
Stamp = tuple[str, int]


@dataclass(frozen=True)
class Known:
    """What is known of one slot.

    `installing`: begun by RAUC's process `instance`, the end is not known. `installed`: whole, not proven. `good`: it ran
    well; without `software` it is what the camera left the factory with. `bad`: whole, and taken back.
    `stamps` are RAUC's times of writing, for the slot and those that belong to it, when that was true.
    """

    state: Progress
    software: Installed | None
    stamps: dict[str, Stamp] = field(default_factory=dict)
    instance: str = ""

    @property
    def whole(self) -> bool:
        return self.state != "installing"

    def holds(self, sha256: str) -> bool:
        return self.software is not None and self.software.sha256 == sha256


@dataclass(frozen=True)
class Book:
    """All that is known; `booted` is the slot that ran when RAUC's BootSlot was `boot_slot`."""

    slots: dict[str, Known] = field(default_factory=dict)
    boot_slot: str = ""
    booted: str = ""

    def of(self, sha256: str) -> list[tuple[str, Known]]:
        """The slots that hold an artifact, whole or not."""
        return [(name, entry) for name, entry in self.slots.items() if entry.holds(sha256)]

    def software(self, slot: str) -> Installed | None:
        entry = self.slots.get(slot)
        return entry.software if entry and entry.whole else None

    def having(self, slot: str, entry: Known) -> Book:
        return replace(self, slots={**self.slots, slot: entry})

    def only(self, slots: Collection[str]) -> Book:
        return replace(self, slots={name: entry for name, entry in self.slots.items() if name in slots})

    def believed(self, slots: tuple[RaucSlot, ...]) -> Book:
        """Without the slots that somebody else has written to since."""
        foreign = {name for name, entry in self.slots.items() if entry.whole and _written_since(entry, slots, name)}
        if foreign:
            log.warning("slots were written to by somebody else", slots=sorted(foreign))
        return self.only(self.slots.keys() - foreign)

    def taken_back(self, away: str, *, for_good: str) -> Book:
        """After going back from slot `away` to `for_good`, which may be the return to a slot that was once left."""
        changed = dict(self.slots)
        if away in changed and changed[away].whole:
            changed[away] = replace(changed[away], state="bad")
        if for_good in changed and changed[for_good].state == "bad":
            changed[for_good] = replace(changed[for_good], state="good")
        return replace(self, slots=changed)


class Records:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Book:
        try:
            return _parse(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return Book()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.error(
                "the record of RAUC's slots can't be read, it is put aside", file=str(self._path), reason=str(error)
            )
            self._path.replace(self._path.with_name(f"{self._path.name}.unreadable"))
            return Book()

    def write(self, book: Book) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps({"schema": 1, **asdict(book)}, indent=1).encode())


def group_stamps(slots: Iterable[RaucSlot], name: str) -> dict[str, Stamp]:
    """RAUC's times of writing for a slot and those that belong to it, as far as it has them."""
    return {slot.name: slot.stamp for slot in slots if name in (slot.name, slot.parent) and slot.stamp}


def _written_since(entry: Known, slots: tuple[RaucSlot, ...], name: str) -> bool:
    """By its count of installations. RAUC's status file may have been lost or gone back in a power cut: that says nothing."""
    for slot, (when, count) in group_stamps(slots, name).items():
        then, before = entry.stamps.get(slot, ("", 0))
        if count > before or (count == before and when != then):
            return True
    return False


def _parse(document: Any) -> Book:
    if document["schema"] != 1:
        raise ValueError("its schema is not 1")
    slots = {str(name): _entry(values) for name, values in document["slots"].items()}
    return Book(slots, str(document["boot_slot"]), str(document["booted"]))


def _entry(values: Any) -> Known:
    if values["state"] not in get_args(Progress):
        raise ValueError(f"state {values['state']} is not known")
    software = values["software"]
    stamps = {str(slot): (str(when), int(count)) for slot, (when, count) in values["stamps"].items()}
    return Known(
        values["state"],
        Installed(
            str(software["name"]), str(software["version"]), str(software["sha256"]), int(software["security_counter"])
        )
        if software
        else None,
        stamps,
        str(values["instance"]),
    )
