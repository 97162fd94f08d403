"""Job documents: accepted as AWS writes them, refused with the place and the reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.jobs.document import parse

MANAGED = {
    "AWS-Reboot": {"handler": "reboot.sh", "path": "${aws:iot:parameter:pathToHandler}"},
    "AWS-Download-File": {
        "handler": "download-file.sh",
        "args": ["https://h/f?X-Amz-Signature=1", "/tmp/f"],
        "path": "",
    },
    "AWS-Install-Application": {"handler": "install-packages.sh", "args": ["vim curl"], "path": "default"},
    "AWS-Restart-Application": {"handler": "restart-services.sh", "args": ["a b"]},
}


@pytest.mark.parametrize("name", MANAGED)
def test_managed_templates(name):
    action = {"name": name, "type": "runHandler", "input": MANAGED[name], "runAsUser": "${aws:iot:parameter:runAsUser}"}
    operation, document = parse({"version": "1.0", "steps": [{"action": action}]})
    assert operation == "run"
    step = document["steps"][0]["action"]
    assert step["run_as_user"] == ""
    assert step["input"]["handler"] == MANAGED[name]["handler"]
    assert not step["input"]["path"].startswith("$")


@pytest.mark.parametrize(("given_value", "meant"), [("true", True), ("false", False), (True, True), (False, False)])
def test_flags_as_words_and_as_booleans(given_value, meant):
    action = {"name": "a", "type": "runHandler", "input": {"handler": "h"}, "ignoreStepFailure": given_value}
    document = parse({"version": "1.0", "steps": [{"action": action}], "includeStdOut": given_value})[1]
    assert document["steps"][0]["action"]["ignore_step_failure"] is meant
    assert document["include_std_out"] is meant


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
        ({"version": "2.0", "operation": "restart"}, "bad_document", "version"),
        ({"version": "1.0", "operation": "restart", "taget": "agent"}, "bad_document", "taget: unknown key"),
        ({"version": "1.0", "steps": []}, "bad_document", "steps"),
        ({"version": "1.1", "steps": [1]}, "bad_document", "version"),
        (step(type="runShell"), "bad_document", "steps.0.action.type"),
        (step(type="runCommand"), "bad_document", "runCommand needs input.command"),
        (step(ignoreStepFailure="maybe"), "bad_document", "ignoreStepFailure"),
        (step(allowStdErr=-1), "bad_document", "allowStdErr"),
        (step(input={"handler": "h", "args": ["${aws:iot:parameter:x}"]}), "placeholder_unresolved", "args[0]"),
        ({"version": "1.0", "operation": "update", "target": "p"}, "bad_document", "manifest: missing"),
        ({"version": "1.0", "operation": "restart", "target": "x" * 40000}, "bad_document", "larger"),
    ],
)
def test_refusals(document, code, said):
    with pytest.raises(RefusedError) as caught:
        parse(document)
    assert caught.value.code == code
    assert said in caught.value.message


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
        assert operation in ("update", "restart", "run")
        json.dumps(parsed)
