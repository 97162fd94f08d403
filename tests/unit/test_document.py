"""Job documents: accepted as AWS writes them, refused with the place and the reason."""

import ast
import copy
import importlib
import itertools
import json
import os
import re
import tracemalloc
from pathlib import Path

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import setting_keys
from agent.cloud.jobs import parse_execution
from agent.config import desired as wishes
from agent.config import layers
from agent.errors import RefusedError
from agent.host.facts import host_facts
from agent.jobs.conditions import TYPES, facts
from agent.jobs.document import DOCUMENTS, parse
from agent.jobs.plan import as_delivered
from agent.versions import compare_versions

ROOT = Path(__file__).parents[2]

MANAGED = {
    "AWS-Reboot": ("Reboot", "reboot.sh", []),
    "AWS-Download-File": ("Download-File", "download-file.sh", ["downloadUrl", "filePath"]),
    "AWS-Install-Application": ("Install-Application", "install-packages.sh", ["packages"]),
    "AWS-Remove-Application": ("Remove-Application", "remove-packages.sh", ["packages"]),
    "AWS-Start-Application": ("Start-Application", "start-services.sh", ["services"]),
    "AWS-Stop-Application": ("Stop-Application", "stop-services.sh", ["services"]),
    "AWS-Restart-Application": ("Restart-Application", "restart-services.sh", ["services"]),
    "AWS-Run-Command": ("Run-Command", None, ["command"]),
}
VALUES = {
    "downloadUrl": "https://bucket.s3.eu-west-1.amazonaws.com/f?X-Amz-Signature=1",
    "filePath": "/tmp/f",
    "packages": "vim curl",
    "services": "a b",
    "command": "echo,Hello\\\\, I am a camera.",
    "pathToHandler": "default",
    "runAsUser": "root",
}


def managed(template, **parameters):
    """The document of an AWS-managed template with these parameters filled in, as AWS delivers it."""
    name, handler, args = MANAGED[template]
    places = [f"${{aws:iot:parameter:{arg}}}" for arg in args]
    if handler is None:
        action = {"name": name, "type": "runCommand", "input": {"command": places[0]}}
    else:
        given_args = {"args": places} if places else {}
        action = {
            "name": name,
            "type": "runHandler",
            "input": {"handler": handler, **given_args, "path": "${aws:iot:parameter:pathToHandler}"},
        }
    text = json.dumps(
        {"version": "1.0", "steps": [{"action": {**action, "runAsUser": "${aws:iot:parameter:runAsUser}"}}]}
    )
    for key, value in parameters.items():
        text = text.replace(f"${{aws:iot:parameter:{key}}}", json.dumps(value)[1:-1])
    return json.loads(text)


@pytest.mark.conformance("C-DOC-01", "C-DOC-04")
@pytest.mark.parametrize("optional", ["given", "empty", "left"])
@pytest.mark.parametrize("template", MANAGED)
def test_managed_templates(template, optional):
    name, handler, args = MANAGED[template]
    needed = {key: VALUES[key] for key in args}
    more = {key: VALUES[key] if optional == "given" else "" for key in ("pathToHandler", "runAsUser")}
    operation, document = parse(managed(template, **needed, **(more if optional != "left" else {})))
    assert operation == "run"
    action = document["steps"][0]["action"]
    assert action["name"] == name
    assert action["run_as_user"] == ("root" if optional == "given" else "")
    if handler is None:
        assert action["type"] == "runCommand"
        assert action["input"] == {"command": VALUES["command"]}
    else:
        path = "default" if optional == "given" else ""
        assert action["input"] == {"handler": handler, "args": list(needed.values()), "path": path}
    assert (action["allow_std_err"], action["ignore_step_failure"]) == (None, False)


@pytest.mark.conformance("C-DOC-01")
def test_the_handlers_of_the_managed_templates_are_shipped():
    handlers = {handler for _, handler, _ in MANAGED.values() if handler}
    assert len(handlers) == 7
    for handler in handlers:
        assert os.access(ROOT / "packaging" / "handlers" / handler, os.X_OK), handler


@pytest.mark.conformance("C-JOBS-13")
@pytest.mark.parametrize("template", [name for name, (_, _, args) in MANAGED.items() if args])
def test_a_needed_parameter_that_aws_left_is_told(template):
    with pytest.raises(RefusedError) as caught:
        parse(managed(template))
    assert caught.value.code == "placeholder_unresolved"
    assert f"${{aws:iot:parameter:{MANAGED[template][2][0]}}}" in caught.value.message
    assert "parameter" in caught.value.hint


URL = "${aws:iot:s3-presigned-url:https://s3.eu-west-1.amazonaws.com/b/k}"


@pytest.mark.conformance("C-JOBS-13")
@pytest.mark.parametrize(
    ("place", "document"),
    [
        ("steps[0].action.name", lambda: step(name=URL)),
        ("steps[0].action.input.handler", lambda: step(input={"handler": URL})),
        ("steps[0].action.input.args[1]", lambda: step(input={"handler": "h", "args": ["a", f"x{URL}"]})),
        ("steps[0].action.input.path", lambda: step(input={"handler": "h", "path": f"/x/{URL}"})),
        ("steps[0].action.type", lambda: step(type=URL)),
        ("steps[0].action.ignoreStepFailure", lambda: step(ignoreStepFailure=URL)),
        ("steps[0].action.allowStdErr", lambda: step(allowStdErr=URL)),
        ("includeStdOut", lambda: {**step(), "includeStdOut": URL}),
        ("conditions[0].value[0]", lambda: {**step(), "conditions": [{"key": "os.id", "value": URL}]}),
        ("urls[0]", lambda: {"version": "1.0", "operation": "update", "target": "p", "urls": [URL]}),
        ("target", lambda: {"version": "1.0", "operation": "restart", "target": URL}),
    ],
)
def test_a_placeholder_is_told_wherever_it_is_left(place, document):
    with pytest.raises(RefusedError) as caught:
        parse(document())
    assert caught.value.code == "placeholder_unresolved"
    assert caught.value.message.startswith(f"{place}: AWS did not replace ")
    assert "${aws:iot:s3-presigned-url:" in caught.value.message
    assert "presignedUrlConfig" in caught.value.hint


def test_a_placeholder_that_may_be_left_is_not_blamed_for_another_fault():
    left = "${aws:iot:parameter:runAsUser}"
    with pytest.raises(RefusedError, match="taget: unknown key") as caught:
        parse({**step(runAsUser=left, input={"handler": "h", "path": left}), "taget": 1, "_comment": left})
    assert caught.value.code == "bad_document"


@pytest.mark.conformance("C-JOBS-14")
def test_a_document_in_text_is_as_good_as_an_object():
    execution = {"jobId": "j", "executionNumber": 1, "versionNumber": 1, "status": "QUEUED"}
    as_object = parse_execution({**execution, "jobDocument": step()})
    as_text = parse_execution({**execution, "jobDocument": json.dumps(step())})
    assert as_object
    assert as_text
    assert parse(as_object.document) == parse(as_text.document)
    for text in ("", "{", "[1]", '"x"', "[" * 100_000, '{"operation": NaN}'):
        broken = parse_execution({**execution, "jobDocument": text})
        assert broken
        with pytest.raises(RefusedError) as caught:
            parse(broken.document)
        assert caught.value.code == "bad_document"


COMMENT = "What this sample is for."
HANDLER = {"name": "Say It", "type": "runHandler", "input": {"handler": "echo", "args": ["Hello"]}}
INSTALL = {
    "name": "Install Packages",
    "type": "runHandler",
    "input": {"handler": "install-packages.sh", "args": ["lftp", "dos2unix"], "path": "default"},
    "runAsUser": "root",
}
IN_THE_FIELD = {
    "device client's samples: a comment and a handler from PATH": {"_comment": COMMENT, "steps": [{"action": HANDLER}]},
    "device client's samples: packages": {"_comment": COMMENT, "steps": [{"action": INSTALL}]},
    "device client's samples: command": {
        "_comment": COMMENT,
        "steps": [
            {
                "action": {
                    "name": "Create New Directory",
                    "type": "runCommand",
                    "input": {"command": "mkdir,newDir"},
                    "runAsUser": "root",
                }
            }
        ],
    },
    "device client's readme: two steps and a final one": {
        "_comment": COMMENT,
        "steps": [{"action": INSTALL}, {"action": {**HANDLER, "ignoreStepFailure": "true", "allowStdErr": 8}}],
        "finalStep": {"action": {**INSTALL, "ignoreStepFailure": "true"}},
    },
    "device client's tests: conditions": {
        "includeStdOut": "true",
        "conditions": [
            {"key": "operatingSystem", "value": ["ubuntu", "redhat"], "type": "stringEqual"},
            {"key": "OS", "value": ["16.0"], "type": "stringEqual"},
        ],
        "steps": [{"action": HANDLER}],
        "finalStep": {"action": INSTALL},
    },
    "device client's readme: condition without type": {
        "conditions": [{"key": "operatingSystem", "value": ["ubuntu"]}],
        "steps": [{"action": HANDLER}],
    },
    "workshop: an empty user": {"steps": [{"action": {**HANDLER, "runAsUser": ""}}]},
    "annotated for an editor": {
        "$schema": "https://example.com/run.schema.json",
        "steps": [{"_why": 1, "action": {**HANDLER, "_comment": [COMMENT], "input": {"handler": "h", "_note": None}}}],
    },
}


@pytest.mark.parametrize("name", IN_THE_FIELD)
def test_documents_as_people_write_them(name):
    document = {"version": "1.0", **IN_THE_FIELD[name]}
    operation, normal = parse(document)
    assert operation == "run"
    assert len(normal["steps"]) == len(document["steps"])
    assert "omment" not in json.dumps(normal)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            {**HANDLER, "input": {"command": "/opt/x", "timeout": 60}, "type": "runCommand"},
            "input.timeout: unknown key",
        ),
        ({**HANDLER, "input": {"command": "/x", "args": ["a"]}, "type": "runCommand"}, "input.args: unknown key"),
        ({**HANDLER, "input": {"command": "echo hello"}, "type": "runCommand"}, "words are separated by commas"),
        ({**HANDLER, "input": {"command": " ,a"}, "type": "runCommand"}, "words are separated by commas"),
        ({key: value for key, value in HANDLER.items() if key != "name"}, "steps.0.action.name: missing"),
        ({key: value for key, value in HANDLER.items() if key != "type"}, "steps.0.action: type: missing"),
    ],
)
def test_what_would_not_be_done_as_written_is_refused(document, said):
    with pytest.raises(RefusedError) as caught:
        parse({"version": "1.0", "steps": [{"action": document}]})
    assert said in caught.value.message


def test_steps_without_their_action_are_refused():
    with pytest.raises(RefusedError, match=r"steps.0.action: missing; steps.0.name: unknown key"):
        parse({"version": "1.0", "steps": [HANDLER]})


@pytest.mark.parametrize("command", ["a", "a,b c", " a , b", "a\\,b,c", "/bin/a,-x,\n"])
def test_commands(command):
    document = step(type="runCommand", input={"command": command})
    assert parse(document)[1]["steps"][0]["action"]["input"]["command"] == command


@pytest.mark.parametrize(("given_value", "meant"), [(0, 0), (8, 8), ("1", 1), ("0", 0), (None, None)])
def test_lines_on_standard_error_as_number_and_as_digits(given_value, meant):
    document = parse(step(allowStdErr=given_value))[1]
    assert document["steps"][0]["action"]["allow_std_err"] == meant
    document = parse({"operation": "h", "allowStdErr": given_value})[1]
    assert document["steps"][0]["action"]["allow_std_err"] == meant


REBOOT = {"version": "1.0", "operation": "reboot"}


def test_the_other_operations():
    assert parse(REBOOT) == ("reboot", {**REBOOT, "conditions": []})
    assert parse({"version": "1.0", "operation": "restart"})[1]["target"] == "agent"


@pytest.mark.parametrize(
    ("value", "kept"), [("debian", ["debian"]), (["a", "b"], ["a", "b"]), ("", [""])], ids=["one", "several", "empty"]
)
@pytest.mark.parametrize("operation", ["restart", "reboot", "run"])
def test_every_operation_takes_conditions(operation, value, kept):
    document = {**step(), "operation": operation} if operation == "run" else {"version": "1.0", "operation": operation}
    conditions = [{"key": "os.id", "value": value}, {"key": "os.id", "value": "x", "type": "stringLike"}]
    assert parse({**document, "conditions": conditions})[1]["conditions"] == [
        {"key": "os.id", "value": kept, "type": "stringEqual"},
        {"key": "os.id", "value": ["x"], "type": "stringLike"},
    ]
    assert parse(document)[1]["conditions"] == []


@pytest.mark.conformance("C-DOC-10")
@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({}, "conditions.0.key: missing"),
        ({"key": "os.id"}, "conditions.0.value: missing"),
        ({"key": "", "value": "x"}, "conditions.0.key"),
        ({"key": "os.id", "value": []}, "conditions.0.value"),
        ({"key": "os.id", "value": [1]}, "conditions.0.value.0"),
        ({"key": "os.id", "value": {"not": "x"}}, "conditions.0.value"),
        ({"key": "os.id", "value": "x", "type": 1}, "conditions.0.type"),
        ({"key": "os.id", "value": "x", "unless": True}, "conditions.0.unless: unknown key"),
        ("os.id", "conditions.0"),
    ],
)
def test_a_condition_that_is_none_refuses_the_document(condition, said):
    with pytest.raises(RefusedError) as caught:
        parse({**REBOOT, "conditions": [condition]})
    assert caught.value.code == "bad_document"
    assert said in caught.value.message


@pytest.mark.conformance("C-DOC-02")
@pytest.mark.parametrize(("given_value", "meant"), [("true", True), ("false", False), (True, True), (False, False)])
def test_flags_as_words_and_as_booleans(given_value, meant):
    action = {"name": "a", "type": "runHandler", "input": {"handler": "h"}, "ignoreStepFailure": given_value}
    document = parse({"version": "1.0", "steps": [{"action": action}], "includeStdOut": given_value})[1]
    assert document["steps"][0]["action"]["ignore_step_failure"] is meant
    assert document["include_std_out"] is meant
    assert parse(step())[1]["steps"][0]["action"]["ignore_step_failure"] is False


@pytest.mark.conformance("C-DOC-09")
def test_the_old_form():
    old = {
        "operation": "download-file.sh",
        "args": ["a"],
        "path": "default",
        "includeStdOut": "true",
        "allowStdErr": "1",
    }
    operation, document = parse(old)
    assert operation == "run"
    action = document["steps"][0]["action"]
    assert (action["input"]["handler"], action["input"]["args"], action["allow_std_err"]) == (
        "download-file.sh",
        ["a"],
        1,
    )
    assert document["include_std_out"] is True
    assert len(document["steps"]) == 1
    assert parse({"_comment": "c", "operation": "echo", "args": ["Hello world!"]})[1]["final_step"] is None


@pytest.mark.conformance("C-DOC-09")
@pytest.mark.parametrize(
    "more",
    [
        {"args": "a"},
        {"args": [1]},
        {"allowStdErr": "many"},
        {"steps": [{"action": {"name": "a", "type": "runHandler", "input": {"handler": "h"}}}]},
        {"finalStep": {"action": {}}},
        {"runAsUser": "root"},
        {"handler": "x"},
    ],
)
def test_the_old_form_is_taken_whole_or_not_at_all(more):
    with pytest.raises(RefusedError) as caught:
        parse({"operation": "download-file.sh", **more})
    assert caught.value.code == "bad_document"


def step(**changes):
    return {
        "version": "1.0",
        "steps": [{"action": {"name": "a", "type": "runHandler", "input": {"handler": "h"}, **changes}}],
    }


@pytest.mark.parametrize(
    ("document", "code", "said"),
    [
        (None, "bad_document", "no document"),
        ([], "bad_document", "no document"),
        ({}, "bad_document", "operation: missing"),
        ({"operation": 7}, "bad_document", "operation"),
        ({"version": "1.0", "operation": "format-disk"}, "unknown_operation", "format-disk"),
        ({"version": "2.0", "operation": "restart"}, "unknown_version", 'version: "2.0" is not known here'),
        ({"version": "1.0", "operation": "restart", "taget": "agent"}, "bad_document", "taget: unknown key"),
        ({"version": "1.0", "steps": []}, "bad_document", "steps"),
        ({"version": "1.1", "steps": [1]}, "unknown_version", '"1.1"'),
        ({**step(), "version": 1.0}, "unknown_version", "version: 1.0 is"),
        ({"version": "${aws:iot:parameter:v}"}, "unknown_version", "${aws:iot:parameter:v}"),
        ({"steps": step()["steps"]}, "bad_document", "version: missing"),
        (step(type="runShell"), "bad_document", "steps.0.action: type: must be 'runHandler', 'runCommand'"),
        (
            step(type="runCommand"),
            "bad_document",
            "steps.0.action.input.command: missing; steps.0.action.input.handler: unknown key",
        ),
        (step(ignoreStepFailure="maybe"), "bad_document", "ignoreStepFailure"),
        (step(allowStdErr=-1), "bad_document", "allowStdErr"),
        (step(input={"handler": "h", "args": ["${aws:iot:parameter:x}"]}), "placeholder_unresolved", "args[0]"),
        ({"version": "1.0", "operation": "update", "target": "p"}, "bad_document", "manifest: missing"),
        ({"version": "1.0", "operation": "restart", "target": "x" * 100_000}, "bad_document", "larger"),
    ],
)
def test_refusals(document, code, said):
    with pytest.raises(RefusedError) as caught:
        parse(document)
    assert caught.value.code == code
    assert said in caught.value.message


def nested(levels, kind=list):
    value = 1
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"operation": "x", "allowStdErr": "²"}, "allowStdErr"),
        (step(runAsUser="a\0b"), "steps[0].action.runAsUser: holds a NUL character"),
        (step(runAsUser="\ud800"), "steps[0].action.runAsUser: is not valid Unicode text"),
        (step(input={"handler": "h", "args": ["fine", "a\0b"]}), "steps[0].action.input.args[1]: holds a NUL"),
        (step(input={"handler": "h", "args": ["\ud800x"]}), "args[0]: is not valid Unicode"),
        (step(name="\ud83d bad \x1b[31m red"), "steps[0].action.name"),
        (step(type="runCommand", input={"command": "echo,a\0b"}), "input.command: holds a NUL"),
        ({"version": "1.0", "operation": "restart", "\ud800": 1}, "\\ud800: the key is not valid"),
        ({"version": "1.0", "operation": "restart", "a\0": 1}, "a\\x00: the key holds a NUL"),
        ({"version": "1.0", "operation": "restart", 5: 1}, "the key is not text"),
        ({"version": "1.0", "operation": "restart", "target": {1}}, "target: is no JSON value (set)"),
        ({**step(), "timeoutSeconds": float("nan")}, "timeoutSeconds: is not a finite number"),
        ({**step(), "timeoutSeconds": 10**5000}, "timeoutSeconds: is an integer of more than 64 bits"),
        ({**step(), "_comment": [{"a": nested(300)}]}, "nested deeper than 32 levels"),
        ({**step(), "_comment": [{"a": nested(900, dict)}]}, "nested deeper than 32 levels"),
        ({"version": "1.0", "operation": "run", "steps": nested(5000)}, "nested deeper than 32 levels"),
        ({"version": "1.0", "operation": nested(50_000, dict)}, "nested deeper than 32 levels"),
        ({"version": "1.0", "operation": "restart", "\x1b]0;x\x07": 1}, "\\x1b]0;x\\x07: unknown key"),
        ({"version": "1.0", "operation": "restart", **{f"k{n}": n for n in range(100)}}, "and 92 more"),
    ],
)
def test_what_no_program_could_take(document, said):
    with pytest.raises(RefusedError) as caught:
        parse(document)
    assert caught.value.code == "bad_document"
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1024


def test_thirty_two_levels_are_not_too_deep():
    assert parse({**step(), "_comment": [{"a": nested(29)}]})
    with pytest.raises(RefusedError, match="nested deeper"):
        parse({**step(), "_comment": [{"a": nested(30)}]})


any_text = st.text(st.characters(exclude_categories=())) | st.sampled_from(["\0", "\ud800", "1.0", "run", "update"])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(any_text, inner, max_size=3)
        | st.builds(lambda below, levels: [below, *nested(levels)], inner, st.integers(1, 2000))
    ),
    max_leaves=12,
)
known_keys = st.sampled_from(["version", "operation", "steps", "target", "args", "path", "allowStdErr", "urls"])


@given(st.dictionaries(known_keys | any_text, any_json, max_size=6))
def test_a_refusal_can_be_sent_and_a_document_stored(document):
    try:
        parsed = parse(document)[1]
    except RefusedError as error:
        assert error.code in ("bad_document", "unknown_version", "unknown_operation", "placeholder_unresolved")
        assert error.message.isprintable()
        error.message.encode()
    else:
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        assert "\0" not in text
        text.encode()


@given(any_text, st.sampled_from(["name", "runAsUser", "handler", "arg", "command"]))
def test_every_text_of_a_step(text, where):
    action = {"name": "a", "type": "runHandler", "input": {"handler": "h", "args": []}}
    if where == "command":
        action |= {"type": "runCommand", "input": {"command": text}}
    elif where in ("name", "runAsUser"):
        action[where] = text
    else:
        action["input"] = {"handler": "h", "args": [text]} if where == "arg" else {"handler": text}
    bad = "\0" in text or any("\ud800" <= c <= "\udfff" for c in text)
    try:
        parse({"version": "1.0", "steps": [{"action": action}]})
    except RefusedError as error:
        assert bad or error.code == "bad_document"
        error.message.encode()
    else:
        assert not bad


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
keys = st.sampled_from(
    ["version", "operation", "steps", "target", "action", "finalStep", "conditions", "urls", "manifest"]
)


@given(st.dictionaries(keys, json_values | st.sampled_from(["1.0", "update", "run", "restart"]), max_size=8))
def test_anything_is_a_document_or_a_refusal(document):
    try:
        operation, parsed = parse(document)
    except RefusedError as error:
        assert error.message
    else:
        assert operation in DOCUMENTS
        json.dumps(parsed)


# ---- schemas and docs --------------------------------------------------------------------------------------------------


def _schemas():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module("document_schemas").outputs()


OUTPUTS = _schemas()
SCHEMAS = {path.name.removesuffix(".schema.json"): json.loads(text) for path, text in OUTPUTS.items()}
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}
MANIFEST = {
    "payloadType": "application/vnd.camera-agent.update+json",
    "payload": "e30=",
    "signatures": [{"keyid": "k", "sig": "s"}],
}
FULL = {
    "update": {
        "version": "1.0",
        "operation": "update",
        "target": "pipeline",
        "manifest": MANIFEST,
        "urls": ["https://example.com/a"],
        "conditions": [{"key": "os.id", "value": ["a"], "type": "stringEqual"}],
    },
    "configure": {
        "version": "1.0",
        "operation": "configure",
        "agent": {"telemetry": {"interval_s": 10}, "log": {"level": None}},
        "targets": {"pipeline": {"fps": 5, "tone": {"x": [1]}}, "lens": None},
        "replace": "false",
    },
    "restart": {"version": "1.0", "operation": "restart", "target": "p", "conditions": []},
    "reboot": {"version": "1.0", "operation": "reboot", "conditions": [{"key": "a", "value": "b"}]},
    "run": {
        "version": "1.0",
        "operation": "run",
        "includeStdOut": "true",
        "timeoutSeconds": 1.5,
        "steps": [
            {
                "action": {
                    "name": "a",
                    "type": "runHandler",
                    "input": {"handler": "h", "args": ["x"], "path": "default"},
                    "runAsUser": "u",
                    "allowStdErr": "1",
                    "ignoreStepFailure": "false",
                    "timeoutSeconds": 5,
                }
            },
            {"action": {"name": "b", "type": "runCommand", "input": {"command": "a,b"}, "allowStdErr": 3}},
        ],
        "finalStep": {"action": {"name": "c", "type": "runHandler", "input": {"handler": "h"}, "_c": 1}},
    },
}


SITE = {"config": {"targets": {name: {"path": f"/etc/{name}"} for name in ("pipeline", "lens", "x")}}}


def is_parsed(document):
    """Whether the camera would begin with it; what a configuration holds is looked at by agent.config."""
    try:
        operation, normal = parse(document)
    except RefusedError:
        return False
    if operation != "configure":
        return True
    patch = {"agent": normal["agent"], "targets": normal["targets"]}
    return not wishes.validate(SITE, layers.patched(wishes.Desired(), patch))[1]


def sets_nothing(document):
    """Whether a value of a job `configure` is an empty object, which is nothing, as in a shadow."""
    agent = document.get("agent")
    return isinstance(agent, dict) and any(
        value == {} and setting_keys.remote(path) for path, value in wishes.leaves(agent).items()
    )


def test_the_schemas_in_docs_are_those_of_the_models():
    assert {path.name for path in (ROOT / "docs" / "schemas").iterdir()} == {
        f"{name}.schema.json" for name in [*DOCUMENTS, "desired"]
    }
    for path, text in OUTPUTS.items():
        assert path.read_text(encoding="utf-8") == text, "run scripts/generate-docs"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def _places(value, path=()):
    """Every place in a document, the innermost last."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from _places(below, (*path, key))


def _changed(document, path, change):
    if not path:
        return change(document)
    document = copy.deepcopy(document)
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = change(at[path[-1]])
    return document


ODD = [None, "", "x", "true", "1", True, 0, 1, -1, 2.5, [], [1], ["x"], {}, {"x": 1}, "y" * 300]


@pytest.mark.parametrize("operation", DOCUMENTS)
def test_schema_and_camera_agree_on_every_change_of_a_good_document(operation):
    """Each value replaced by odd ones, each key left out, an unknown key and a comment put into each object."""
    good, tried = FULL[operation], 0
    assert is_parsed(good)
    for path in _places(good):
        candidates = [_changed(good, path, lambda _, odd=odd: odd) for odd in ODD]
        candidates.append(_changed(good, path, lambda v: {**v, "unknown": 1} if isinstance(v, dict) else v))
        candidates.append(_changed(good, path, lambda v: {**v, "_comment": [1]} if isinstance(v, dict) else v))
        if path and isinstance(path[-1], str):
            candidates.append(
                _changed(good, path[:-1], lambda v, key=path[-1]: {k: x for k, x in v.items() if k != key})
            )
        for candidate in candidates:
            # Which form and operation it is has been decided before a schema is looked at.
            if not isinstance(candidate, dict) or "version" not in candidate or candidate.get("operation") != operation:
                continue
            if operation == "configure" and sets_nothing(candidate):
                continue
            tried += 1
            assert VALIDATORS[operation].is_valid(candidate) is is_parsed(candidate), candidate
    assert tried > 30
    print(f"{tried} changed documents tried")


documents = st.fixed_dictionaries(
    {"version": st.just("1.0")},
    optional={
        "operation": st.sampled_from(sorted(DOCUMENTS)),
        "target": st.text(max_size=34),
        "conditions": st.lists(
            st.fixed_dictionaries(
                {"key": st.text(max_size=4), "value": st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=3)},
                optional={"type": st.sampled_from(sorted(TYPES)) | st.text(max_size=4), "_c": any_json},
            ),
            max_size=3,
        ),
        "steps": st.lists(
            st.builds(
                lambda action: {"action": action},
                st.fixed_dictionaries(
                    {
                        "name": st.text(max_size=4),
                        "type": st.sampled_from(["runHandler", "runCommand"]),
                        "input": st.fixed_dictionaries({"handler": st.text(max_size=3)})
                        | st.fixed_dictionaries({"command": st.text(alphabet="ab ,\\\\\n\t", max_size=6)}),
                    },
                    optional={
                        "allowStdErr": st.integers() | st.sampled_from(["1", "x"]) | st.none() | st.booleans(),
                        "ignoreStepFailure": st.booleans() | st.sampled_from(["true", "false", "yes"]),
                        "timeoutSeconds": st.floats() | st.integers() | st.none(),
                        "runAsUser": st.text(max_size=3),
                    },
                ),
            ),
            min_size=1,
            max_size=2,
        ),
        "timeoutSeconds": st.floats() | st.integers(),
        "_comment": any_json,
        "$schema": any_json,
        "urls": st.lists(st.text(max_size=3), max_size=9),
        "manifest": st.just(MANIFEST),
    },
)


@given(documents)
@example({"version": "1.0", "operation": "reboot", "$schema": 1, "_": None})
def test_the_schema_takes_whatever_the_camera_takes(document):
    try:
        operation, _ = parse(document)
    except RefusedError:
        return
    VALIDATORS[operation].validate(document)


def blocks():
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def test_the_documents_in_the_docs_are_taken():
    found = blocks()
    operations = [parse(as_delivered(document))[0] for document in found]
    assert set(operations) == set(DOCUMENTS)
    for document, operation in zip(found, operations, strict=True):
        if "version" in document:
            VALIDATORS[operation].validate(document)


def _codes():
    """Every code that a job's errors and ends can have, by reading the code of agent/jobs."""
    for path in (ROOT / "agent" / "jobs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(r"(Refused|Failed)Error$", ast.unparse(node.func)):
                yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "reason_code" and isinstance(value, ast.Constant):
                        yield value.value


def test_the_docs_have_every_reason_code_fact_and_type():
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    table = text[text.index("## Reason codes") :]
    assert {code for code in _codes() if f"`{code}`" not in table} == set()
    keys = facts(host_facts(), agent_version="", thing_name="", targets={"<name>": None}, labels={"<name>": ""}, own={})
    assert {name for name in [*keys, *TYPES] if f"`{name}`" not in text} == set()


def test_the_order_of_versions_in_the_docs_is_true():
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    said = re.search(r"Versions are in Debian's order: (.*?)\. Write", text)
    assert said
    for chain in said[1].split(", "):
        for one, other in itertools.pairwise(chain.split(" < ")):
            assert compare_versions(one, other) < 0


def test_a_long_key_over_many_values_costs_no_more_memory_than_the_document():
    bomb = {"version": "1.0", "steps": [], "\U0001f4a5" + "k" * 9_000: [0] * 10_000}
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError):
            parse(bomb)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("user", ["${aws:iot:parameter:a}x", "x${aws:iot:parameter:a}", "${aws:iot:parameter:a"])
def test_a_user_that_is_filled_in_by_half_is_nobody(user):
    document = step(runAsUser=user)
    with pytest.raises(RefusedError) as caught:
        parse(document)
    assert caught.value.code == "placeholder_unresolved"
    assert parse(step(runAsUser="${aws:iot:parameter:a}"))[1]["steps"][0]["action"]["run_as_user"] == ""
