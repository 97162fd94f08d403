"""Windows and a camera's turn in them: what they say at any instant, when the clock is not set, and when settings change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.maintenance import LONGEST_LOOK_S, Hold, Maintenance, turn, window_hold
from agent.settings import Maintenance as Settings
from agent.timetable import Window, open_stretch, parse_window

MADRID = ZoneInfo("Europe/Madrid")
SATURDAY = datetime(2026, 11, 28, tzinfo=UTC)
ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Madrid", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata")]

windows = st.builds(
    Window, st.frozensets(st.integers(0, 6), min_size=1), st.integers(0, 1439), st.sampled_from([1, 30, 60, 360, 1440])
)
instants = st.floats(1_767_225_600, 1_798_761_600)  # the year 2026, with both changes of the clocks
shares = st.floats(0, 1, exclude_max=True)


def parsed(*texts: str) -> list[Window]:
    return [parse_window(text) for text in texts]


def at(text: str, zone: Any = UTC) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


# ---- windows ----------------------------------------------------------------------------------------------------------


def test_without_windows_nothing_waits():
    assert window_hold([], SATURDAY, clock_believed=False, share=0.9, jitter_s=3600) is None


def test_a_closed_window_says_when_it_opens():
    hold = window_hold(parsed("sat 22:00-04:00"), at("2026-11-28 19:00:00", MADRID), clock_believed=True)
    assert hold == Hold("window", "the update window opens Sat 22:00 CET, in 3 h 0 min", LONGEST_LOOK_S)


def test_just_before_it_opens_it_is_looked_at_in_time():
    hold = window_hold(parsed("22:00-04:00"), at("2026-11-28 21:59:30"), clock_believed=True)
    assert hold
    assert hold.look_again_s == 30
    assert "in 30 s" in hold.words


@pytest.mark.parametrize(("believed", "code"), [(False, "clock"), (None, None), (True, None)])
def test_a_clock_that_is_not_set_closes_windows(believed: bool | None, code: str | None):
    hold = window_hold(parsed("22:00-04:00"), at("2026-11-28 23:00:00"), clock_believed=believed)
    assert (hold.code if hold else None) == code
    if hold:
        assert "timedatectl" in hold.words
        assert hold.look_again_s >= 10


@pytest.mark.parametrize(
    ("texts", "local", "ago_h", "left_h"),
    [
        (["22:00-04:00"], "2026-11-28 23:00", 1, 5),
        (["22:00-24:00", "00:00-04:00"], "2026-11-28 01:00", 3, 3),
        (["22:00-24:00", "00:00-04:00"], "2026-11-28 00:00", 2, 4),
        (["20:00-23:00", "22:00-04:00"], "2026-11-28 22:30", 2.5, 5.5),
        (["sat,sun 00:00-24:00"], "2026-11-29 12:00", 36, 12),
        (["fri-sun 00:00-24:00", "mon 00:00-06:00"], "2026-11-30 05:00", 77, 1),
    ],
)
def test_windows_that_adjoin_are_one(texts: list[str], local: str, ago_h: float, left_h: float):
    assert open_stretch(parsed(*texts), at(local)) == (timedelta(hours=ago_h), timedelta(hours=left_h))


def test_a_window_that_never_closes_was_opened_long_ago():
    ago, left = open_stretch(parsed("00:00-24:00"), at("2026-11-28 00:00")) or (timedelta(0), timedelta(0))
    assert ago > timedelta(days=7)
    assert left > timedelta(days=7)
    for minute in range(24 * 60):
        assert not window_hold(
            parsed("00:00-24:00"),
            SATURDAY + timedelta(minutes=minute),
            clock_believed=True,
            share=0.999,
            jitter_s=86400,
        )


def test_a_closed_one_has_no_stretch_also_just_after_its_end():
    assert open_stretch(parsed("22:00-04:00"), at("2026-11-28 04:00")) is None
    assert open_stretch(parsed("22:00-04:00"), at("2026-11-28 12:00")) is None


@given(st.lists(windows, min_size=1, max_size=3), instants, st.sampled_from(ZONES), shares, st.floats(0, 86_400))
def test_a_hold_ends_after_finite_looks_and_never_polls_fast(
    several: Sequence[Window], instant: float, zone: ZoneInfo, share: float, jitter_s: float
):
    """Looked at again whenever it says, the hold ends; and inside the stretch, not before this camera's turn."""
    now, looks = instant, 0
    while hold := window_hold(
        several, datetime.fromtimestamp(now, zone), clock_believed=True, share=share, jitter_s=jitter_s
    ):
        assert 0.5 <= hold.look_again_s <= LONGEST_LOOK_S
        now += hold.look_again_s
        looks += 1
        assert looks < 16 * 24 * 6, "more than a fortnight"
    ago, left = open_stretch(several, datetime.fromtimestamp(now, zone)) or pytest.fail("closed")
    assert ago.total_seconds() + 0.001 >= share * min(jitter_s, (ago + left).total_seconds() / 2)


# ---- a camera's turn --------------------------------------------------------------------------------------------------


def test_turns_spread_a_fleet_evenly_and_never_change():
    turns = [turn(f"cam-{number:05}", "update-17") for number in range(10_000)]
    assert all(0 <= found < 1 for found in turns)
    tenths = [sum(found * 10 // 1 == tenth for found in turns) for tenth in range(10)]
    assert min(tenths) > 900
    assert turns == [turn(f"cam-{number:05}", "update-17") for number in range(10_000)]
    assert turn("cam-00001", "update-18") != turn("cam-00001", "update-17")
    assert turn("ab", "c") != turn("a", "bc")
    assert turn("cam-0412", "update-17") == pytest.approx(0.0372728, abs=1e-6), (
        "a new agent keeps the turns of an old one"
    )
    print("10000 cameras tried")


def test_in_a_window_a_camera_waits_for_its_turn():
    night = parsed("22:00-04:00")
    hold = window_hold(night, at("2026-11-28 22:10:00"), clock_believed=True, share=0.5, jitter_s=3600)
    assert hold == Hold("jitter", "the window is open, this camera's turn in it is in 20 min", LONGEST_LOOK_S)
    assert not window_hold(night, at("2026-11-28 22:30:00"), clock_believed=True, share=0.5, jitter_s=3600)


@given(shares, st.floats(0, 86_400))
def test_a_turn_is_in_the_first_half_of_the_window(share: float, jitter_s: float):
    middle = at("2026-11-29 01:00:00")
    assert not window_hold(parsed("22:00-04:00"), middle, clock_believed=True, share=share, jitter_s=jitter_s)


# ---- nights in which clocks change ------------------------------------------------------------------------------------

NIGHTS = [
    (name, window, begun, opens, closes)
    for name, window, *times in (
        # clocks go forward: what lies in the hour left out begins late, or not at all
        ("Europe/Madrid", "22:00-04:00", "2026-03-28T21:00Z", "2026-03-29T02:00Z"),
        ("Europe/Madrid", "01:30-03:30", "2026-03-29T00:30Z", "2026-03-29T01:30Z"),
        ("Europe/Madrid", "02:30-05:00", "2026-03-29T01:00Z", "2026-03-29T03:00Z"),
        ("Europe/Madrid", "02:00-03:00", "2026-03-30T00:00Z", "2026-03-30T01:00Z"),
        ("America/New_York", "22:00-04:00", "2026-03-08T03:00Z", "2026-03-08T08:00Z"),
        ("America/New_York", "02:15-02:45", "2026-03-09T06:15Z", "2026-03-09T06:45Z"),
        ("Australia/Lord_Howe", "01:00-04:00", "2026-10-03T14:30Z", "2026-10-03T17:00Z"),
        ("Australia/Lord_Howe", "02:10-03:00", "2026-10-03T15:30Z", "2026-10-03T16:00Z"),
        ("Australia/Lord_Howe", "02:00-02:30", "2026-10-04T15:00Z", "2026-10-04T15:30Z"),
        # clocks go back: an hour is longer by what comes twice, or comes twice
        ("Europe/Madrid", "22:00-04:00", "2026-10-24T20:00Z", "2026-10-25T03:00Z"),
        ("Europe/Madrid", "02:00-03:00", "2026-10-25T00:00Z", "2026-10-25T02:00Z"),
        ("Europe/Madrid", "02:15-02:45", "2026-10-25T00:15Z", "2026-10-25T00:45Z"),
        ("America/New_York", "01:30-02:30", "2026-11-01T05:30Z", "2026-11-01T06:00Z"),
        ("Australia/Lord_Howe", "01:00-02:00", "2026-04-04T14:00Z", "2026-04-04T15:30Z"),
        ("Australia/Lord_Howe", "22:00-04:00", "2026-04-04T11:00Z", "2026-04-04T17:30Z"),
        # no change of clocks there
        ("Asia/Kolkata", "22:00-04:00", "2026-03-28T16:30Z", "2026-03-28T22:30Z"),
        ("Asia/Kolkata", "22:00-04:00", "2026-10-24T16:30Z", "2026-10-24T22:30Z"),
    )
    for opens, closes in [[datetime.fromisoformat(time) for time in times]]
    for begun in [opens.timestamp() - 3 * 3600]
]


@pytest.mark.parametrize(("name", "window", "begun", "opens", "closes"), NIGHTS)
async def test_a_night_of_a_change_of_clocks(name: str, window: str, begun: float, opens: datetime, closes: datetime):
    """Looked at whenever it says, from three hours before: told beforehand exactly, held until then, and open until its end."""
    keys = await asyncio.to_thread(Settings, windows=[window], time_zone=name)
    wall = Wall(begun)
    maintenance = Maintenance(keys, "cam-0412", clock_believed=lambda: True, wall=wall)
    told = await maintenance.window()
    while told["state"] == "open":  # another one, on the evening or the hour before
        wall.now = told["closes_at"]
        told = await maintenance.window()
    assert (told["state"], told["opens_at"]) == ("closed", opens.timestamp())
    while hold := await maintenance.hold("j", "update"):
        assert hold.code == "window"
        assert f"opens {opens.astimezone(ZoneInfo(name)):%a %H:%M %Z}, in " in hold.words
        wall.now += hold.look_again_s
    assert wall.now == opens.timestamp()
    told = await maintenance.window()
    assert (told["state"], told["closes_at"]) == ("open", closes.timestamp())
    wall.now = closes.timestamp() - 0.001
    assert await maintenance.hold("j", "update") is None
    wall.now = closes.timestamp()
    assert await maintenance.hold("j", "update")


@given(st.sampled_from(NIGHTS), shares, st.floats(0, 86_400))
def test_in_such_a_night_too_every_camera_has_its_turn_once_and_keeps_it(
    night: tuple[str, str, float, datetime, datetime], share: float, jitter_s: float
):
    """The turn comes in the first half of the hours that pass, and once it has come it stays until the end."""
    name, window, _, opens, closes = night
    begin, end = opens.timestamp(), closes.timestamp()
    comes = begin + share * min(jitter_s, (end - begin) / 2)
    for now in (begin, comes - 0.01, comes, comes + 0.01, (begin + end) / 2, end - 0.01):
        hold = window_hold(
            parsed(window),
            datetime.fromtimestamp(now, ZoneInfo(name)),
            clock_believed=True,
            share=share,
            jitter_s=jitter_s,
        )
        if begin <= now < end and abs(now - comes) > 0.005:
            assert (hold is None) is (now > comes)
            assert hold is None or hold.code == "jitter"


# ---- settings in force ------------------------------------------------------------------------------------------------


class Wall:
    """A wall clock that stands still until it is set."""

    def __init__(self, now: float = SATURDAY.timestamp() + 12 * 3600) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def maintenance_of(wall: Wall, thing: str = "cam-0412", *, believed: bool | None = True, **keys: Any) -> Maintenance:
    return Maintenance(Settings(**keys), thing, clock_believed=lambda: believed, wall=wall)


async def test_words_are_about_what_waits():
    maintenance = maintenance_of(Wall(), windows=["22:00-04:00"])
    update, config = await maintenance.hold("j", "update"), await maintenance.hold("config 17", "configuration")
    assert update
    assert config
    assert update.words == "the update window opens Sat 22:00 UTC, in 10 h 0 min"
    assert config.words == "the configuration window opens Sat 22:00 UTC, in 10 h 0 min"
    unset = await maintenance_of(Wall(), believed=False, windows=["00:00-24:00"]).hold("config 17", "configuration")
    assert unset
    assert unset.code == "clock"
    assert "so the configuration window counts as closed" in unset.words


async def test_a_clock_that_is_set_later_opens_the_window_then():
    believed: list[bool | None] = [False, False, True]
    maintenance = Maintenance(
        Settings(windows=["11:00-13:00"]), "cam", clock_believed=lambda: believed.pop(0), wall=Wall()
    )
    held = [await maintenance.hold("j", "update") for _ in range(3)]
    assert [hold.code if hold else None for hold in held] == ["clock", "clock", None]
    assert all(10 <= hold.look_again_s <= 60 for hold in held if hold)


async def test_the_camera_has_the_same_turn_after_a_restart_and_after_settings_that_change():
    wall, jitter = Wall(SATURDAY.timestamp() + 22 * 3600), {"windows": ["22:00-04:00"], "jitter_s": 3600}
    first = await maintenance_of(wall, **jitter).hold("config 17", "configuration")
    assert first
    assert (first.code, first.words) == ("jitter", "the window is open, this camera's turn in it is in 27 min")
    changed = maintenance_of(wall)
    changed.reconfigure(Settings(**jitter))
    assert await maintenance_of(wall, **jitter).hold("config 17", "configuration") == first
    assert await changed.hold("config 17", "configuration") == first
    assert await changed.hold("config 18", "configuration") != first
    assert await maintenance_of(wall, "cam-0413", **jitter).hold("config 17", "configuration") != first
    wall.now += 3600 * turn("cam-0412", "config 17") - 1
    assert await maintenance_of(wall, **jitter).hold("config 17", "configuration")
    wall.now += 1.01
    assert await maintenance_of(wall, **jitter).hold("config 17", "configuration") is None
    assert changed.turn_s("config 17") == 3600 * turn("cam-0412", "config 17")


async def test_who_waits_is_woken_by_settings_that_differ_and_only_by_those():
    maintenance, woken = maintenance_of(Wall(), windows=["22:00-04:00"]), list[str]()
    maintenance.on_change(lambda: woken.append("one"))
    maintenance.on_change(lambda: woken.append("other"))
    maintenance.reconfigure(Settings(windows=["22:00-04:00"]))
    assert woken == []
    for keys in ({"windows": ["21:00-04:00"]}, {"windows": ["21:00-04:00"], "jitter_s": 60}, {}):
        maintenance.reconfigure(Settings(**keys))
        assert woken == ["one", "other"]
        woken.clear()
    assert await maintenance.hold("j", "update") is None


async def test_settings_that_change_while_a_zone_is_read_are_those_that_count():
    """Windows are never judged by a zone that is not theirs."""
    keys = [{"windows": ["22:00-04:00"], "time_zone": "Australia/Sydney"}, {"windows": ["11:00-13:00"]}]
    sydney, utc = await asyncio.to_thread(lambda: [Settings(**each) for each in keys])
    maintenance = Maintenance(sydney, "cam-0412", clock_believed=lambda: True, wall=Wall(SATURDAY.timestamp()))
    asked = asyncio.create_task(maintenance.hold("j", "update"))
    await asyncio.sleep(0)
    maintenance.reconfigure(utc)
    hold = await asked
    assert hold
    assert "opens Sat 11:00 UTC, in 11 h" in hold.words


async def test_how_the_windows_stand_is_told():
    wall = Wall()
    assert await maintenance_of(wall).window() == {
        "windows": [],
        "time_zone": "UTC",
        "jitter_s": 0,
        "opens_at": None,
        "closes_at": None,
        "state": "always",
        "words": "no window is set, an update is switched to at any time",
    }
    maintenance = maintenance_of(wall, windows=["22:00-04:00"], jitter_s=86400)
    closed = await maintenance.window()
    assert (closed["state"], closed["opens_at"], closed["closes_at"]) == ("closed", wall.now + 10 * 3600, None)
    wall.now += 11 * 3600
    opened = await maintenance.window()
    assert (opened["state"], opened["opens_at"], opened["closes_at"]) == ("open", None, wall.now + 5 * 3600)
    assert (opened["windows"], opened["jitter_s"]) == (["22:00-04:00"], 86400)
    maintenance.reconfigure(Settings(windows=["04:00-05:00"]))
    assert (await maintenance.window())["opens_at"] == wall.now + 5 * 3600
    unknown = await maintenance_of(wall, believed=False, windows=["22:00-04:00"]).window()
    assert unknown["state"] == "unknown"
    assert "timedatectl" in unknown["words"]
