"""Judges a document by a JSON Schema, as a program of its own that can be ended: a costly `pattern` can take for ever.

It imports nothing of the agent and is started by its file's name: `schema_check.py SCHEMA_FILE`, the document as JSON in
the environment. It prints `{"problems": [[path, message], …]}`, or `{"unusable": why}`, and never fetches anything.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import stat
import sys
from typing import Any

DOCUMENT = "CAMERA_AGENT_DOCUMENT"
MAX_PROBLEMS = 10
MAX_SCHEMA_BYTES = 2**20
MAX_MEMORY_BYTES = 256 * 2**20
MAX_CPU_S = 60
"""The end of a check whose agent is gone; the agent itself ends it sooner."""


def main() -> int:
    """The program; its exit status is 0 whenever it has an answer."""
    _limit()
    try:
        answer = _judge(sys.argv[1], json.loads(os.environ[DOCUMENT]))
    except MemoryError:
        answer = {"unusable": f"needs more than {MAX_MEMORY_BYTES // 2**20} MiB of memory for this document"}
    print(json.dumps(answer))
    return 0


def _limit() -> None:
    import resource

    for what, limit in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, MAX_CPU_S)):
        with contextlib.suppress(OSError, ValueError):  # not permitted, or already stricter
            resource.setrlimit(what, (limit, limit))


def _judge(schema_file: str, document: Any) -> dict[str, Any]:
    try:
        schema = json.loads(_content(schema_file))
    except OSError as error:
        return {"unusable": f"can't be read: {error.strerror}"}
    except (ValueError, RecursionError) as error:
        return {"unusable": f"is not valid JSON: {str(error)[:200]}"}
    import jsonschema
    import referencing.exceptions

    try:
        return {"problems": violations(schema, document)}
    except jsonschema.SchemaError as error:
        return {"unusable": f"is not a JSON Schema: {error.message[:200]}"}
    except referencing.exceptions.Unresolvable as error:
        return {"unusable": f"refers to {str(error.ref)[:200]!r}, not found"}
    except RecursionError:
        return {"unusable": "refers to itself without end"}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  such as a `pattern` that is no regular expression
        return {"unusable": f"can't be used: {type(error).__name__}: {str(error)[:200]}"}


def _content(schema_file: str) -> bytes:
    descriptor = os.open(schema_file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "is not a regular file")
        content = file.read(MAX_SCHEMA_BYTES + 1)
    if len(content) > MAX_SCHEMA_BYTES:
        raise OSError(0, "is above 1 MiB")
    return content


def violations(schema: Any, document: Any) -> list[tuple[list[str | int], str]]:
    """The first problems, by their place in the document: the path to the value, and what is wrong in words.

    The schema is of draft 2020-12, or of the older one that its `$schema` names; `format` is an annotation. A `$ref` finds
    what is in the schema itself and the standard's own schemas. Raises what jsonschema, referencing and `re` raise.
    """
    import jsonschema
    import jsonschema_specifications
    from jsonschema.validators import validator_for

    named = schema.get("$schema") if isinstance(schema, dict) else None
    default = jsonschema.Draft202012Validator
    kind = validator_for(schema, default) if isinstance(named, str) else default
    kind.check_schema(schema)
    # A registry of its own keeps `$ref` from fetching anything over the network.
    found = kind(schema, registry=jsonschema_specifications.REGISTRY).iter_errors(document)
    first = heapq.nsmallest(MAX_PROBLEMS, found, key=lambda error: [str(part) for part in error.absolute_path])
    return [(list(error.absolute_path), error.message[:200]) for error in first]


if __name__ == "__main__":
    sys.exit(main())
