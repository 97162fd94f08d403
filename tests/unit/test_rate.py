"""The cap on downloads, over minutes that pass at once."""

import random
from datetime import UTC, datetime

import pytest

from agent.settings import RateLimit, Settings
from agent.updates import rate
from agent.updates.rate import BURST_S, PIECE_S, Pace, cap_by_hour, lowest_cap
from tests.virtual_time import virtual_time

READ = 64 * 1024


async def download(pace, clock, seconds, chance=None):
    """Take what may be taken for so long, now and then late; when and how much."""
    taken, ends = [], clock.monotonic() + seconds
    while clock.monotonic() < ends:
        count = pace.piece(READ)
        if chance and chance.random() < 0.1:
            await rate.asyncio.sleep(chance.random() * 3)
        taken.append((clock.monotonic(), count))
        await pace.took(count)
    return taken


@pytest.mark.parametrize("cap", [1024, 4096, 50_000, 262_144, 10_000_000])
def test_the_cap_is_kept_over_every_minute_and_used_up(monkeypatch, cap):
    with virtual_time(monkeypatch, rate) as (runner, clock):
        taken = runner.run(download(Pace(lambda: cap), clock, 300))
    check_minutes(taken, cap)
    assert sum(count for _, count in taken) == pytest.approx(300 * cap, rel=0.001, abs=READ)


@pytest.mark.parametrize("seed", range(5))
def test_after_gaps_there_is_a_second_to_catch_up_and_no_more(monkeypatch, seed):
    chance = random.Random(seed)
    with virtual_time(monkeypatch, rate) as (runner, clock):
        taken = runner.run(download(Pace(lambda: 20_000), clock, 300, chance))
    check_minutes(taken, 20_000)


def check_minutes(taken, cap):
    for first in range(0, len(taken), max(1, len(taken) // 200)):
        begun = taken[first][0]
        minute = sum(count for at, count in taken[first:] if at < begun + 60)
        assert minute <= 60 * cap + BURST_S * cap + max(1, PIECE_S * cap)


def test_the_hour_may_change_in_the_middle(monkeypatch):
    with virtual_time(monkeypatch, rate) as (runner, clock):
        begun = clock.monotonic()
        taken = runner.run(download(Pace(lambda: 1000 if clock.monotonic() - begun < 100 else 50_000), clock, 200))
    slow = sum(count for at, count in taken if at < begun + 100)
    fast = sum(count for at, count in taken if at >= begun + 102)
    assert slow == pytest.approx(100_000, rel=0.02)
    assert fast == pytest.approx(98 * 50_000, rel=0.05)


@pytest.mark.parametrize("ask", [None, lambda: 0, lambda: 0.0, lambda: -5])
def test_no_cap(monkeypatch, ask):
    with virtual_time(monkeypatch, rate) as (runner, clock):
        pace, begun = Pace(ask), clock.monotonic()

        async def take():
            for _ in range(1000):
                await pace.took(pace.piece(READ))

        runner.run(take())
        assert clock.monotonic() == begun
        assert pace.piece(READ) == READ


def test_a_cap_that_ends_lets_go_at_once(monkeypatch):
    caps = [10.0, 10.0, 0.0]
    with virtual_time(monkeypatch, rate) as (runner, clock):
        pace, begun = Pace(lambda: caps.pop(0) if len(caps) > 1 else caps[0]), clock.monotonic()
        runner.run(pace.took(1_000_000))
        assert clock.monotonic() - begun < 5


def test_the_cap_by_hour():
    limits = [
        RateLimit(hours="06:00-22:00", bytes_per_s=50_000),
        RateLimit(hours="mon-fri 16:00-19:00", bytes_per_s=10_000),
        RateLimit(hours="22:00-02:00", bytes_per_s=1_000_000),
    ]
    caps = {hour: lowest_cap(limits, datetime(2026, 11, 23, hour, tzinfo=UTC)) for hour in range(24)}  # a Monday
    expected = dict.fromkeys(range(24), 50_000) | dict.fromkeys((16, 17, 18), 10_000) | dict.fromkeys((2, 3, 4, 5), 0)
    assert caps == expected | dict.fromkeys((22, 23, 0, 1), 1_000_000)
    assert lowest_cap(limits, datetime(2026, 11, 22, 17, tzinfo=UTC)) == 50_000


def test_the_cap_follows_the_settings_in_force():
    """Limits and time zone may change while the agent runs; in two zones half a day apart the same hours are others."""
    day = {"hours": "06:00-18:00", "bytes_per_s": 2048}
    present = Settings()
    cap = cap_by_hour(lambda: present)
    assert cap() == 0
    present = settings_with([{**day, "hours": "00:00-24:00"}], "UTC")
    assert cap() == 2048
    caps = []
    for zone in ("Etc/GMT-6", "Etc/GMT+6"):
        present = settings_with([day], zone)
        caps.append(cap())
    assert sorted(caps) == [0, 2048]
    present = Settings()
    assert cap() == 0


def settings_with(limits, zone):
    return Settings.model_validate({"updates": {"rate_limits": limits}, "maintenance": {"time_zone": zone}})
