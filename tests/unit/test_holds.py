"""What an update waits for: windows and a camera's turn in them, also where clocks change, locks, power, temperature."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.host.power import Battery, battery
from agent.settings import Updates
from agent.timetable import Window, parse_window, soonest
from agent.updates.apply_lock import ApplyLocks, Lock
from agent.updates.holds import (
    LONGEST_LOOK_S,
    Hold,
    Holds,
    battery_hold,
    heat_hold,
    lock_hold,
    next_opening,
    open_stretch,
    real_seconds,
    together,
    turn,
    window_hold,
)

MADRID = ZoneInfo("Europe/Madrid")
SATURDAY = datetime(2026, 11, 28, tzinfo=UTC)
ZONES = [
    ZoneInfo(name) for name in ("UTC", "Europe/Madrid", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu")
]

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


@given(st.lists(windows, min_size=1, max_size=3), instants, st.sampled_from(ZONES))
def test_it_opens_when_it_says_however_clocks_change(several: Sequence[Window], instant: float, zone: ZoneInfo):
    local = datetime.fromtimestamp(instant, zone)
    if soonest(several, local) == timedelta(0):
        return
    opens, wait_s = next_opening(several, local)
    then = datetime.fromtimestamp(instant + wait_s, zone)
    skipped = opens.astimezone(UTC).astimezone(zone).replace(fold=0) != opens.replace(fold=0)
    if not skipped:  # there is no such time on that night
        assert abs(then.replace(tzinfo=None) - opens.replace(tzinfo=None)) < timedelta(seconds=1)


@pytest.mark.parametrize(
    ("local", "wait_h", "real_h"),
    [
        (datetime(2026, 3, 29, 1, 0, tzinfo=MADRID), 3, 2),
        (datetime(2026, 3, 29, 4, 0, tzinfo=MADRID), 3, 3),
        (datetime(2026, 10, 25, 1, 0, tzinfo=MADRID), 3, 4),
        (datetime(2026, 10, 25, 2, 30, tzinfo=MADRID), 1, 2),
        (datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=MADRID), 1, 1),
        (datetime(2026, 10, 25, 2, 10, fold=1, tzinfo=MADRID), 0.5, 0.5),
    ],
)
def test_hours_on_the_wall_are_not_always_hours(local: datetime, wait_h: float, real_h: float):
    assert real_seconds(local, timedelta(hours=wait_h)) == real_h * 3600


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


class Time:
    """A wall clock and a monotonic one that only go on when told."""

    def __init__(self) -> None:
        self.wall, self.monotonic = datetime(2026, 11, 28, 12, 0, tzinfo=UTC).timestamp(), 5000.0

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def holds_of(time: Time, tmp_path: Path, received: float | None = None, **options: Any) -> Holds:
    keys = {key: options.pop(key) for key in list(options) if key in Updates.model_fields}

    async def received_at(_: str) -> float | None:
        return received

    locks = options.pop("locks", None) or ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic)
    options.setdefault("battery", lambda: None)
    options.setdefault("clock_believed", lambda: True)
    options.setdefault("received_at", received_at)
    return Holds(
        Updates(**keys), "cam-0412", locks, wall=lambda: time.wall, monotonic=lambda: time.monotonic, **options
    )


async def waited(holds: Holds, time: Time, job_id: str = "j", before: Any = "download") -> float:
    """How long it waits in all."""
    begun = time.monotonic
    while hold := await holds.hold(before, job_id):
        time.sleep(hold.look_again_s)
    return time.monotonic - begun


async def test_a_download_waits_for_its_turn_from_when_the_job_arrived(tmp_path: Path):
    time = Time()
    wait_s = 7200 * turn("cam-0412", "j")
    assert await waited(holds_of(time, tmp_path, time.wall, jitter_s=7200), time) == pytest.approx(wait_s)
    assert await waited(holds_of(time, tmp_path, time.wall - 600, jitter_s=7200), time) == pytest.approx(wait_s - 600)
    assert await waited(holds_of(time, tmp_path, time.wall - 86_400, jitter_s=7200), time) == 0
    assert await waited(holds_of(time, tmp_path, time.wall, jitter_s=0), time) == 0


async def test_without_the_time_of_its_arrival_or_with_a_clock_that_went_back_it_waits_once(tmp_path: Path):
    time = Time()
    wait_s = 7200 * turn("cam-0412", "j")
    for received in (None, time.wall + 10**9):
        holds = holds_of(time, tmp_path, received, jitter_s=7200)
        assert await waited(holds, time) == pytest.approx(wait_s)
        assert await waited(holds, time) == 0


async def test_a_clock_that_is_set_in_the_middle_changes_no_turn(tmp_path: Path):
    time = Time()
    holds = holds_of(time, tmp_path, time.wall, jitter_s=7200)
    assert await holds.hold("download", "j")
    for jump in (10**8, -(10**9)):
        time.wall += jump
        hold = await holds.hold("download", "j")
        assert hold
        assert hold.look_again_s == pytest.approx(7200 * turn("cam-0412", "j"))


async def test_restarts_in_the_middle_add_nothing(tmp_path: Path):
    """An agent that starts anew every minute comes to its turn as one that goes on does."""
    time = Time()
    received, wait_s = time.wall, 7200 * turn("cam-0412", "j")
    while await holds_of(time, tmp_path, received, jitter_s=7200).hold("download", "j"):
        time.sleep(60)
    assert time.wall - received == pytest.approx(wait_s, abs=60)


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_however_it_is_restarted_it_waits_once_the_jitter_at_most(seed: int):
    chance, time = random.Random(seed), Time()
    received, begun = time.wall, time.monotonic

    async def run() -> None:
        holds = holds_of(time, Path("/nonexistent"), received, jitter_s=3600)
        while hold := await holds.hold("download", str(seed)):
            time.sleep(min(hold.look_again_s, chance.uniform(1, 900)))
            if chance.random() < 0.5:
                holds = holds_of(time, Path("/nonexistent"), received, jitter_s=3600)

    asyncio.run(run())
    assert time.monotonic - begun <= 3600


async def test_before_a_download_only_the_turn_counts(tmp_path: Path):
    time = Time()
    holds = holds_of(
        time,
        tmp_path,
        windows=["22:00-04:00"],
        battery=lambda: Battery(1, discharging=True),
        too_hot=lambda: "cpu is at 99 °C",
        clock_believed=lambda: False,
    )
    assert await holds.hold("download", "j") is None


# ---- locks, power, temperature ----------------------------------------------------------------------------------------


def test_locks_say_who_how_long_and_why():
    one = Lock("capture-pipeline", "finishing a recording", "local:pipeline", 100)
    other = Lock("calibration", "", "local:root", 200)
    hold = lock_hold([(one, 239.2), (other, 500)])
    assert hold
    assert hold.words == (
        "capture-pipeline holds the apply lock for 240 s more: finishing a recording; "
        "calibration holds the apply lock for 500 s more"
    )
    assert hold.look_again_s == 239.2
    assert lock_hold([]) is None


@pytest.mark.parametrize(
    ("charge", "waits"),
    [
        (None, False),
        (Battery(12, discharging=True), True),
        (Battery(29.9, discharging=True), True),
        (Battery(30, discharging=True), False),
        (Battery(12, discharging=False), False),
    ],
)
def test_on_battery_a_low_charge_waits(charge: Battery | None, waits: bool):
    hold = battery_hold(charge, 30)
    assert (hold is not None) is waits
    if hold and charge and charge.percent == 12:
        assert hold.words == "the battery is at 12 %, 30 % are wanted, or mains power"


def test_heat_says_what_is_hot():
    assert heat_hold("") is None
    hold = heat_hold("cpu is at 91 °C")
    assert hold
    assert hold.words == "it is too hot: cpu is at 91 °C"


@given(
    st.lists(
        st.none() | st.builds(Hold, st.sampled_from(["window", "battery"]), st.text(), st.floats(0.5, 1e6)), max_size=4
    )
)
def test_all_holds_are_told_and_the_soonest_is_looked_at(several: list[Hold | None]):
    found, both = [hold for hold in several if hold], together(several)
    assert (both is None) is (not found)
    if both:
        assert both.look_again_s == min(hold.look_again_s for hold in found)
        assert all(hold.words in both.words for hold in found)
        assert both.code == found[0].code


async def test_everything_at_once_and_nothing(tmp_path: Path):
    time = Time()
    locks = ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic)
    await locks.take("pipeline", 300, "recording", by="local:root")
    state: dict[str, Any] = {"hot": "cpu is at 91 °C", "battery": Battery(12, discharging=True)}
    holds = holds_of(
        time,
        tmp_path,
        locks=locks,
        windows=["22:00-04:00"],
        battery=lambda: state["battery"],
        too_hot=lambda: state["hot"],
    )
    hold = await holds.hold("switch", "j")
    assert hold
    assert hold.code == "window"
    for words in ("window opens Sat 22:00 UTC", "pipeline holds the apply lock", "battery is at 12 %", "cpu is at 91"):
        assert words in hold.words
    assert await holds.hold("arm", "j") == lock_hold(locks.held()), "at the last moment only locks count"
    time.sleep(10 * 3600)
    state |= {"hot": "", "battery": None}
    assert await holds.hold("switch", "j") is None
    assert await holds.hold("arm", "j") is None


async def test_a_release_wakes_who_waits(tmp_path: Path):
    time = Time()
    locks = ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic)
    holds = holds_of(time, tmp_path, locks=locks)
    await locks.take("pipeline", 300, "", by="local:root")
    assert await holds.hold("switch", "j")
    waiting = asyncio.create_task(holds.changed.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    await locks.release("pipeline", by="local:root")
    async with asyncio.timeout(10):
        await waiting
    assert await holds.hold("switch", "j") is None


async def test_the_time_zone_counts(tmp_path: Path):
    time = Time()  # 12:00 UTC is 23:00 in Sydney
    assert await holds_of(time, tmp_path, windows=["22:00-04:00"]).hold("switch", "j")
    sydney = await asyncio.to_thread(holds_of, time, tmp_path, windows=["22:00-04:00"], time_zone="Australia/Sydney")
    assert not await sydney.hold("switch", "j")


async def test_how_the_windows_stand_is_told(tmp_path: Path):
    time = Time()
    assert (await holds_of(time, tmp_path).window())["state"] == "always"
    closed = await holds_of(time, tmp_path, windows=["22:00-04:00"]).window()
    assert (closed["state"], closed["opens_at"]) == ("closed", time.wall + 10 * 3600)
    time.sleep(11 * 3600)
    opened = await holds_of(time, tmp_path, windows=["22:00-04:00"], jitter_s=86400).window()
    assert (opened["state"], opened["opens_at"], opened["closes_at"]) == ("open", None, time.wall + 5 * 3600)
    unknown = await holds_of(time, tmp_path, windows=["22:00-04:00"], clock_believed=lambda: False).window()
    assert unknown["state"] == "unknown"
    assert "timedatectl" in unknown["words"]


# ---- batteries as the kernel shows them -------------------------------------------------------------------------------


def supplies(root: Path, **devices: dict[str, str]) -> Path:
    for name, files in devices.items():
        folder = root / "class/power_supply" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")
    return root


BAT = {"type": "Battery", "present": "1", "status": "Discharging", "capacity": "12"}
AC_OFF, AC_ON = {"type": "Mains", "online": "0"}, {"type": "Mains", "online": "1"}


@pytest.mark.parametrize(
    ("devices", "seen"),
    [
        ({}, None),
        ({"ac": AC_ON}, None),
        ({"bat": BAT}, Battery(12, discharging=True)),
        ({"bat": BAT, "ac": AC_OFF}, Battery(12, discharging=True)),
        ({"bat": BAT, "ac": AC_ON}, Battery(12, discharging=False)),
        ({"bat": BAT, "usb": {"type": "USB", "online": "2"}}, Battery(12, discharging=False)),
        ({"bat": {**BAT, "status": "Charging"}}, Battery(12, discharging=False)),
        ({"bat": {**BAT, "status": "Full", "capacity": "104"}}, Battery(100, discharging=False)),
        ({"bat": {**BAT, "present": "0"}}, None),
        ({"mouse": {**BAT, "scope": "Device"}}, None),
        ({"mouse": {**BAT, "scope": "Device", "capacity": "3"}, "bat": BAT}, Battery(12, discharging=True)),
        ({"bat": BAT, "two": {**BAT, "capacity": "50"}}, Battery(31, discharging=True)),
        ({"bat": BAT, "two": {**BAT, "capacity": "50", "status": "Unknown"}}, Battery(31, discharging=True)),
        (
            {"bat": {"type": "Battery", "status": "Discharging", "energy_now": "5", "energy_full": "20"}},
            Battery(25, discharging=True),
        ),
        (
            {"bat": {"type": "UPS", "status": "Discharging", "charge_now": "9", "charge_full": "10"}},
            Battery(90, discharging=True),
        ),
        ({"bat": {"type": "Battery", "status": "Discharging"}}, None),
        ({"bat": {**BAT, "capacity": "-5"}}, None),
        ({"bat": {**BAT, "capacity": "\xff\x00"}}, None),
        ({"bat": {"type": "Battery", "energy_now": "5", "energy_full": "0"}}, None),
    ],
)
def test_batteries(tmp_path: Path, devices: dict[str, dict[str, str]], seen: Battery | None):
    assert battery(supplies(tmp_path, **devices)) == seen


def test_a_supply_that_can_not_be_read_is_left_out(tmp_path: Path):
    root = supplies(tmp_path, bat=BAT)
    (root / "class/power_supply/gone").symlink_to(tmp_path / "nowhere")
    (root / "class/power_supply/odd/type").mkdir(parents=True)
    assert battery(root) == Battery(12, discharging=True)


def test_this_machine_answers():
    found = battery()
    assert found is None or 0 <= found.percent <= 100
