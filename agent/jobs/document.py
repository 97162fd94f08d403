"""Job documents: our own operations, and those of the AWS-managed job templates and aws-iot-device-client, unchanged.

`parse` turns any of them into (operation, document with every default filled in), or says what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from agent.errors import RefusedError

MAX_DOCUMENT_BYTES = 32768
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
MAX_PROBLEMS = 8
PLACEHOLDER = "${aws:iot:"


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _optional_text(value: Any) -> Any:
    """AWS delivers a template parameter that was not given as "" or leaves the placeholder in place."""
    return "" if isinstance(value, str) and value.startswith(PLACEHOLDER) else value


Flag = Annotated[bool, BeforeValidator(_flag)]
OptionalText = Annotated[str, BeforeValidator(_optional_text)]


class Part(BaseModel):
    """A part of a job document: unknown keys are refused, keys are written as AWS writes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Signature(Part):
    """One signature of a manifest."""

    keyid: str
    """SHA-256 of the public key, in hex."""
    sig: str
    """base64 of the Ed25519 signature."""


class Envelope(Part):
    """A signed manifest in a DSSE envelope."""

    payload_type: str = Field(alias="payloadType")
    """What the payload is."""
    payload: str
    """base64 of the exact bytes that were signed."""
    signatures: list[Signature] = Field(min_length=1, max_length=16)
    """At least as many as the root document's threshold asks for."""


class UpdateDocument(Part):
    """Bring a target to the software that a signed manifest names."""

    version: Literal["1.0"]
    operation: Literal["update"]
    target: str = Field(min_length=1, max_length=32)
    """A name from `[updates.targets]` of the camera."""
    manifest: Envelope
    """What to install, signed."""
    urls: list[str] = Field(min_length=1, max_length=8)
    """Where the artifact can be had, tried in order."""


class RestartDocument(Part):
    """Restart the agent or an update target's program."""

    version: Literal["1.0"]
    operation: Literal["restart"]
    target: str = Field("agent", min_length=1, max_length=32)
    """`agent`, or a name from `[updates.targets]`."""


class HandlerInput(Part):
    """What a `runHandler` step starts."""

    handler: str = Field(min_length=1, max_length=255)
    """File name of the handler."""
    args: list[str] = []
    """Its arguments; the user comes before them."""
    path: OptionalText = ""
    """Folder: `default` or nothing for the camera's handler folder; no other is accepted."""


class CommandInput(Part):
    """What a `runCommand` step starts."""

    command: str = Field(min_length=1)
    """Program and arguments, separated by commas; `\\,` is a comma."""


class Action(Part):
    """One thing to do."""

    name: str = Field(min_length=1, max_length=256)
    """Label of the step."""
    type: Literal["runHandler", "runCommand"]
    input: HandlerInput | CommandInput
    run_as_user: OptionalText = Field("", alias="runAsUser")
    """User to run as; nothing for the agent's own."""
    allow_std_err: int | None = Field(None, alias="allowStdErr", ge=0)
    """Lines on standard error above which the step has failed although it ended with 0."""
    ignore_step_failure: Flag = Field(False, alias="ignoreStepFailure")
    """Go on although this step failed."""
    timeout_s: float | None = Field(None, alias="timeoutSeconds", gt=0, le=86400)
    """Time limit; default: `jobs.step_timeout_s` of the camera."""

    @model_validator(mode="after")
    def _input_fits(self) -> Action:
        wanted = HandlerInput if self.type == "runHandler" else CommandInput
        if not isinstance(self.input, wanted):
            raise ValueError(f"{self.type} needs input.{'handler' if wanted is HandlerInput else 'command'}")  # noqa: TRY004
        return self


class Step(Part):
    """A step of a job."""

    action: Action


class RunDocument(Part):
    """Steps to run in order; the first failure ends the job unless the step says otherwise."""

    version: Literal["1.0"]
    operation: Literal["run"] = "run"
    include_std_out: Flag = Field(False, alias="includeStdOut")
    """Put the last part of the steps' standard output into the status details."""
    conditions: list[dict[str, Any]] = []
    """Conditions on the camera; none can be evaluated, so a document that has any is refused."""
    steps: list[Step] = Field(min_length=1, max_length=64)
    final_step: Step | None = Field(None, alias="finalStep")
    """Runs after every step has succeeded."""
    timeout_s: float | None = Field(None, alias="timeoutSeconds", gt=0, le=604800)
    """Time limit of the whole job."""


DOCUMENTS: dict[str, type[Part]] = {"update": UpdateDocument, "restart": RestartDocument, "run": RunDocument}


def parse(document: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The operation a document asks for, and the document in our own form. Raises RefusedError."""
    if not isinstance(document, Mapping):
        raise RefusedError("bad_document", "the job has no document that is a JSON object", "mend the job document")
    _check_json(document)
    if len(json.dumps(document)) > MAX_DOCUMENT_BYTES:
        raise RefusedError("bad_document", f"the document is larger than {MAX_DOCUMENT_BYTES} bytes", "make it smaller")
    operation, normal = _operation(document)
    model = DOCUMENTS.get(operation)
    if model is None:
        known = ", ".join(sorted(DOCUMENTS))
        raise RefusedError(
            "unknown_operation", f"operation: {operation!r:.80} is not known here", f"use one of {known}"
        )
    try:
        parsed = model.model_validate(normal)
    except ValidationError as error:
        raise RefusedError("bad_document", _explain(error), "mend the job document") from None
    result = parsed.model_dump()
    for where, text in _texts(result):
        if PLACEHOLDER in text:
            raise RefusedError(
                "placeholder_unresolved",
                f"{where}: AWS did not replace {_shown(text)}",
                "check the job's presignedUrlConfig, its role and that the object exists",
            )
    return operation, result


def _operation(document: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if "steps" in document:
        return "run", document
    operation = document.get("operation")
    if not isinstance(operation, str) or not operation:
        raise RefusedError("bad_document", "operation: missing", "name an operation, or give steps")
    if "version" in document:
        return operation, document
    step = {"name": operation, "type": "runHandler", "input": {"handler": operation}}
    for old, new in (("args", "args"), ("path", "path")):
        if old in document:
            step["input"][new] = document[old]  # type: ignore[index]
    if "allowStdErr" in document:
        step["allowStdErr"] = _number(document["allowStdErr"])
    rest = {k: v for k, v in document.items() if k not in ("operation", "args", "path", "allowStdErr")}
    return "run", {"version": "1.0", "steps": [{"action": step}], **rest}


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value


def _check_json(document: Mapping[str, Any]) -> None:
    """Refuse what no JSON parser, store or program could take, before anything looks into it. Walks without recursion."""
    pending: list[tuple[str, int, Any]] = [("", 1, document)]
    while pending:
        place, depth, value = pending.pop()
        words = (
            f"nested deeper than {MAX_DEPTH} levels"
            if depth > MAX_DEPTH and isinstance(value, (Mapping, list))
            else _unusable(value)
        )
        if words:
            place = _shown(place.lstrip(".")) or "the document"
            raise RefusedError("bad_document", f"{place}: {words}", "mend the job document")
        if isinstance(value, Mapping):
            for key, below in value.items():
                if not isinstance(key, str) or _unusable(key):
                    here = f"{place}.{key}" if isinstance(key, str) else f"{place}.{key!r:.40}"
                    words = _unusable(key) if isinstance(key, str) else "is not text"
                    raise RefusedError(
                        "bad_document", f"{_shown(here.lstrip('.'))}: the key {words}", "mend the job document"
                    )
                pending.append((f"{place}.{key}", depth + 1, below))
        elif isinstance(value, list):
            pending += [(f"{place}[{index}]", depth + 1, below) for index, below in enumerate(value)]


def _unusable(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value:
            return "holds a NUL character"
        return "is not valid Unicode text" if any("\ud800" <= c <= "\udfff" for c in value) else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is not a finite number"
    if isinstance(value, int):
        return "" if abs(value) <= MAX_INTEGER else "is an integer of more than 64 bits"
    return "" if value is None or isinstance(value, (Mapping, list)) else f"is no JSON value ({type(value).__name__})"


def _shown(text: str) -> str:
    """`text`, cut short, with what can't be printed as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:120])


def _explain(error: ValidationError) -> str:
    problems = list(_problems(error))
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more


def _problems(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"] if not str(part).endswith("Input")) or "document"
        words = {"extra_forbidden": "unknown key", "missing": "missing"}.get(
            detail["type"], detail["msg"].removeprefix("Value error, ")
        )
        yield f"{_shown(path)}: {words}"


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield _shown(path.lstrip(".")), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
