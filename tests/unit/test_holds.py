"""What an update waits for: its turn, also after restarts and while settings change, locks, power, temperature."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.host.power import Battery, battery
from agent.maintenance import Hold, Maintenance, together, turn
from agent.settings import Maintenance as MaintenanceSettings
from agent.updates.apply_lock import ApplyLocks, Lock, changes_hold, lock_hold
from agent.updates.holds import Holds, battery_hold, heat_hold


class Time:
    """A wall clock and a monotonic one that only go on when told."""

    def __init__(self) -> None:
        self.wall, self.monotonic = datetime(2026, 11, 28, 12, 0, tzinfo=UTC).timestamp(), 5000.0

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def maintenance_of(time: Time, *, believed: bool = True, **keys: Any) -> Maintenance:
    return Maintenance(MaintenanceSettings(**keys), "cam-0412", clock_believed=lambda: believed, wall=lambda: time.wall)


def holds_of(
    time: Time,
    tmp_path: Path,
    received: float | None = None,
    *,
    maintenance: Maintenance | None = None,
    locks: ApplyLocks | None = None,
    min_battery_percent: float = 30,
    battery: Any = lambda: None,
    too_hot: Any = str,
    **keys: Any,
) -> Holds:
    async def received_at(_: str) -> float | None:
        return received

    return Holds(
        maintenance or maintenance_of(time, **keys),
        locks or ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic),
        min_battery_percent,
        received_at=received_at,
        too_hot=too_hot,
        battery=battery,
        wall=lambda: time.wall,
        monotonic=lambda: time.monotonic,
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
        believed=False,
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
    time.sleep(10 * 3600)
    state |= {"hot": "", "battery": None}
    assert await holds.hold("switch", "j") is None


async def test_a_release_wakes_who_waits(tmp_path: Path):
    time = Time()
    locks = ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic)
    several = [holds_of(time, tmp_path, locks=locks) for _ in range(3)]
    await locks.take("pipeline", 300, "", by="local:root")
    for holds in several:
        assert await holds.hold("switch", "j")
    waiting = [asyncio.create_task(holds.changed.wait()) for holds in several]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    await locks.release("pipeline", by="local:root")
    async with asyncio.timeout(10):
        await asyncio.gather(*waiting)
    assert await several[0].hold("switch", "j") is None


# ---- settings that change meanwhile -----------------------------------------------------------------------------------

NIGHT = MaintenanceSettings(windows=["22:00-04:00"])


class Waiter:
    """Something that waits, as an update does, until nothing holds it any more; `looks` counts how often it looked."""

    def __init__(self, holds: Holds) -> None:
        self.holds, self.looks, self.held = holds, 0, asyncio.Event()

    async def run(self) -> None:
        while hold := await self.holds.hold("switch", "j"):
            self.looks += 1
            self.words = hold.words
            self.held.set()
            await self.holds.changed.wait()  # in these tests no time passes
            self.holds.changed.clear()

    async def waits_again(self) -> str:
        self.held.clear()
        async with asyncio.timeout(10):
            await self.held.wait()
        return self.words


@pytest.mark.parametrize(
    "wider",
    [
        MaintenanceSettings(),
        MaintenanceSettings(windows=["22:00-04:00", "11:00-13:00"]),
        MaintenanceSettings(windows=["12:00-12:01"]),
    ],
)
async def test_a_window_that_is_widened_ends_the_wait_at_once(tmp_path: Path, wider: MaintenanceSettings):
    time = Time()  # it is 12:00
    maintenance = maintenance_of(time, **NIGHT.model_dump())
    waiter = Waiter(holds_of(time, tmp_path, maintenance=maintenance))
    async with asyncio.timeout(10):
        task = asyncio.create_task(waiter.run())
        await waiter.held.wait()
        maintenance.reconfigure(NIGHT.model_copy())
        await asyncio.sleep(0)
        assert (task.done(), waiter.looks, waiter.holds.changed.is_set()) == (False, 1, False), "nothing has changed"
        maintenance.reconfigure(wider)
        await task


async def test_another_time_zone_ends_a_wait_or_makes_it_another(tmp_path: Path):
    time = Time()  # 12:00 UTC is 23:00 in Sydney, and 13:00 in Madrid
    maintenance = maintenance_of(time, **NIGHT.model_dump())
    waiter = Waiter(holds_of(time, tmp_path, maintenance=maintenance))
    madrid, sydney = await asyncio.to_thread(
        lambda: [NIGHT.model_validate({**NIGHT.model_dump(), "time_zone": zone}) for zone in ZONES]
    )
    task = asyncio.create_task(waiter.run())
    assert "22:00 UTC, in 10 h" in await waiter.waits_again()
    maintenance.reconfigure(madrid)
    assert "22:00 CET, in 9 h" in await waiter.waits_again()
    maintenance.reconfigure(sydney)
    async with asyncio.timeout(10):
        await task


ZONES = ("Europe/Madrid", "Australia/Sydney")


async def test_a_window_that_is_narrowed_closes(tmp_path: Path):
    time = Time()
    maintenance = maintenance_of(time)
    holds = holds_of(time, tmp_path, maintenance=maintenance)
    assert await holds.hold("switch", "j") is None
    maintenance.reconfigure(NIGHT)
    hold = await holds.hold("switch", "j")
    assert hold
    assert hold.code == "window"


async def test_a_narrowing_while_the_charge_is_asked_for_counts(tmp_path: Path):
    """What is looked at last is the window, so that nothing that came meanwhile is overlooked."""
    time = Time()
    maintenance, loop = maintenance_of(time), asyncio.get_running_loop()

    def ask() -> None:
        asyncio.run_coroutine_threadsafe(narrow(), loop).result(10)

    async def narrow() -> None:
        maintenance.reconfigure(NIGHT)

    assert await holds_of(time, tmp_path, maintenance=maintenance, battery=ask).hold("switch", "j")


async def test_jitter_that_changes_moves_a_turn_that_is_waited_for(tmp_path: Path):
    time = Time()
    maintenance = maintenance_of(time, jitter_s=7200)
    holds, share = holds_of(time, tmp_path, time.wall, maintenance=maintenance), turn("cam-0412", "j")
    for jitter_s in (7200, 3600, 86_400):
        maintenance.reconfigure(MaintenanceSettings(jitter_s=jitter_s))
        hold = await holds.hold("download", "j")
        assert hold
        assert hold.look_again_s == pytest.approx(share * jitter_s)
    time.sleep(600)
    maintenance.reconfigure(MaintenanceSettings(jitter_s=7200))
    assert await waited(holds, time) == pytest.approx(share * 7200 - 600)
    maintenance.reconfigure(MaintenanceSettings())
    assert await holds.hold("download", "other") is None


async def test_a_lock_and_a_window_hold_any_change(tmp_path: Path):
    time = Time()
    locks = ApplyLocks(tmp_path / "locks.json", 3600, now=lambda: time.monotonic)
    maintenance = maintenance_of(time, windows=["22:00-04:00"])
    await locks.take("pipeline", 300, "recording", by="local:root")
    both = await changes_hold(maintenance, locks, "config 17", "configuration")
    assert both
    assert (both.code, both.look_again_s) == ("window", 300)
    assert both.words == (
        "the configuration window opens Sat 22:00 UTC, in 10 h 0 min; "
        "pipeline holds the apply lock for 300 s more: recording"
    )
    maintenance.reconfigure(MaintenanceSettings())
    lock = await changes_hold(maintenance, locks, "config 17", "configuration")
    assert lock == lock_hold(locks.held())
    time.sleep(300)
    assert await changes_hold(maintenance, locks, "config 17", "configuration") is None


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
