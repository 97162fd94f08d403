"""The manifest and its envelope: strict, whole, bounded."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.updates.manifest import (
    parse_envelope,
    parse_manifest,
    pre_authentication_encoding,
    strict_json,
)
from agent.versions import compare_versions
from tests.fakes_updates import manifest, signed_manifest


def refused(**changes):
    with pytest.raises(RefusedError) as error:
        parse_manifest(json.dumps(manifest(**changes)).encode())
    assert error.value.code == "manifest_malformed"
    return error.value.message


def test_defaults():
    parsed = parse_manifest(json.dumps(manifest()).encode())
    assert (parsed.restart, parsed.rollback, parsed.allow_downgrade) == ("unit", "yes", False)
    assert (parsed.gate.stable_for_s, parsed.gate.deadline_s) == (120, 900)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 0),
        ("size", 1.0),
        ("size", "10"),
        ("size", True),
        ("sha256", "AB" * 32),
        ("sha256", "ab" * 31),
        ("sha256", "ab" * 32 + "\n"),
        ("target", "../x"),
        ("name", ""),
        ("version", "v1"),
        ("version", "1\n"),
        ("security_counter", -1),
        ("expires", "2026-13-01T00:00:00Z"),
        ("expires", "2025-01-01T00:00:00Z"),
        ("created", "2026-01-01"),
        ("restart", "maybe"),
        ("schema", 2),
        ("gate", {"stable_for_s": 900, "deadline_s": 900}),
        ("gate", {"stable_for": 9}),
        ("allow_downgrade", 1),
        ("surprise", 1),
    ],
)
def test_wrong_values_are_named(key, value):
    message = refused(**{key: value})
    assert key in message or key == "expires"


@pytest.mark.parametrize("key", ["target", "sha256", "size", "expires", "security_counter"])
def test_missing_keys_are_named(key):
    document = manifest()
    del document[key]
    with pytest.raises(RefusedError, match=key):
        parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize("text", [b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff", b"", b"[" * 100_000])
def test_json_is_strict(text):
    with pytest.raises(RefusedError):
        strict_json(text)


def test_pae_is_dsse():
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"signatures": []}, "signature_missing"),
        ({"signatures": [{"keyid": "a"}]}, "manifest_malformed"),
        ({"signatures": {}}, "manifest_malformed"),
        ({"signatures": [{"keyid": "a", "sig": "AA=="}] * 17}, "manifest_malformed"),
        ({"payloadType": "text/plain"}, "manifest_malformed"),
        ({"payload": "not base64"}, "manifest_malformed"),
        ({"payload": "AB=="}, "manifest_malformed"),
        ({"payload": "AA==\n"}, "manifest_malformed"),
        ({"payload": "é"}, "manifest_malformed"),
        ({"payload": 1}, "manifest_malformed"),
        ({"payload": base64.b64encode(b"x" * 24_000).decode()}, "manifest_too_large"),
        ({"extra": 1}, "manifest_malformed"),
    ],
)
def test_envelopes_are_strict(change, code):
    with pytest.raises(RefusedError) as error:
        parse_envelope({**signed_manifest(), **change})
    assert error.value.code == code


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_any_document_is_parsed_or_refused(document):
    with pytest.raises(RefusedError):
        parse_envelope(document)
    with pytest.raises(RefusedError):
        parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.9", "1.10"),
        ("1.0", "1.0.1"),
        ("2.0~rc1", "2.0"),
        ("2.0~rc1", "2.0~rc2"),
        ("1.0", "1.0+b1"),
        ("1.0a", "1.0b"),
        ("1.0a", "1.0+1"),
        ("9", "10"),
        ("1.0~", "1.0"),
        ("1.0~~", "1.0~"),
    ],
)
def test_versions_are_ordered_as_debian_does(older, newer):
    assert compare_versions(older, newer) < 0 < compare_versions(newer, older)


VERSIONS = st.from_regex(r"[0-9][0-9a-c.+~-]{0,8}", fullmatch=True)


@given(VERSIONS, VERSIONS, VERSIONS)
def test_version_order_is_total(a, b, c):
    assert compare_versions(a, a) == 0
    assert compare_versions(a, b) == -compare_versions(b, a)
    if compare_versions(a, b) <= 0 and compare_versions(b, c) <= 0:
        assert compare_versions(a, c) <= 0
