"""The boot loader of the virtual camera: which slot starts next, counting the attempts of one that is not proven."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

BLOCK = 4096
ATTEMPTS = 3


@dataclass(frozen=True)
class Variables:
    """What boot loader and RAUC's back-end share. A slot is `good`, or has so many attempts left; 0 is bad."""

    seq: int
    order: tuple[str, str]
    slots: dict[str, str]

    def words(self) -> str:
        return f"{self.order[0]} first, " + ", ".join(f"{slot} {state}" for slot, state in self.slots.items())


def initial(path: Path) -> None:
    """Slot A is good, B holds nothing."""
    path.write_bytes(bytes(2 * BLOCK))
    write(path, Variables(0, ("A", "B"), {"A": "good", "B": "0"}))


def read(path: Path) -> Variables:
    """The newer of the copies that are whole. Raises ValueError when none is."""
    raw = path.read_bytes()
    found = [seen for number in (0, 1) if (seen := _parse(raw[number * BLOCK :][:BLOCK]))]
    if not found:
        raise ValueError(f"{path}: neither copy of the boot variables is whole")
    return max(found, key=lambda variables: variables.seq)


def write(path: Path, variables: Variables) -> None:
    """Over the older copy."""
    body = (
        f"SEQ={variables.seq}\nORDER={' '.join(variables.order)}\nA={variables.slots['A']}\nB={variables.slots['B']}\n"
    )
    text = f"{body}SUM={hashlib.sha256(body.encode()).hexdigest()}\n".encode()
    with path.open("r+b") as file:
        file.seek(variables.seq % 2 * BLOCK)
        file.write(text.ljust(BLOCK, b"\0"))
        os.fsync(file.fileno())


def choose(path: Path) -> str:
    """The slot to start; one attempt less is left when it is not proven. Raises ValueError when nothing can start."""
    variables = read(path)
    for slot in variables.order:
        state = variables.slots[slot]
        if state == "good":
            return slot
        if int(state) > 0:
            slots = variables.slots | {slot: str(int(state) - 1)}
            write(path, replace(variables, seq=variables.seq + 1, slots=slots))
            return slot
    raise ValueError(f"no slot can be started: {variables.words()}")


def _parse(block: bytes) -> Variables | None:
    body, _, tail = block.rstrip(b"\0").partition(b"SUM=")
    if not tail or hashlib.sha256(body).hexdigest() != tail.decode(errors="replace").strip():
        return None
    values = dict(line.split("=", 1) for line in body.decode().splitlines())
    first, second = values["ORDER"].split()
    return Variables(int(values["SEQ"]), (first, second), {"A": values["A"], "B": values["B"]})
