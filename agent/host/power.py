"""What the camera runs on, by the kernel's power supplies; a camera without a battery has nothing to tell. Blocking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BATTERIES = ("Battery", "UPS")
MAINS = ("Mains", "USB", "Wireless")
READ_LIMIT = 64


@dataclass(frozen=True)
class Battery:
    """The camera's batteries together: `percent` is their charge, 0-100."""

    percent: float
    discharging: bool
    """It runs on them: one is being discharged, and nothing that could charge it is on-line."""


def battery(sys: Path = Path("/sys")) -> Battery | None:
    """The batteries of the camera itself; None when there is none that tells its charge."""
    try:
        folders = sorted((sys / "class/power_supply").iterdir())
    except OSError:
        return None
    supplies = [_read(folder) for folder in folders]
    batteries = [s for s in supplies if s["type"] in BATTERIES and s["scope"] != "Device" and s["present"] != "0"]
    charges = [charge for supply in batteries if (charge := _percent(supply)) is not None]
    if not charges:
        return None
    powered = any(s["type"] in MAINS and s["online"] not in ("", "0") for s in supplies)
    discharging = any(s["status"] == "Discharging" for s in batteries)
    return Battery(sum(charges) / len(charges), discharging and not powered)


FILES = (
    "type",
    "scope",
    "present",
    "online",
    "status",
    "capacity",
    "energy_now",
    "energy_full",
    "charge_now",
    "charge_full",
)


def _read(folder: Path) -> dict[str, str]:
    return {name: _text(folder / name) for name in FILES}


def _percent(supply: Mapping[str, str]) -> float | None:
    """The charge as the gauge says it, else reckoned from what is in the battery and what fits."""
    found = _number(supply["capacity"])
    for now, full in (("energy_now", "energy_full"), ("charge_now", "charge_full")):
        most, left = _number(supply[full]), _number(supply[now])
        if found is None and most and left is not None:
            found = 100 * left / most
    return None if found is None else min(max(found, 0.0), 100.0)


def _number(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() else None


def _text(file: Path) -> str:
    """The file's only line; empty where it is missing or its device is gone."""
    try:
        with file.open("rb") as opened:
            return opened.read(READ_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""
