"""Rendering metrics as OpenMetrics 1.0 text. Pure: families in, text out; what the format can't express raises ValueError."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Type = Literal["gauge", "counter", "info", "unknown"]

# UCUM units, as OpenTelemetry writes them, and the words that OpenMetrics wants at the end of a name. Shares, counts and
# flags all have the unit 1, so it says nothing and gets no word.
UNITS = {
    "1": "",
    "%": "percent",
    "s": "seconds",
    "ms": "milliseconds",
    "min": "minutes",
    "h": "hours",
    "d": "days",
    "By": "bytes",
    "By/s": "bytes_per_second",
    "/s": "per_second",
    "/min": "per_minute",
    "Cel": "celsius",
    "Hz": "hertz",
    "V": "volts",
    "A": "amperes",
    "W": "watts",
    "J": "joules",
}


class Metric(NamedTuple):
    """A family of samples.

    `name` is OpenTelemetry's (`system.cpu.utilization`); `unit` is UCUM's (`1`, `s`, `By`, `Cel`), a word, or empty, and
    annotations such as `{image}` count as none; each sample is its labels and its value, where None is left out.
    """

    name: str
    unit: str
    type: Type
    help: str
    samples: Sequence[tuple[Mapping[str, str], float | None]]


def render(metrics: Iterable[tuple[str, str, Type, str, Sequence[tuple[Mapping[str, str], float | None]]]]) -> str:
    """The text of all families, ending with `# EOF`. Names get underscores for dots, and their unit and type's suffix.

    Raises ValueError for two families with one name, two samples with the same labels, and a counter below zero.
    """
    lines: list[str] = []
    seen: set[str] = set()
    for name, unit, type_, help_, samples in metrics:
        word = _unit_word(unit, type_)
        family = _family_name(name, word, type_)
        if family in seen:
            raise ValueError(f"{family}: two metrics have this name")
        seen.add(family)
        lines.append(f"# TYPE {family} {type_}")
        if word:
            lines.append(f"# UNIT {family} {word}")
        if help_:
            lines.append(f"# HELP {family} {_escape(help_)}")
        lines += _sample_lines(family, type_, samples)
    return "\n".join([*lines, "# EOF", ""])


def _unit_word(unit: str, type_: Type) -> str:
    unit = re.sub(r"\{[^}]*\}", "", unit)
    if type_ == "info":
        return ""
    return re.sub(r"[^a-zA-Z0-9]+", "_", UNITS.get(unit, unit)).strip("_")


def _family_name(name: str, word: str, type_: Type) -> str:
    name = re.sub(r"[^a-zA-Z0-9_:]", "_", name)
    if not name or name[0].isdigit():
        name = f"_{name}"
    suffix = {"counter": "_total", "info": "_info"}.get(type_, "")
    name = name.removesuffix(suffix) if suffix else name
    if word and not name.endswith(f"_{word}"):
        name += f"_{word}"
    return name


def _sample_lines(family: str, type_: Type, samples: Sequence[tuple[Mapping[str, str], float | None]]) -> Iterable[str]:
    name = family + {"counter": "_total", "info": "_info"}.get(type_, "")
    seen: set[str] = set()
    for labels, value in samples:
        if value is None:
            continue
        if type_ == "counter" and not value >= 0:
            raise ValueError(f"{family}: a counter can't be {value}")
        if type_ == "info" and value != 1:
            raise ValueError(f"{family}: an info metric is always 1")
        text = _labels(family, labels)
        if text in seen:
            raise ValueError(f"{family}{text}: two samples have these labels")
        seen.add(text)
        yield f"{name}{text} {_number(value)}"


def _labels(family: str, labels: Mapping[str, str]) -> str:
    pairs: dict[str, str] = {}
    for key, value in labels.items():
        label = re.sub(r"[^a-zA-Z0-9_]", "_", key)
        if not label or label[0].isdigit() or label.startswith("__"):
            raise ValueError(f"{family}: {key!r} can't be a label")
        if label in pairs:
            raise ValueError(f"{family}: two labels become {label}")
        pairs[label] = value
    if not pairs:
        return ""
    return "{" + ",".join(f'{label}="{_escape(str(pairs[label]))}"' for label in sorted(pairs)) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if isinstance(value, int) else repr(value)
