"""A configuration document written as JSON, TOML, INI or environment file: without a change of meaning, or not at all. Pure."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from agent.errors import RefusedError

MAX_INTEGER = 2**63
OTHERWISE = 'use format "json" or "toml" for such a document'

PLAIN_VALUE = re.compile(r"[A-Za-z0-9_./:,@%+-]+")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SHELL_VARIABLES = re.compile(
    r"_|BASH.*|COMP_.*|DIRSTACK|ENV|EPOCH(REALTIME|SECONDS)|E?UID|FUNCN(AME|EST)|GROUPS|HISTCMD|IFS|LINENO|OPT(ARG|ERR|IND)"
    r"|PIPESTATUS|PPID|(OLD)?PWD|S?RANDOM|SECONDS|SHELLOPTS|SHLVL"
)


class FormatError(RefusedError):
    """A document that `syntax` can't hold; `path` leads to the key in question, empty for the whole."""

    def __init__(self, path: tuple[str, ...], syntax: str, reason: str, hint: str = OTHERWISE) -> None:
        where = f"{'.'.join(path)[:100]} " if path else ""
        super().__init__("target_format", f"{where}can't be written as {syntax}: {reason}", hint)
        self.path = path


def render(document: Mapping[str, Any], syntax: str) -> bytes:
    """The content of a file in `syntax` (`json`, `toml`, `ini`, `env`), UTF-8, in the document's order.

    Whoever reads it gets what the document says. INI is `{section: {key: scalar}}`, env `{NAME: scalar}`; there a value is
    text: `true` and `false`, numbers in their shortest exact form. Raises RefusedError `target_format`, a FormatError.
    """
    writers: dict[str, Callable[[Mapping[str, Any]], str]] = {"json": _json, "toml": _toml, "ini": _ini, "env": _env}
    if syntax not in writers:
        raise RefusedError("target_format", f"there is no format {syntax!r}", f"use one of {', '.join(writers)}")
    try:
        _refuse_what_no_file_holds(document, (), syntax)
        return writers[syntax](document).encode()
    except RecursionError:
        raise FormatError((), syntax, "it is nested too deep", "make it flatter") from None


def _refuse_what_no_file_holds(value: Any, path: tuple[str, ...], syntax: str) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str) or _has_surrogates(key):
                raise FormatError(path, syntax, "it has a key that is not Unicode text", "rename the key")
            _refuse_what_no_file_holds(below, (*path, key), syntax)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_what_no_file_holds(below, (*path, str(index)), syntax)
    elif isinstance(value, str):
        if _has_surrogates(value):
            raise FormatError(path, syntax, "it is not Unicode text", "send another value")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FormatError(path, syntax, "it is not a finite number", "send another value")
    elif isinstance(value, int):
        if not -MAX_INTEGER <= value < MAX_INTEGER:
            raise FormatError(path, syntax, "it is an integer of more than 64 bits", "send it as text")
    elif value is not None:
        raise FormatError(path, syntax, f"{type(value).__name__} is no JSON value", "send another value")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _toml(document: Mapping[str, Any]) -> str:
    import tomli_w

    if path := _path_to_null(document, ()):
        raise FormatError(path, "TOML", "TOML has no null", "leave the key out")
    return tomli_w.dumps(document)


def _path_to_null(value: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return path
    below = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, deeper in below if (found := _path_to_null(deeper, (*path, str(key))))), ())


def _ini(document: Mapping[str, Any]) -> str:
    sections = []
    _refuse_equal_names(document, (), "section")
    for section, table in document.items():
        if not isinstance(table, Mapping):
            raise FormatError((section,), "INI", "it is outside of any section", "write {section: {key: value}}")
        _refuse_section(section)
        _refuse_equal_names(table, (section,), "key")
        lines = [_ini_line(section, key, value) for key, value in table.items()]
        sections.append("".join([f"[{section}]\n", *lines]))
    return "\n".join(sections)


def _refuse_section(name: str) -> None:
    reason = _unfit_for_a_line(name) or (name == "DEFAULT" and "its keys would show up in every other section")
    if not name:
        reason = "a section needs a name"
    elif any(character in name for character in "[]"):
        reason = "a section's name can't hold [ or ]"
    if reason:
        raise FormatError((name,), "INI", reason, "rename the section")


def _ini_line(section: str, key: str, value: Any) -> str:
    path = (section, key)
    reason = _unfit_for_a_line(key)
    if not key:
        reason = "a key needs a name"
    elif any(character in key for character in "=:[]"):
        reason = "a key can't hold =, :, [ or ]"
    elif key.startswith(("#", ";")):
        reason = "a line that begins with # or ; is a comment"
    if reason:
        raise FormatError(path, "INI", reason, "rename the key")
    text = _scalar(value, path, "INI")
    reason = _unfit_for_a_line(text)
    if re.search(r"(^|\s)[#;]", text):
        reason = "some readers take # or ; at its beginning or after a blank for a comment"
    if reason:
        raise FormatError(path, "INI", reason)
    return f"{key} = {text}\n" if text else f"{key} =\n"


def _refuse_equal_names(table: Mapping[str, Any], path: tuple[str, ...], what: str) -> None:
    """Many readers of INI don't distinguish upper and lower case."""
    seen: dict[str, str] = {}
    for name in table:
        if other := seen.get(name.lower()):
            reason = f"it differs from the {what} {other} in case alone, and many readers make no difference"
            raise FormatError((*path, name), "INI", reason, f"rename the {what}")
        seen[name.lower()] = name


def _unfit_for_a_line(text: str) -> str:
    """Why `text` does not come back from a line without quotes; empty when it does."""
    return _unfit_anywhere(text) or ("blanks at its ends would be lost" if text != text.strip() else "")


def _unfit_anywhere(text: str) -> str:
    if any(character in "\r\n" or unicodedata.category(character) in ("Zl", "Zp") for character in text):
        return "it holds a line break"
    if any(character != "\t" and unicodedata.category(character) == "Cc" for character in text):
        return "it holds a control character"
    return ""


def _env(document: Mapping[str, Any]) -> str:
    lines = []
    for name, value in document.items():
        reason = ""
        if not VARIABLE.fullmatch(name):
            reason = "a variable's name is made of A-Z, a-z, 0-9 and _ and does not begin with a digit"
        elif SHELL_VARIABLES.fullmatch(name):
            reason = "a shell gives this variable a meaning or value of its own"
        if reason:
            raise FormatError((name,), "env", reason, "rename the key")
        lines.append(f"{name}={_quoted(_scalar(value, (name,), 'env'), name)}\n")
    return "".join(lines)


def _quoted(text: str, name: str) -> str:
    """`text` as systemd, shells and python-dotenv all take it: in double quotes, or in single ones where $ or ` needs them.

    python-dotenv knows no escaped $ and `, expands ${…} in any quotes, and takes a backslash before the last quote for an
    escape of it; systemd before version 242 drops a backslash in single quotes.
    """
    if PLAIN_VALUE.fullmatch(text):
        return text
    reason = _unfit_anywhere(text)
    if any(ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF for character in text):
        reason = "it holds a code point that is no character, which systemd refuses"
    elif "${" in text:
        reason = "some readers expand ${"
    elif text.endswith("\\"):
        reason = "a backslash at its end would escape the quote for some readers"
    elif any(character in text for character in "$`") and any(character in text for character in "'\\"):
        reason = "no quotes fit a value with $ or ` beside ' or \\ for all readers"
    if reason:
        raise FormatError((name,), "env", reason)
    if "$" in text or "`" in text:
        return f"'{text}'"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _scalar(value: Any, path: tuple[str, ...], syntax: str) -> str:
    """A value as text; numbers are as short as they can be without a loss: `2`, `0.1`, `1e300`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(r"e\+?(-?)0*", r"e\1", repr(value)).removesuffix(".0")
    if isinstance(value, (int, str)):
        return str(value)
    what = "null" if value is None else "an array" if isinstance(value, list) else "an object"
    raise FormatError(path, syntax, f"a value there is a text, a number or true or false, not {what}")
