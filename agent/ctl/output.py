"""What agentctl prints: aligned columns within 80 characters, colours only on a terminal, times in local time with zone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from agent.ctl.exits import ERROR, Failure

WIDTH = 80
NARROWEST = 20
"""Characters that text which goes on below itself has at least."""
COLOURS = {"good": "32", "attention": "33", "bad": "31", "quiet": "2", "strong": "1"}

Cell = str | tuple[str, str]
"""A text, or a text and its colour."""


def colourful() -> bool:
    """Whether escape codes may be written: standard output is a terminal that knows them and nobody said NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: str) -> str:
    """`text` in one of COLOURS where colours may be used."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colour and text and colourful() else text


def clean(value: Any) -> str:
    """`value` as text on one line, without the control characters that could play tricks on a terminal."""
    text = " ".join(str(value).split())
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def show(lines: Iterable[str] | str) -> None:
    """Print text that a person reads."""
    _write(lines if isinstance(lines, str) else "\n".join(lines))


def show_json(document: dict[str, Any], *, line: bool = False) -> bool:
    """Print a JSON object, on one line when it is one of a stream; whether anybody still reads."""
    return _write(json_text({"schema": 1, **document}, indent=None if line else 2))


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, readable, with escapes for the characters that could play tricks on a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def show_frame(lines: Iterable[str]) -> None:
    """Put `lines` in the place of what the terminal shows, without flicker and with few bytes for a slow line."""
    _write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="")


def _write(text: str, end: str = "\n") -> bool:
    """Print; a reader that has gone, as `head` does, must not change the exit status, so it is no error.

    Raises Failure when what was asked for can't be written.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _give_up(sys.stdout)
        return False
    except OSError as error:
        _give_up(sys.stdout)
        raise Failure(ERROR, "output_failed", f"can't write the output: {error.strerror or error}") from None
    return True


def _give_up(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, or Python would complain about it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def show_error(message: str, hint: str) -> None:
    """Say on standard error what went wrong, and what to do."""
    text = f"agentctl: {clean(message)}"
    hint = clean(hint)
    if hint and len(text) + len(hint) + 2 <= WIDTH:
        text += f": {hint}"
    elif hint:
        text += f"\n  {hint}"
    say(text)


def say(text: str) -> None:
    """Print on standard error, as far as there is one."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def table(rows: Sequence[Sequence[Cell]], indent: int = 0) -> list[str]:
    """Rows in aligned columns, two spaces apart; the last column goes on below itself where the line is full."""
    return [line for lines in table_rows(rows, indent) for line in lines]


def table_rows(rows: Sequence[Sequence[Cell]], indent: int = 0) -> list[list[str]]:
    """The lines of each row of such a table. The last cell is below the others where these are too wide, or where only so
    its words, such as the id of a job, stay whole.
    """
    plain = [[_text(cell) for cell in row] for row in rows]
    widths = _widths(plain, indent)
    return [_row(row, texts, widths[: len(row) - 1], indent) for row, texts in zip(rows, plain, strict=True)]


def _row(row: Sequence[Cell], texts: list[str], widths: list[int], indent: int) -> list[str]:
    if not row:
        return [""]
    *before, last = texts
    beside = indent + sum(width + 2 for width in widths)
    longest = max(map(len, last.split()), default=0)
    at = indent + 4 if WIDTH - beside < longest <= WIDTH - indent - 4 else beside
    cells = [paint(line, _colour(row[-1])) for line in wrap(last, WIDTH - at)]
    if any(len(text) > width for text, width in zip(before, widths, strict=True)):
        lines = [" " * indent + paint(line, _colour(row[0])) for line in wrap("  ".join(before), WIDTH - indent)]
    else:
        columns = zip(row, before, widths, strict=False)
        start = "".join(paint(text, _colour(cell)) + " " * (width - len(text) + 2) for cell, text, width in columns)
        lines = [" " * indent + start + (cells.pop(0) if at == beside else "")]
    return [*(line.rstrip() for line in lines), *(" " * at + cell for cell in cells)]


def _widths(plain: Sequence[Sequence[str]], indent: int) -> list[int]:
    """Of all columns but the last; the widest cells don't count where they would leave the last one too little."""
    columns = max((len(row) for row in plain), default=0)
    needed = min(NARROWEST, max((len(row[-1]) for row in plain if row), default=0))
    most = WIDTH
    while True:
        cells = [[len(row[i]) for row in plain if i < len(row) - 1 and len(row[i]) <= most] for i in range(columns - 1)]
        widths = [max(column, default=0) for column in cells]
        if indent + sum(width + 2 for width in widths) + needed <= WIDTH:
            return widths
        most = max(widths) - 1


def wrap(text: str, width: int, hang: int = 0) -> list[str]:
    """`text` in lines of at most `width` characters, those below the first `hang` further in; broken between words, if any."""
    if len(text) <= width:
        return [text]
    import textwrap

    return textwrap.wrap(text, max(width, NARROWEST), subsequent_indent=" " * hang, break_on_hyphens=False) or [""]


def paragraph(label: str, text: str, indent: int) -> list[str]:
    """`label` and a text that goes on below its own first line."""
    start = " " * indent + label
    if len(start) > WIDTH - NARROWEST:
        return [" " * indent + line for line in wrap(label + clean(text), WIDTH - indent, hang=4)]
    first, *more = wrap(clean(text), WIDTH - len(start))
    return [start + first, *(" " * len(start) + line for line in more)]


def moment(epoch_s: float | None) -> str:
    """A time with its zone, `2026-11-23 06:15:09 UTC`; without the date when it is today."""
    if epoch_s is None:
        return "-"
    local = time.localtime(epoch_s)
    today = local[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S %Z" if today else "%Y-%m-%d %H:%M:%S %Z", local)


def duration(seconds: float | None) -> str:
    """`0.8 s`, `45 s`, `13 min`, `3 h 12 min`, `5 d 2 h`."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float | None) -> str:
    """Bytes as `512 B`, `3.4 kB`, `16 MB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def number(value: Any, digits: int = 2) -> str:
    """A measured number, or a dash when there is none."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "-"


def _text(cell: Cell) -> str:
    return clean(cell if isinstance(cell, str) else cell[0])


def _colour(cell: Cell) -> str:
    return "" if isinstance(cell, str) else cell[1]
