"""Makes the generated pages of docs/ from the code and the tests. `--check` exits 1 when one is stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import conformance_docs
import document_schemas
from desired_schema import remote_keys, section_of
from pydantic.fields import FieldInfo

from agent.settings import Remote, Section, Settings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# agent.toml

Every key of `/etc/camera-agent/agent.toml`, made from `agent/settings.py` by `scripts/generate-docs`. Unknown keys, wrong types
and values out of range stop the agent with exit status 2 and one line that names the key and the file;
`camera-agent check-config FILE` says the same without starting.

*Remote* says who else may set a key. **local only**: nobody, it is what `agent.toml` says. All others may also be set by the
shadow `config` of the camera or by a job `configure` ([configuration.md](configuration.md)), and the word says what happens then:

| remote | when the value changes |
| --- | --- |
| `live` | takes effect at once; nothing is restarted |
| `restart-component` | the part of the agent that uses it starts again, the agent goes on |
| `connectivity` | the connection is made anew; the value stays only when the cloud is reached over it within `config.connectivity_trial_s` |
| `reboot` | the camera reboots, and the value stays only when it comes up well; today targets alone have it, by `apply = "reboot"` |

All but `live` wait for a maintenance window. So does a key of `capture`, and it stays only when the images keep flowing and get no worse.
[All remote keys](#all-remote-keys) are listed at the end; [schemas/desired.schema.json](schemas/desired.schema.json) is the JSON
Schema of what the shadow may want.
"""
LOCAL = "local only"


def rows(model: type[Section], path: str) -> Iterator[tuple[str, str, str]]:
    """(table, heading text, its rows) for a section and all below it."""
    lines = []
    inner: list[tuple[str, type[Section]]] = []
    for name, field in model.model_fields.items():
        section, many = section_of(field.annotation)
        if section:
            where = f"{path}.{name}" if path else name
            inner.append((f"{where}.<name>" if many else where, section))
            continue
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{name}` | {described(field)} | {applies(field)} | {meaning} |")
    yield path, (model.__doc__ or "").strip(), "\n".join(lines)
    for where, section in inner:
        yield from rows(section, where)


def described(field: FieldInfo) -> str:
    """The cells type, default and unit."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = "**required**" if field.is_required() else code(field.default)
    return f"{words(field.annotation)}{limits(field)} | {default} | {extra.get('unit', '')}"


def applies(field: FieldInfo) -> str:
    return next((f"`{mark.applies}`" for mark in field.metadata if isinstance(mark, Remote)), LOCAL)


def words(annotation: Any) -> str:
    """A type as TOML's users know it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields.items()
        return "tables of " + ", ".join(
            f"`{name}` ({words(field.annotation)}{limits(field)})" for name, field in fields
        )
    if origin is list:
        below = words(parts[0])
        return below if below.startswith("tables of") else f"list of {below}"
    if origin is dict:
        return f"table of {words(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return words(annotation.__origin__)
    if parts:
        return " or ".join(words(part) for part in parts if part is not type(None))
    names = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def limits(field: FieldInfo) -> str:
    """The range of a number, as far as it has one."""
    low = next((mark.ge for mark in field.metadata if hasattr(mark, "ge")), None)
    high = next((mark.le for mark in field.metadata if hasattr(mark, "le")), None)
    if low is None:
        return "" if high is None else f", at most {high}"
    return f", at least {low}" if high is None else f", {low} to {high}"


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
    return "\n".join([*parts, remote_page()])


def remote_page() -> str:
    lines = [
        f"| `{path}` | {described(model.model_fields[name])} | `{mark.applies}` |"
        for path, model, name, mark in sorted(remote_keys(), key=lambda key: key[0])
    ]
    return (
        "\n## All remote keys\n\nWhat the shadow `config` (in `desired.agent`) and a job `configure` (in `agent`) may set.\n\n"
        "| key | type | default | unit | remote |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


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
