"""Whose signatures count: thresholds, rotation, floors, and not one flipped bit."""

import asyncio
import json
import re
import sqlite3
from contextlib import closing

import pytest

from agent.errors import RefusedError
from agent.store import Store
from agent.updates.records import ROOT as KEPT_ROOT
from agent.updates.records import believable_time
from agent.updates.trust import Installed, Verified, check_version, load_root, parse_root, verify
from tests.fakes_updates import (
    EMERGENCY,
    RELEASE,
    STRANGER,
    keyid_of,
    manifest,
    new_key,
    root_payload,
    sign,
    signed_manifest,
    signed_root,
)

ROOT = parse_root(signed_root(root_payload()))
NOW = 1_800_000_000.0


def code_of(call, *arguments):
    with pytest.raises(RefusedError) as error:
        call(*arguments)
    assert error.value.message
    return error.value.code


def test_release_and_emergency_are_told_apart():
    assert verify(signed_manifest(), ROOT, NOW).roles == {"release"}
    assert verify(signed_manifest(EMERGENCY), ROOT, NOW).roles == {"emergency"}
    assert verify(signed_manifest(RELEASE, EMERGENCY, STRANGER), ROOT, NOW).roles == {"release", "emergency"}


def test_strangers_do_not_count():
    assert code_of(verify, signed_manifest(STRANGER), ROOT, NOW) == "signature_unknown"


def test_one_key_counts_once():
    other = new_key(9)
    root = parse_root(signed_root(root_payload(release=(RELEASE, other), thresholds=(2, 1))))
    assert code_of(verify, signed_manifest(RELEASE, RELEASE), root, NOW) == "signature_unknown"
    assert verify(signed_manifest(RELEASE, other), root, NOW).roles == {"release"}


def test_a_signature_is_bound_to_the_payload_type():
    payload = json.dumps(manifest()).encode()
    envelope = sign(payload, [RELEASE], "application/other")
    envelope["payloadType"] = "application/vnd.camera-agent.update+json"
    assert code_of(verify, envelope, ROOT, NOW) == "signature_invalid"


def test_no_single_flipped_bit_is_accepted():
    text = json.dumps(signed_manifest(), separators=(",", ":")).encode()
    tried, accepted = 0, []
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        tried += 1
        try:
            verify(json.loads(bytes(flipped)), ROOT, NOW)
        except (RefusedError, ValueError):
            continue
        accepted.append(bit)
    print(f"{tried} bits flipped, {len(accepted)} accepted")
    assert tried > 5000
    assert accepted == []


def test_expiry_only_when_the_clock_is_believed():
    old = signed_manifest(expires="2026-02-01T00:00:00Z")
    assert code_of(verify, old, ROOT, NOW) == "manifest_expired"
    assert verify(old, ROOT, None)
    expired = parse_root(signed_root(root_payload(expires="2026-01-01T00:00:00Z")))
    assert code_of(verify, signed_manifest(), expired, NOW) == "keys_expired"


@pytest.mark.parametrize(("now", "last", "synchronised"), [(99, 100, True), (100, 0, False), (100, 0, None)])
def test_an_unsure_clock_is_not_believed(now, last, synchronised):
    assert believable_time(now, last, lambda: synchronised) is None
    assert believable_time(100, 100, lambda: True) == 100


def broken(**changes):
    return code_of(parse_root, signed_root({**root_payload(), **changes}))


def test_roots_are_consistent():
    payload = root_payload()
    release = payload["roles"]["release"]
    assert broken(version=0) == "keys_invalid"
    assert broken(roles={**payload["roles"], "release": {**release, "threshold": 2}}) == "keys_invalid"
    assert broken(roles={**payload["roles"], "release": {**release, "keyids": [keyid_of(EMERGENCY)]}}) == "keys_invalid"
    assert broken(roles={**payload["roles"], "release": {**release, "keyids": [keyid_of(STRANGER)]}}) == "keys_invalid"
    keys = dict(payload["keys"])
    keys[keyid_of(RELEASE)], keys[keyid_of(EMERGENCY)] = keys[keyid_of(EMERGENCY)], keys[keyid_of(RELEASE)]
    assert broken(keys=keys) == "keys_invalid"
    assert code_of(parse_root, signed_root(payload, RELEASE)) == "keys_invalid"
    assert code_of(parse_root, signed_root(payload, STRANGER)) == "keys_invalid"


def put(folder, **files):
    for name, document in files.items():
        (folder / f"{name.removeprefix('v').replace('_', '.')}.json").write_text(json.dumps(document))


NEXT_EMERGENCY = new_key(20)
SECOND = root_payload(2, release=(new_key(21),), emergency=(NEXT_EMERGENCY,))
THIRD = root_payload(3, release=(new_key(21),), emergency=(NEXT_EMERGENCY,))
GOOD_SECOND = signed_root(SECOND, EMERGENCY, NEXT_EMERGENCY)
FIRST = signed_root(root_payload())


def test_no_keys(tmp_path):
    assert code_of(load_root, tmp_path, None) == "no_update_keys"
    assert code_of(load_root, tmp_path / "missing", None) == "no_update_keys"
    assert code_of(load_root, tmp_path, FIRST) == "no_update_keys"


def test_rotation(tmp_path):
    put(tmp_path, root=FIRST)
    assert load_root(tmp_path, None).version == 1
    put(tmp_path, v2_root=GOOD_SECOND)
    assert load_root(tmp_path, FIRST).version == 2
    put(tmp_path, v3_root=signed_root(THIRD, NEXT_EMERGENCY))
    root = load_root(tmp_path, None)
    assert root.version == 3
    assert code_of(verify, signed_manifest(), root, NOW) == "signature_unknown"


def test_a_replaced_root_follows_the_kept_one(tmp_path):
    put(tmp_path, root=GOOD_SECOND)
    assert load_root(tmp_path, FIRST).version == 2


def test_an_older_file_does_not_bring_back_old_keys(tmp_path):
    put(tmp_path, root=FIRST)
    assert load_root(tmp_path, GOOD_SECOND).version == 2


@pytest.mark.parametrize("keys", [(NEXT_EMERGENCY,), (NEXT_EMERGENCY, RELEASE), (NEXT_EMERGENCY, STRANGER)])
def test_the_keys_before_must_sign_the_next(tmp_path, keys):
    put(tmp_path, root=FIRST, v2_root=signed_root(SECOND, *keys))
    assert code_of(load_root, tmp_path, None) == "keys_rejected"


def test_the_next_keys_must_sign_themselves(tmp_path):
    put(tmp_path, root=FIRST, v2_root=signed_root(SECOND, EMERGENCY))
    assert code_of(load_root, tmp_path, None) == "keys_invalid"


def test_versions_are_not_skipped_or_swapped(tmp_path):
    put(tmp_path, root=FIRST, v3_root=signed_root(THIRD, EMERGENCY, NEXT_EMERGENCY))
    assert code_of(load_root, tmp_path, None) == "keys_rejected"
    (tmp_path / "3.root.json").unlink()
    put(tmp_path, root=signed_root(root_payload(release=(new_key(30),))))
    assert code_of(load_root, tmp_path, FIRST) == "keys_rejected"


@pytest.mark.parametrize("text", ["", "[]", "{}", "x" * 200_000, "[" * 90_000, '{"payload":' * 9000])
def test_unreadable_roots_are_named(tmp_path, text):
    (tmp_path / "root.json").write_text(text)
    assert code_of(load_root, tmp_path, None) == "keys_invalid"


@pytest.mark.parametrize("kept", [{}, {"x": 1}, [], "text", 5, signed_root(root_payload(), STRANGER)])
def test_a_kept_root_that_cant_be_used_is_not_passed_over(tmp_path, kept):
    put(tmp_path, root=FIRST, v2_root=GOOD_SECOND)
    with pytest.raises(RefusedError) as error:
        load_root(tmp_path, kept)
    assert error.value.code == "kept_root_invalid"
    assert error.value.message.startswith("the root that this camera keeps can't be used: ")
    assert "with the agent stopped" in error.value.hint
    assert code_of(lambda: load_root(tmp_path, kept, way_out="another")) == "kept_root_invalid"


async def test_the_way_out_of_an_unusable_kept_root_works(tmp_path):
    await asyncio.to_thread(put, tmp_path, root=FIRST)
    store = await Store.open(tmp_path / "state.db")
    await store.write(lambda tables: tables.set_fact(KEPT_ROOT, {"x": 1}))
    with pytest.raises(RefusedError) as error:
        await asyncio.to_thread(load_root, tmp_path, await store.read(lambda tables: tables.fact(KEPT_ROOT)))
    await store.close()
    database, statement = re.search(r'sqlite3 (\S+) "(.+)"$', error.value.hint).groups()

    def by_hand():
        with closing(sqlite3.connect(tmp_path / database)) as connection, connection:
            return connection.execute(statement).rowcount

    assert await asyncio.to_thread(by_hand) == 1
    store = await Store.open(tmp_path / "state.db")
    kept = await store.read(lambda tables: tables.fact(KEPT_ROOT))
    await store.close()
    assert (await asyncio.to_thread(load_root, tmp_path, kept)).version == 1


@pytest.mark.parametrize("depth", [10, 500, 900, 2000, 5000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nested_payloads_are_refused_in_words(opening, depth):
    closing = "]" if opening == "[" else "}"
    nested = opening * depth + "1" + closing * depth
    for payload in (nested, json.dumps(manifest(compatible="HERE")).replace('"HERE"', nested)):
        envelope = sign(payload.encode(), [RELEASE], "application/vnd.camera-agent.update+json")
        code = "manifest_malformed" if len(payload) < 24_000 else "manifest_too_large"
        assert code_of(verify, envelope, ROOT, NOW) == code
        root = sign(payload.encode(), [EMERGENCY], "application/vnd.camera-agent.root+json")
        assert code_of(parse_root, root) == "keys_invalid"


@pytest.mark.parametrize("place", ["payload", "payloadType", "signatures", "sig", "keyid"])
def test_nested_envelopes_are_refused_in_words(place):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    envelope = signed_manifest()
    (envelope if place in envelope else envelope["signatures"][0])[place] = nested
    assert code_of(verify, envelope, ROOT, NOW) == "manifest_malformed"


HERE = Installed("pipe", "2.0", "ab" * 32, 5)


def version_check(floor=0, installed=HERE, keys=(RELEASE,), **changes):
    verified = verify(signed_manifest(*keys, **changes), ROOT, NOW)
    assert isinstance(verified, Verified)
    return check_version(verified, installed, floor)


def test_floors_and_versions():
    new = {"sha256": "cd" * 32}
    assert version_check() == "already_installed"
    assert version_check(version="2.1", **new) == "install"
    assert version_check(installed=None) == "install"
    assert version_check(floor=5, version="3.0", **new) == "install"
    assert code_of(lambda: version_check(floor=6, version="3.0", **new)) == "counter_too_low"
    assert code_of(lambda: version_check(**new)) == "version_not_newer"
    assert code_of(lambda: version_check(version="1.9", **new)) == "version_not_newer"
    assert code_of(lambda: version_check(version="3.0", name="other", **new)) == "name_differs"


def test_a_downgrade_needs_the_emergency_role_and_the_floor():
    old = {"version": "1.9", "sha256": "cd" * 32, "allow_downgrade": True}
    assert code_of(lambda: version_check(**old)) == "version_not_newer"
    assert code_of(lambda: version_check(keys=(EMERGENCY,), **{**old, "allow_downgrade": False})) == "version_not_newer"
    assert version_check(keys=(EMERGENCY,), **old) == "install"
    assert code_of(lambda: version_check(floor=6, keys=(EMERGENCY,), **old)) == "counter_too_low"


@pytest.mark.parametrize("version", ["factory", "", "1:", "git-2024", "1.0 (beta)", "canary\n" * 50])
def test_an_installed_version_that_has_no_order(version):
    odd = Installed("pipe", version, "ab" * 32)
    new = {"installed": odd, "sha256": "cd" * 32, "version": "3.0"}
    with pytest.raises(RefusedError) as error:
        version_check(**new)
    assert error.value.code == "version_unknown"
    assert "can't be ordered against pipe 3.0" in error.value.message
    assert "\n" not in error.value.message
    assert "--allow-downgrade" in error.value.hint
    assert code_of(lambda: version_check(**new, keys=(EMERGENCY,))) == "version_unknown"
    assert code_of(lambda: version_check(**new, allow_downgrade=True)) == "version_unknown"
    assert version_check(**new, keys=(EMERGENCY,), allow_downgrade=True) == "install"
