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
        ({**step(), "conditions": [{"a": nested(300)}]}, "nested deeper than 32 levels"),
        ({**step(), "conditions": [{"a": nested(900, dict)}]}, "nested deeper than 32 levels"),
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
    deep = {**step(), "conditions": [{"a": nested(29)}]}
    assert parse(deep)[1]["conditions"]
    with pytest.raises(RefusedError, match="nested deeper"):
        parse({**step(), "conditions": [{"a": nested(30)}]})


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
        assert error.code in ("bad_document", "unknown_operation", "placeholder_unresolved")
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
        assert operation in ("update", "restart", "run")
        json.dumps(parsed)
