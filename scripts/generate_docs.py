"""Makes the generated pages of docs/ from the code and the tests. `--check` exits 1 when one is stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import conformance_docs
import document_schemas

from agent.settings import Remote, Section, Settings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# agent.toml

Every key of `/etc/camera-agent/agent.toml`, made from `agent/settings.py` by `scripts/generate-docs`. Unknown keys, wrong types
and values out of range stop the agent with exit status 2 and one line that names the key and the file;
`camera-agent check-config FILE` says the same without starting. *Remote* keys may also be set through the shadow `config`
(see [configuration.md](configuration.md)), and apply as the column says; all others are local only.
"""


def rows(model: type[Section], path: str) -> Iterator[tuple[str, str, str]]:
    """(table, heading text, its rows) for a section and all below it."""
    lines = []
    inner: list[tuple[str, type[Section]]] = []
    for name, field in model.model_fields.items():
        section, many = section_of(field.annotation)
        if section:
            inner.append(
                (f"{path}.{name}" if path else name, section) if not many else (f"{path}.{name}.<name>", section)
            )
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = "**required**" if field.is_required() else code(field.default)
        remote = next((mark.applies for mark in field.metadata if isinstance(mark, Remote)), "")
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        lines.append(
            f"| `{name}` | {words(field.annotation)} | {default} | {extra.get('unit', '')} | {remote} | {meaning} |"
        )
    yield path, (model.__doc__ or "").strip(), "\n".join(lines)
    for where, section in inner:
        yield from rows(section, where.lstrip("."))


def section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if (
        get_origin(annotation) is dict
        and isinstance(get_args(annotation)[1], type)
        and issubclass(get_args(annotation)[1], Section)
    ):
        return get_args(annotation)[1], True
    return None, False


def words(annotation: Any) -> str:
    """A type as TOML's users know it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {words(parts[0])}"
    if origin is dict:
        return f"table of {words(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return words(annotation.__origin__)
    if parts:
        return " or ".join(words(part) for part in parts if part is not type(None))
    names = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def code(value: Any) -> str:
    if value is None:
        return ""
    return f"`{json.dumps(value if not isinstance(value, Path) else str(value))}`"


def page() -> str:
    parts = [HEAD]
    for path, meaning, table in rows(Settings, ""):
        if not table:
            continue
        parts.append(f"\n## {f'[{path}]' if path else 'Top level'}\n")
        if path:
            parts.append(f"{meaning}\n")
        parts.append(
            "| key | type | default | unit | remote | meaning |\n| --- | --- | --- | --- | --- | --- |\n" + table + "\n"
        )
    return "\n".join(parts)


def main() -> int:
    wanted = {PAGE: page(), **conformance_docs.outputs(), **document_schemas.outputs()}
    if "--check" in sys.argv:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.name} is stale: run scripts/generate-docs")
        if not stale:
            print(f"{len(wanted)} generated pages are up to date")
        return bool(stale)
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
