"""Job documents: our own operations, and those of the AWS-managed job templates and aws-iot-device-client, unchanged.

`parse` turns any of them into (operation, document with every default filled in), or says what is wrong with it. The
models are also where docs/schemas comes from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from agent.errors import RefusedError
from agent.jobs.conditions import DEFAULT_TYPE

VERSION = "1.0"
MAX_DOCUMENT_BYTES = 96 * 1024
"""CreateJob takes 32 KiB; presigned URLs make a document longer when it is delivered, in a message of 128 KiB at most."""
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
MAX_PROBLEMS = 8
PLACEHOLDER = "${aws:iot:"
MEND = "mend the job document"
LEFT = re.compile(r"\$\{aws:iot:[^{}]*\}")
"""A placeholder as a whole."""


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _optional_text(value: Any) -> Any:
    """AWS delivers a template parameter that was not given as "" or leaves the placeholder in place."""
    return "" if isinstance(value, str) and LEFT.fullmatch(value) else value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _command(value: str) -> str:
    if not re.search(COMMAND, value):
        raise ValueError("must begin with a program's name without blanks, and words are separated by commas")
    return value


COMMAND = r"^\s*(\\,|[^\s,])+\s*(,|$)"
Flag = Annotated[
    bool,
    BeforeValidator(_flag),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["true", "false"]}]}),
]
OptionalText = Annotated[str, BeforeValidator(_optional_text)]
Lines = Annotated[
    Annotated[int, Field(ge=0)] | None,
    BeforeValidator(_number),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]{1,9}$"}, {"type": "null"}]}
    ),
]
Texts = Annotated[
    list[str],
    BeforeValidator(_several),
    Field(min_length=1, max_length=64),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 64},
            ]
        }
    ),
]
Command = Annotated[str, AfterValidator(_command), WithJsonSchema({"type": "string", "pattern": COMMAND})]


class Part(BaseModel):
    """A part of a job document: unknown keys are refused, keys are written as AWS writes them.

    Keys that begin with `_`, such as the `_comment` of AWS's samples, are comments.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra={"patternProperties": {"^_": {"description": "A comment."}}},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_comments(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if not k.startswith("_")} if isinstance(value, Mapping) else value


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


class Condition(Part):
    """Something that must hold on the camera, or the job ends REJECTED."""

    key: str = Field(min_length=1, max_length=128)
    """A fact of the camera, such as `os.id`."""
    value: Texts
    """What it is compared with: one text or several, of which one must fit."""
    type: str = Field(DEFAULT_TYPE, max_length=64)
    """`stringEqual`, `stringNotEqual`, `stringLike`, `versionAtLeast` or `versionBelow`."""


class Document(Part):
    """What the documents of all operations have in common."""

    version: Literal["1.0"]
    """Of the document's form."""
    conditions: list[Condition] = Field([], max_length=32)
    """What must hold on the camera; all of it."""


class UpdateDocument(Document):
    """Bring a target to the software that a signed manifest names."""

    operation: Literal["update"]
    target: str = Field(min_length=1, max_length=32)
    """A name from `[updates.targets]` of the camera."""
    manifest: Envelope
    """What to install, signed."""
    urls: list[str] = Field(min_length=1, max_length=8)
    """Where the artifact can be had, tried in order."""


class ConfigureDocument(Document):
    """Change the configuration that the fleet sets, under what the camera's own shadow wants; done when it has proven itself."""

    operation: Literal["configure"]
    agent: dict[str, Any] = {}
    """Keys of agent.toml, as in the shadow's `desired.agent`; null takes back what an earlier job set."""
    targets: dict[str, dict[str, Any] | None] = {}
    """Values for the documents of `[config.targets]`; null, for a value or a whole document, takes back what an earlier job set."""
    replace: Flag = False
    """Whether this is all that jobs set, instead of a change of it."""


class RestartDocument(Document):
    """Restart the agent or an update target's program."""

    operation: Literal["restart"]
    target: str = Field("agent", min_length=1, max_length=32)
    """`agent`, or a name from `[updates.targets]`."""


class RebootDocument(Document):
    """Reboot the camera; done when it has booted again."""

    operation: Literal["reboot"]


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

    command: Command
    """Program and arguments, separated by commas; `\\,` is a comma."""


class Step(Part):
    """What every kind of step may say."""

    name: str = Field(min_length=1, max_length=256)
    """Label of the step."""
    run_as_user: OptionalText = Field("", alias="runAsUser")
    """User to run as; nothing for the agent's own."""
    allow_std_err: Lines = Field(None, alias="allowStdErr")
    """Lines on standard error above which the step has failed although it ended with 0."""
    ignore_step_failure: Flag = Field(False, alias="ignoreStepFailure")
    """Go on although this step failed."""
    timeout_s: float | None = Field(None, alias="timeoutSeconds", gt=0, le=86400)
    """Time limit; default: `jobs.step_timeout_s` of the camera."""


class HandlerStep(Step):
    """A program from the camera's handler folder."""

    type: Literal["runHandler"]
    input: HandlerInput


class CommandStep(Step):
    """Any program, where `jobs.commands` of the camera allows it."""

    type: Literal["runCommand"]
    input: CommandInput


class Action(Part):
    """A step of a job."""

    action: Annotated[HandlerStep | CommandStep, Field(discriminator="type")]


class RunDocument(Document):
    """Steps to run in order; the first failure ends the job unless the step says otherwise."""

    operation: Literal["run"] = "run"
    include_std_out: Flag = Field(False, alias="includeStdOut")
    """Put the last part of the steps' standard output into the status details."""
    steps: list[Action] = Field(min_length=1, max_length=64)
    """What to run."""
    final_step: Action | None = Field(None, alias="finalStep")
    """Runs after every step has succeeded."""
    timeout_s: float | None = Field(None, alias="timeoutSeconds", gt=0, le=604800)
    """Time limit of the whole job."""


DOCUMENTS: dict[str, type[Document]] = {
    "update": UpdateDocument,
    "configure": ConfigureDocument,
    "restart": RestartDocument,
    "reboot": RebootDocument,
    "run": RunDocument,
}


def parse(document: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The operation a document asks for, and the document in our own form. Raises RefusedError."""
    if not isinstance(document, Mapping):
        raise RefusedError("bad_document", "the job has no document that is a JSON object", MEND)
    if _size(document) > MAX_DOCUMENT_BYTES:
        raise RefusedError("bad_document", f"the document is larger than {MAX_DOCUMENT_BYTES} bytes", "make it smaller")
    _check_json(document)
    version = document.get("version", VERSION)
    if version != VERSION:
        shown = _shown(json.dumps(version, ensure_ascii=False))
        raise RefusedError("unknown_version", f"version: {shown:.80} is not known here", f'use "{VERSION}"')
    operation, normal = _operation(document)
    model = DOCUMENTS.get(operation)
    if model is None:
        known = ", ".join(sorted(DOCUMENTS))
        raise RefusedError(
            "unknown_operation", f"operation: {operation!r:.80} is not known here", f"use one of {known}"
        )
    try:
        parsed = model.model_validate({key: value for key, value in normal.items() if key != "$schema"})
    except ValidationError as error:
        _refuse_placeholders((place, text) for place, text in _texts(normal) if not _optional(place))
        raise RefusedError("bad_document", _explain(error), MEND) from None
    result = parsed.model_dump()
    _refuse_placeholders(_texts(result))
    return operation, result


def _optional(place: _Place | None) -> bool:
    """Whether a placeholder that AWS has left there is no fault."""
    key = str(place.key) if place else ""
    return key.startswith("_") or key in ("path", "runAsUser")


def _refuse_placeholders(texts: Iterable[tuple[_Place | None, str]]) -> None:
    for where, text in texts:
        if PLACEHOLDER in text:
            hint = "check the job's presignedUrlConfig, its role and that the object exists"
            if f"{PLACEHOLDER}parameter:" in text:
                hint = "give the parameter's value when the job is made from its template"
            raise RefusedError("placeholder_unresolved", f"{where}: AWS did not replace {_shown(text)}", hint)


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
        step["allowStdErr"] = document["allowStdErr"]
    rest = {k: v for k, v in document.items() if k not in ("operation", "args", "path", "allowStdErr")}
    return "run", {"version": VERSION, "steps": [{"action": step}], **rest}


def _size(document: Mapping[str, Any]) -> int:
    """Bytes of the document as compact JSON, at least; 0 for what can't be written as JSON, which _check_json tells."""
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return 0
    return len(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is: the key or index in what is around it."""

    key: Any
    around: _Place | None

    def __str__(self) -> str:
        parts: list[str] = []
        place: _Place | None = self
        while place:
            parts.append(f"[{place.key}]" if isinstance(place.key, int) else f".{str(place.key)[:120]}")
            place = place.around
        return _shown("".join(reversed(parts)).lstrip("."))


def _check_json(document: Mapping[str, Any]) -> None:
    """Refuse what no JSON parser, store or program could take, before anything looks into it. Walks without recursion."""
    pending: list[tuple[_Place | None, int, Any]] = [(None, 1, document)]
    while pending:
        place, depth, value = pending.pop()
        words = (
            f"nested deeper than {MAX_DEPTH} levels"
            if depth > MAX_DEPTH and isinstance(value, (Mapping, list))
            else _unusable(value)
        )
        if words:
            raise RefusedError("bad_document", f"{place or 'the document'}: {words}", MEND)
        if isinstance(value, Mapping):
            for key, below in value.items():
                if not isinstance(key, str) or _unusable(key):
                    words = _unusable(key) if isinstance(key, str) else "is not text"
                    shown = key if isinstance(key, str) else f"{key!r:.40}"
                    raise RefusedError("bad_document", f"{_Place(shown, place)}: the key {words}", MEND)
                pending.append((_Place(key, place), depth + 1, below))
        elif isinstance(value, list):
            pending += [(_Place(index, place), depth + 1, below) for index, below in enumerate(value)]


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
        words = {"extra_forbidden": "unknown key", "missing": "missing", "union_tag_not_found": "type: missing"}.get(
            detail["type"], detail["msg"].removeprefix("Value error, ")
        )
        if detail["type"] == "union_tag_invalid":
            words = f"type: must be {detail['ctx']['expected_tags']}"
        yield f"{_shown('.'.join(_path(detail))) or 'document'}: {words}"


def _path(detail: ErrorDetails) -> list[str]:
    """Where it is in the document, without the kind of step that pydantic puts in between."""
    return [str(part) for part in detail["loc"] if part not in ("runHandler", "runCommand")]


def _texts(value: Any, place: _Place | None = None) -> Iterator[tuple[_Place | None, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, _Place(key, place))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, _Place(index, place))
