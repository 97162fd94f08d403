"""The messages of file streams: what is asked for, and that nothing but the right block is ever taken."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cloud.stream_blocks import (
    BLOCK_BYTES,
    MOST_BLOCKS,
    Wanted,
    block_of,
    blocks_at,
    description_of,
    next_run,
    refusal_of,
    request,
)

SIZE = 2 * BLOCK_BYTES + 2
WANTED = Wanted(file_id=0, size=SIZE, token="t1")


def data_message(**changes):
    message = {"c": "t1", "f": 0, "l": 2, "i": 2, "p": "aGk=", **changes}
    return json.dumps({key: value for key, value in message.items() if value is not None}).encode()


@pytest.mark.conformance("C-STRM-01")
def test_a_request_counts_blocks():
    assert request(WANTED, 1, range(2, 5)) == {"c": "t1", "s": 1, "f": 0, "l": BLOCK_BYTES, "o": 2, "n": 3}
    assert blocks_at(2 * BLOCK_BYTES + 1, 2**20, 10**9).start == 2


@pytest.mark.conformance("C-STRM-01", "C-STRM-02")
@given(st.integers(1, 2**31), st.data())
def test_the_blocks_asked_for_hold_what_is_wanted_and_are_few(size, data):
    offset = data.draw(st.integers(0, size - 1))
    most = data.draw(st.integers(1, 2**20))
    blocks = blocks_at(offset, most, size)
    assert blocks.start * BLOCK_BYTES <= offset < blocks.stop * BLOCK_BYTES
    assert (blocks.stop - 1) * BLOCK_BYTES < size
    assert 1 <= len(blocks) <= MOST_BLOCKS
    assert len(blocks) * BLOCK_BYTES <= max(most, BLOCK_BYTES)
    assert MOST_BLOCKS * BLOCK_BYTES <= 131_072


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 8))
def test_gaps_are_asked_for_one_after_the_other(missing, most):
    run = next_run(missing, most)
    assert run.start == min(missing)
    assert set(run) <= missing
    assert len(run) <= most
    assert len(run) == most or run.stop not in missing


@pytest.mark.conformance("C-STRM-04")
@pytest.mark.parametrize("token", ["t1", None])
def test_the_short_last_block_is_taken(token):
    assert block_of(data_message(c=token), WANTED, {2}) == (2, b"hi")


@pytest.mark.conformance("C-STRM-04")
@pytest.mark.parametrize(
    "changes",
    [
        {"l": 3},
        {"l": 1},
        {"l": 3, "p": "aGlo"},
        {"p": "aGlo"},
        {"p": ""},
        {"p": "aGk"},
        {"p": "aG k="},
        {"p": "\u00e9\u00e9=="},
        {"p": 5},
        {"p": None},
        {"l": None},
        {"l": 2.0},
        {"l": "2"},
        {"i": 1},
        {"i": -1},
        {"i": True},
        {"i": [2]},
        {"i": None},
        {"f": 1},
        {"f": False},
        {"f": None},
        {"c": "t2"},
        {"c": 7},
    ],
)
def test_a_wrong_block_is_dropped(changes):
    assert isinstance(block_of(data_message(**changes), WANTED, {2}), str)


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"i":1e999}', b"9" * 5000])
def test_what_is_no_message_is_dropped(payload):
    assert isinstance(block_of(payload, WANTED, {2}), str)
    assert description_of(payload, "t1") is None
    assert refusal_of(payload).code == "rejected"


@pytest.mark.conformance("C-STRM-03", "C-STRM-04")
@given(st.binary(min_size=1, max_size=200), st.data())
def test_whatever_comes_in_whatever_order_the_file_is_the_same(content, data):
    """Blocks in any order, twice, of other files and requests, cut and flipped: what is taken makes the file."""
    from agent.cloud import stream_blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_blocks, "BLOCK_BYTES", 16)
        wanted = Wanted(3, len(content), "mine")
        missing = set(range(-(-len(content) // 16)))
        blocks = {}
        good = [message_of(content, block) for block in missing]
        noise = data.draw(st.lists(st.sampled_from(good).flatmap(damaged), max_size=20))
        for payload in data.draw(st.permutations(good + good + noise)):
            found = block_of(payload, wanted, missing)
            if not isinstance(found, str):
                missing.remove(found[0])
                blocks[found[0]] = found[1]
    assert not missing
    assert b"".join(blocks[block] for block in sorted(blocks)) == content


def message_of(content, block):
    part = content[block * 16 : block * 16 + 16]
    return json.dumps({"c": "mine", "f": 3, "l": len(part), "i": block, "p": base64.b64encode(part).decode()}).encode()


def damaged(payload):
    """Another message of the same kind that must not be taken for this block."""
    message = json.loads(payload)
    return st.one_of(
        st.integers(0, len(payload) - 1).map(lambda end: payload[:end]),
        st.sampled_from(
            [{"c": "other"}, {"f": 4}, {"l": message["l"] + 1}, {"i": 10**6}, {"p": message["p"][4:]}, {"p": "!!!!"}]
        ).map(lambda changes: json.dumps({**message, **changes}).encode()),
    )


def test_a_description():
    found = description_of(b'{"c":"t1","s":3,"d":"x","r":[{"f":0,"z":10},{"f":255,"z":0},{"f":-1,"z":4},5]}', "t1")
    assert (found.version, found.sizes) == (3, {0: 10, 255: 0})
    assert description_of(b'{"s":0,"r":[]}', "t1").sizes == {}
    assert description_of(b'{"c":"t2","s":3,"r":[]}', "t1") is None
    assert description_of(b'{"s":"3","r":[]}', "t1") is None
    assert description_of(b'{"s":3,"r":{}}', "t1") is None


@pytest.mark.conformance("C-STRM-06")
@pytest.mark.parametrize("token", ["t1", None])
@pytest.mark.parametrize("keys", [("o", "m", "c"), ("code", "message", "clientToken")])
def test_a_refusal_in_either_spelling(token, keys):
    values = dict(zip(keys, ("VersionMismatch", "it is 2", token), strict=True))
    found = refusal_of(json.dumps({key: value for key, value in values.items() if value}).encode())
    assert (found.code, found.message, found.token) == ("VersionMismatch", "it is 2", token)


@given(st.dictionaries(st.sampled_from(["o", "m", "c", "code", "message", "clientToken"]), st.none() | st.integers()))
def test_a_refusal_of_nonsense(message):
    assert refusal_of(json.dumps(message).encode()).code == "rejected"
