"""What this camera would do with a job document, or why not; nothing is touched or remembered."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.errors import RefusedError
from agent.jobs.document import MAX_DEPTH
from agent.jobs.operation import Operation

Accept = Callable[[Mapping[str, Any] | None], Awaitable[tuple[str, dict[str, Any]]]]
PRESIGNED = re.compile(r"\$\{aws:iot:s3-presigned-url(?:-v2)?:([^{}]+)\}")


async def plan(accept: Accept, operations: Mapping[str, Operation], document: Any) -> dict[str, Any]:
    """`accepted`, `operation`, `code`, `message`, `hint`, and `steps` in words.

    `accept` judges a document as for a real job. A document as it is given to CreateJob is taken too: where AWS would
    put a presigned URL, the object's own URL stands.
    """
    try:
        operation, normal = await accept(as_delivered(document))
        steps = await operations[operation].plan(normal)
    except RefusedError as error:
        return _verdict(accepted=False, code=error.code, message=error.message, hint=error.hint)
    return _verdict(accepted=True, operation=operation, message="this camera would take the job", steps=steps)


def as_delivered(value: Any, depth: int = 0) -> Any:
    """`value` with presigned-URL placeholders replaced by the URL they hold; what is nested too deep stays as it is."""
    if depth > MAX_DEPTH:
        return value
    match value:
        case str():
            return PRESIGNED.sub(r"\1", value)
        case list():
            return [as_delivered(item, depth + 1) for item in value]
        case dict():
            return {key: as_delivered(item, depth + 1) for key, item in value.items()}
    return value


def _verdict(
    *,
    accepted: bool,
    operation: str | None = None,
    code: str = "ok",
    message: str = "",
    hint: str = "",
    steps: Any = (),
) -> dict[str, Any]:
    return {
        "accepted": accepted,
        "operation": operation,
        "code": code,
        "message": message,
        "hint": hint,
        "steps": list(steps),
    }
