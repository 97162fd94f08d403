"""Times of the week: every minute of a week against a plain count of minutes, the words, and the nights when clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.timetable import DAYS, Window, next_opening, open_stretch, parse_window, soonest

DAY = 24 * 60
WEEK = 7 * DAY
MONDAY = datetime(2026, 11, 23, tzinfo=UTC)
MADRID = ZoneInfo("Europe/Madrid")

windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    st.integers(0, 24 * 60 - 1),
    st.integers(1, 24 * 60),
)
moments = st.timedeltas(timedelta(0), timedelta(days=21)).map(lambda ahead: MONDAY + ahead)


def minutes_of(window: Window) -> set[int]:
    """The minutes of a week, from Monday 00:00, in which it is open: counted, not reckoned."""
    return {
        (day * 24 * 60 + minute) % WEEK
        for day in window.days
        for minute in range(window.start, window.start + window.length)
    }


@pytest.mark.parametrize(
    "text",
    [
        "22:00-04:00",
        "00:00-24:00",
        "12:00-12:00",
        "23:59-00:00",
        "00:00-00:01",
        "mon 00:00-24:00",
        "sun 22:00-04:00",
        "sat,sun 00:00-24:00",
        "fri-mon 18:30-06:15",
        "mon,wed,fri 23:00-23:00",
    ],
)
def test_every_minute_of_a_week(text: str):
    window = parse_window(text)
    inside = minutes_of(window)
    opening = None
    for minute in reversed(range(2 * WEEK)):
        if minute % WEEK in inside:
            opening = minute
        at = MONDAY + timedelta(minutes=minute)
        if minute < WEEK:
            assert bool(window.left(at)) is (minute in inside)
            assert opening is not None
            assert window.until(at) == timedelta(minutes=opening - minute)
            assert soonest([window], at) == window.until(at)
    print(f"{WEEK} minutes tried")


@given(windows, moments)
def test_an_opening_is_where_it_says(window: Window, at: datetime):
    wait = window.until(at)
    assert timedelta(0) <= wait <= timedelta(days=7)
    assert window.left(at + wait) > timedelta(0)
    if wait:
        assert not window.left(at)
        assert not window.left(at + wait - timedelta.resolution)
        assert window.since(at + wait) == timedelta(0)


@given(windows, moments)
def test_an_open_window_closes_when_it_says(window: Window, at: datetime):
    at += window.until(at)
    assert window.since(at) >= timedelta(0)
    assert window.since(at) + window.left(at) == timedelta(minutes=window.length)
    opened = at - window.since(at)
    assert (opened.hour * 60 + opened.minute, opened.second) == (window.start, 0)
    assert opened.weekday() in window.days
    closes = at + window.left(at)
    minute = (closes - MONDAY) // timedelta(minutes=1) % WEEK
    assert bool(window.left(closes)) is (minute in minutes_of(window)), "only another day's follows at once"


@given(st.lists(windows, min_size=1, max_size=4), moments)
def test_of_several_the_first_to_open_counts(several: list[Window], at: datetime):
    wait = soonest(several, at)
    assert any(window.left(at + wait) for window in several)
    assert wait == min(window.until(at) for window in several)


# ---- how it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "days", "start", "length"),
    [
        ("22:00-04:00", "mon tue wed thu fri sat sun", 22 * 60, 6 * 60),
        ("  Mon-Fri   08:30-09:00 ", "mon tue wed thu fri", 510, 30),
        ("fri-mon 00:00-24:00", "fri sat sun mon", 0, 1440),
        ("sat,sun,sat 10:00-10:00", "sat sun", 600, 1440),
        ("mon-mon 00:00-00:00", "mon", 0, 1440),
        ("sun-sat 00:00-00:01", "mon tue wed thu fri sat sun", 0, 1),
    ],
)
def test_what_is_written(text: str, days: str, start: int, length: int):
    assert parse_window(text) == Window(frozenset(map(DAYS.index, days.split())), start, length)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22:00",
        "22-04",
        "2:00-4:00",
        "22:00-04:60",
        "24:01-02:00",
        "24:00-02:00",
        "25:00-02:00",
        "22:00 - 04:00",
        "22:00-04:00 mon",
        "mon22:00-04:00",
        "montag 22:00-04:00",
        "mon- 22:00-04:00",
        "-mon 22:00-04:00",
        "mon,,tue 22:00-04:00",
        "mon-tue-wed 22:00-04:00",
        "mon, tue 22:00-04:00",
        "٢٢:٠٠-٠٤:٠٠",
        "22:00-04:00\n22:00-04:00",
    ],
)
def test_what_can_not_be_understood_is_refused(text: str):
    with pytest.raises(ValueError, match=r"write it as|is no time of day|is none of|24:00 can only be an end"):
        parse_window(text)


@given(st.text(alphabet="monfrisatu,-: 0123456789", max_size=24))
def test_any_text_is_a_window_or_a_value_error(text: str):
    try:
        window = parse_window(text)
    except ValueError:
        return
    assert window.days
    assert 0 <= window.start < 1440
    assert 1 <= window.length <= 1440


# ---- nights when clocks change: the wall's clock alone decides --------------------------------------------------------


def test_a_window_goes_by_the_wall_when_an_hour_is_left_out():
    """In Madrid 02:00 became 03:00 on 29 March 2026: of 01:00-04:00 two hours were left."""
    window = parse_window("01:00-04:00")
    begin = datetime(2026, 3, 29, 0, 0, tzinfo=MADRID).timestamp()
    open_at = [
        minute
        for minute in range(6 * 60)
        if window.left(datetime.fromtimestamp(begin + minute * 60, UTC).astimezone(MADRID))
    ]
    assert open_at == list(range(60, 180))


def test_a_window_goes_by_the_wall_when_an_hour_comes_twice():
    """In Madrid 03:00 became 02:00 on 25 October 2026: 01:00-04:00 lasted four hours."""
    window = parse_window("01:00-04:00")
    begin = datetime(2026, 10, 25, 0, 0, tzinfo=MADRID).timestamp()
    open_at = [
        minute
        for minute in range(8 * 60)
        if window.left(datetime.fromtimestamp(begin + minute * 60, UTC).astimezone(MADRID))
    ]
    assert open_at == list(range(60, 300))


@given(windows, st.sampled_from([(2026, 3, 29), (2026, 10, 25)]), st.integers(0, 24 * 60 - 1))
def test_a_change_of_clocks_only_shifts_what_the_wall_says(window: Window, day: tuple[int, int, int], minute: int):
    instant = datetime(*day, tzinfo=MADRID).timestamp() + minute * 60
    local = datetime.fromtimestamp(instant, UTC).astimezone(MADRID)
    same_wall = local.replace(tzinfo=UTC, fold=0)
    assert window.left(local) == window.left(same_wall)
    assert window.until(local) == window.until(same_wall)


NIGHTS = {
    "Europe/Madrid": ["2026-03-29", "2026-10-25"],
    "America/New_York": ["2026-03-08", "2026-11-01"],
    "Australia/Lord_Howe": ["2026-04-05", "2026-10-04"],  # half an hour
    "Asia/Kolkata": ["2026-03-29"],  # never
}
"""Days in which clocks change, where they do."""
ZONES = {name: ZoneInfo(name) for name in NIGHTS}
TIMETABLES = [
    ["01:00-04:00"],
    ["02:00-03:00"],  # not there on a night, and twice on another
    ["02:15-02:25"],
    ["02:30-05:00"],
    ["01:45-02:00"],
    ["01:00-02:00"],
    ["03:00-03:01"],
    ["22:00-02:30"],
    ["01:00-01:50", "02:10-02:40", "03:00-04:00"],
    ["22:00-24:00", "00:00-01:30", "01:30-06:00"],
    ["sun 02:30-02:00"],
    ["sat 12:00-12:00", "sun 02:00-02:45"],
    ["mon 02:15-02:20"],
    ["00:00-24:00"],
]


def test_over_a_change_of_clocks_every_minute_is_told_as_it_passes():
    """Against a walk along the minutes that pass, each looked up in the week by what the clock on the wall shows."""
    tried = 0
    for name, days in NIGHTS.items():
        for day in days:
            noon = int(datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZONES[name]).timestamp())
            passing = [datetime.fromtimestamp(noon - 36 * 3600 + 60 * minute, ZONES[name]) for minute in range(9 * DAY)]
            shown = [(at.weekday() * 24 + at.hour) * 60 + at.minute for at in passing]
            for texts in TIMETABLES:
                windows = [parse_window(text) for text in texts]
                week = set[int]().union(*map(minutes_of, windows))
                tried += check_minutes(windows, passing, [minute in week for minute in shown])
    print(f"{tried} minutes around changes of clocks tried")


def check_minutes(windows: list[Window], passing: list[datetime], inside: list[bool]) -> int:
    """Every minute of the night, every half hour of the two days around it."""
    last, opened, tried = len(inside), 0, 0
    opens, closes = [last] * (last + 1), [last] * (last + 1)
    for minute in reversed(range(last)):
        opens[minute] = minute if inside[minute] else opens[minute + 1]
        closes[minute] = minute if not inside[minute] else closes[minute + 1]
    for minute in range(2 * DAY):
        local = passing[minute]
        if not inside[minute]:
            opened = minute + 1
        if minute % 30 and not DAY - 30 < minute < DAY + 270:
            continue
        tried += 1
        assert next_opening(windows, local).timestamp() == passing[opens[minute]].timestamp(), (windows, local)
        stretch = open_stretch(windows, local)
        assert (stretch is not None) is inside[minute], (windows, local)
        if stretch:
            ago, left = (part // timedelta(minutes=1) for part in stretch)
            always = closes[minute] == last
            assert left > 7 * DAY if always else left == closes[minute] - minute, (windows, local)
            assert ago == minute - opened if opened else ago >= minute, (windows, local)
    return tried


@given(
    st.lists(windows, min_size=1, max_size=4),
    st.sampled_from(list(ZONES.values())),
    st.floats(1_767_225_600, 1_798_761_600),  # the year 2026
)
def test_at_any_instant_of_the_year_an_opening_is_the_next_one(several: list[Window], zone: ZoneInfo, instant: float):
    local = datetime.fromtimestamp(instant, zone)
    opens = next_opening(several, local)
    if opens is local:
        ago, left = open_stretch(several, local) or pytest.fail("it is open")
        for seconds in (0.001 - ago.total_seconds(), left.total_seconds() - 0.001):
            there = datetime.fromtimestamp(instant + seconds, zone)
            assert any(window.left(there) for window in several)
        return
    assert open_stretch(several, local) is None
    assert any(window.left(opens) for window in several)
    waits = opens.timestamp() - local.timestamp()
    for share in (0.1, 0.5, 0.9):
        assert not any(window.left(datetime.fromtimestamp(instant + share * waits, zone)) for window in several)
    before = datetime.fromtimestamp(opens.timestamp() - 0.001, zone)
    assert before < local or not any(window.left(before) for window in several)
