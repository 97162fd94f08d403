"""Makes docs/schemas/<operation>.schema.json, the JSON Schema of each operation's job documents, from agent/jobs/document.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from agent.jobs.document import DOCUMENTS

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Generator(GenerateJsonSchema):
    """Without the titles that only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  the signature is pydantic's
        return False

    def tagged_union_schema(self, schema: Any) -> dict[str, Any]:
        made = super().tagged_union_schema(schema)
        del made["discriminator"]  # OpenAPI's; strict validators refuse it
        return made


def outputs() -> dict[Path, str]:
    """Path and text of each schema."""
    return {
        FOLDER / f"{operation}.schema.json": json.dumps(schema(operation), indent=2, ensure_ascii=False) + "\n"
        for operation in DOCUMENTS
    }


def schema(operation: str) -> dict[str, Any]:
    """The schema of one operation's documents, in the form that has a `version`."""
    made = DOCUMENTS[operation].model_json_schema(by_alias=True, schema_generator=Generator)
    made["properties"]["$schema"] = {"description": "For editors; not looked at by the camera."}
    return {
        "$schema": DIALECT,
        "title": f"Job document: {operation}",
        **{k: v for k, v in made.items() if k != "title"},
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
