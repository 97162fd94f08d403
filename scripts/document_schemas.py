"""Makes docs/schemas/<operation>.schema.json, the JSON Schema of each operation's job documents, from agent/jobs/document.py.

What `configure` may set is that of the shadow's `desired`, see desired_schema.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import desired_schema
from desired_schema import DIALECT, FOLDER

from agent.jobs.document import DOCUMENTS


class Generator(desired_schema.Generator):
    """Also without what strict validators refuse."""

    def tagged_union_schema(self, schema: Any) -> dict[str, Any]:
        made = super().tagged_union_schema(schema)
        del made["discriminator"]  # OpenAPI's
        return made


def outputs() -> dict[Path, str]:
    """Path and text of each schema, that of `desired` included."""
    return desired_schema.outputs() | {
        FOLDER / f"{operation}.schema.json": json.dumps(schema(operation), indent=2, ensure_ascii=False) + "\n"
        for operation in DOCUMENTS
    }


def schema(operation: str) -> dict[str, Any]:
    """The schema of one operation's documents, in the form that has a `version`."""
    made = DOCUMENTS[operation].model_json_schema(by_alias=True, schema_generator=Generator)
    made["properties"]["$schema"] = {"description": "For editors; not looked at by the camera."}
    if operation == "configure":
        made["$defs"] = {**made.get("$defs", {}), **desired_schema.definitions()}
        for part in ("agent", "targets"):
            its = made["properties"][part]
            its = {"description": its["description"], "default": its["default"], "type": "object"}
            made["properties"][part] = {**its, "$ref": f"#/$defs/{part}"}
    return {
        "$schema": DIALECT,
        "title": f"Job document: {operation}",
        **{k: v for k, v in made.items() if k != "title"},
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
