"""What each HTTP answer means for a download: every combination of what matters."""

import itertools

import pytest

from agent.updates.sources import Broken, Expired, Strange, Useless
from agent.updates.sources.answers import Answer, Body, WrongRangeError, judge

SIZE = 1000
LENGTHS = {"right": "1000", "short": "999", "long": "1001", "none": None, "nonsense": "ten"}
RANGES = {"right": "bytes 400-999/1000", "start": "bytes 0-999/1000", "total": "bytes 400-998/999", "none": None}


def answer(status, secure, elsewhere, kind, etag, length=None, content_range=None):
    headers = {
        "Content-Type": kind,
        "ETag": etag,
        "Content-Length": LENGTHS.get(length),
        "Content-Range": RANGES.get(content_range),
    }
    kept = {name: value for name, value in headers.items() if value is not None}
    return Answer("a.example", status, kept, secure, elsewhere)


def outcome(given, offset):
    try:
        return judge(given, offset, SIZE)
    except (Broken, Expired, Strange, Useless) as verdict:
        return verdict


EVERY = list(
    itertools.product(
        (200, 206, 204, 304, 400, 401, 403, 404, 408, 410, 416, 425, 429, 451, 500, 503, 511),
        (True, False),
        (True, False),
        (None, "text/html; charset=utf-8", "TEXT/HTML", "application/xml"),
        (None, '"one"', 'W/"one"', '"one" \r\nX: y'),
        LENGTHS,
        RANGES,
        (0, 400),
    )
)


def test_every_answer():
    for status, secure, elsewhere, kind, etag, length, content_range, offset in EVERY:
        given = answer(status, secure, elsewhere, kind, etag, length, content_range)
        found = outcome(given, offset)
        may_be_a_login_page = not secure and (elsewhere or "html" in (kind or "").lower())
        if may_be_a_login_page:
            assert not isinstance(found, (Useless, Expired)), given
        if isinstance(found, Body):
            assert status in (200, 206)
            assert found.from_start == (status == 200)
            assert found.etag in ("", '"one"')
            assert status == 206 or length == "right" or (length == "none" and not may_be_a_login_page)
            assert status == 200 or content_range == ("right" if offset else "start")
        if status == 200 and length in ("short", "long"):
            certain = secure or (etag == '"one"' and not may_be_a_login_page)
            assert isinstance(found, Useless if certain else Strange)
            assert found.code == ("download_too_large" if length == "long" else "download_wrong_size")
        if isinstance(found, WrongRangeError):
            assert status == 206
        if status >= 500 or status in (408, 425, 429):
            assert isinstance(found, Broken)
        if status in (400, 401, 403, 410) and not may_be_a_login_page:
            assert isinstance(found, Expired)
    print(f"{len(EVERY)} answers tried")


@pytest.mark.parametrize(
    ("content_range", "offset"),
    [
        ("bytes 400-399/1000", 400),
        ("bytes 400-1000/1000", 400),
        ("bytes 400-999/*", 400),
        ("bytes=400-999/1000", 400),
        ("items 400-999/1000", 400),
        ("bytes 0400-999/1000\n", 400),
        ("", 400),
        ("bytes 401-999/1000", 400),
    ],
)
def test_another_range(content_range, offset):
    given = Answer("a", 206, {"Content-Range": content_range}, secure=True, elsewhere=False)
    with pytest.raises(WrongRangeError):
        judge(given, offset, SIZE)


def test_the_parts_of_a_multipart_answer_are_not_taken_for_the_artifact():
    headers = {"Content-Type": "multipart/byteranges; boundary=x", "Content-Length": "1000"}
    with pytest.raises(WrongRangeError):
        judge(Answer("a", 206, headers, secure=True, elsewhere=False), 400, SIZE)


def test_a_server_that_refuses_the_range_of_what_it_has():
    headers = {"Content-Range": "bytes */1000"}
    with pytest.raises(WrongRangeError):
        judge(Answer("a", 416, headers, secure=True, elsewhere=False), 400, SIZE)
    with pytest.raises(Useless) as error:
        judge(Answer("a", 416, {"Content-Range": "bytes */300"}, secure=True, elsewhere=False), 400, SIZE)
    assert error.value.code == "download_wrong_size"


def test_a_wrong_size_names_the_encoding():
    headers = {"Content-Length": "90", "Content-Encoding": "gzip"}
    with pytest.raises(Useless, match="90 bytes, with Content-Encoding gzip, signed were 1000"):
        judge(Answer("a", 200, headers, secure=True, elsewhere=False), 0, SIZE)
