"""Reading and judging agent.toml, with words that a person can act on; and the copy of one that worked, for when it does not."""

from __future__ import annotations

import contextlib
import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.errors import SettingsError
from agent.host.files import write_atomic
from agent.setting_keys import explain
from agent.settings import Settings

KEPT = "agent.toml.good"
"""In the state folder: the file with which the camera was last on-line."""
DEFAULT_STATE_DIR = Path("/var/lib/camera-agent")


@dataclass(frozen=True)
class Site:
    """agent.toml as the agent runs with it: its text, parsed, and validated.

    `problem` says why the file itself can't be used, where this is the copy of one with which the camera was on-line at
    `kept_at` (epoch seconds).
    """

    text: str
    document: dict[str, Any]
    settings: Settings
    problem: str = ""
    kept_at: float = 0.0


def read_site(path: Path) -> Site:
    """Read and validate agent.toml. Raises SettingsError."""
    text = _read(path)
    document = _parse(text, path)
    return Site(text, document, validate(document, str(path)))


def read_site_or_kept(path: Path) -> Site:
    """The same, but the copy that is kept where the file can't be used: a slip in it must not lose the camera.

    Raises SettingsError where there is no copy that can be used either.
    """
    try:
        own = read_site(path)
    except SettingsError as error:
        if kept := _kept(path, error.message):
            return kept
        raise
    if own.settings.cloud.endpoint:
        return own
    kept = _kept(path, f"{path}: names no cloud.endpoint; it seems to be cut off")
    return kept if kept and kept.settings.cloud.endpoint else own


def _kept(path: Path, problem: str) -> Site | None:
    for folder in _state_dirs(path):
        kept = folder / KEPT
        with contextlib.suppress(SettingsError, OSError):
            return replace(read_site(kept), problem=problem, kept_at=kept.stat().st_mtime)
    return None


def keep(site: Site) -> None:
    """Keep the text of a file that has brought the camera on-line. Blocking; raises OSError."""
    place = site.settings.paths.state_dir / KEPT
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if place.read_text(encoding="utf-8") == site.text:
            return
    write_atomic(place, site.text.encode(), 0o600)


def _state_dirs(path: Path) -> list[Path]:
    """Where the state folder may be, as far as that can be told of a file that can't be used."""
    found = [Path(folder) for folder in os.environ.get("STATE_DIRECTORY", "").split(":") if folder]
    with contextlib.suppress(SettingsError, KeyError, TypeError):
        found.insert(0, Path(read_document(path)["paths"]["state_dir"]))
    return [*found, DEFAULT_STATE_DIR]


def read_document(path: Path) -> dict[str, Any]:
    """The parsed TOML of `path`. Raises SettingsError for a missing, unreadable or malformed file."""
    return _parse(_read(path), path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(
            "settings_missing", f"{path}: no such file", "create it, or name it with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            "settings_unreadable", f"{path}: {error}", "make it a UTF-8 file the agent may read"
        ) from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError("settings_syntax", f"{path}: not valid TOML: {error}", "mend the line it names") from None


def validate(document: dict[str, Any], origin: str) -> Settings:
    """The settings in `document`. Raises SettingsError with one line that names each wrong key and `origin`."""
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        problems = [f"{'.'.join(key)}: {words}" for key, words in explain(error)]
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in "; ".join(problems))
        raise SettingsError("settings_invalid", f"{origin}: {line}", "correct or remove the key") from None


def load(path: Path) -> Settings:
    """Read and validate agent.toml. Raises SettingsError."""
    return read_site(path).settings
