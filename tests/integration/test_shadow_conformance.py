"""Statements about the shadow on the real wire: session, client, reporter and configuration against a scripted service."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent import settings_file
from agent.cloud import shadow as shadow_module
from agent.cloud import topics
from agent.cloud.session import Session
from agent.cloud.shadow import IN_FLIGHT, PER_SECOND, Pace, ShadowClient
from agent.config.configuration import Configuration
from agent.config.reporting import Reporter
from agent.errors import CloudError
from agent.settings import Settings
from agent.store import Store
from tests.fakes_shadow import LIMIT_BYTES, WiredShadow
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import running
from tests.integration.mqtt_peer import MqttPeer, Packet

THING = "cam-7"
SHADOW = f"$aws/things/{THING}/shadow/name/config"
pytestmark = pytest.mark.usefixtures("readable_logs", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_module, "BETWEEN_REPORTS_S", 0.02)
    monkeypatch.setattr(shadow_module, "PER_SECOND", 200)


@pytest.fixture
def service(peer: MqttPeer) -> WiredShadow:
    return WiredShadow(peer, THING)


@dataclass
class UnitState:
    active: str = "active"
    sub: str = "running"
    restarts: int = 0


@dataclass
class Camera:
    """A configuration on the session, joined as in the agent; images are always well."""

    service: WiredShadow
    session: Session
    configuration: Configuration = field(init=False)
    applied: list[Settings] = field(default_factory=list)

    async def apply_agent(self, settings: Settings) -> None:
        self.applied.append(settings)

    async def reload(self, unit: str) -> None: ...

    async def restart(self, unit: str) -> None: ...

    async def state(self, unit: str) -> UnitState:
        return UnitState()

    def judging_s(self, reference: Any, intervals: Any) -> float:
        return 0.0

    async def settled(self) -> None: ...

    async def reference(self) -> dict[str, Any]:
        return {}

    async def watch(self, reference: Any, *, stable_for_s: float, deadline_s: float) -> tuple[bool, list[str]]:
        return True, []

    @property
    def status(self) -> dict[str, Any]:
        return self.service.cloud.reported.get("status", {})

    async def until(self, state: str, version: int) -> dict[str, Any]:
        """The reported status, once it is `state` for the desired `version` or, if we reported meanwhile, a later one."""

        def there() -> bool:
            return self.status.get("state") == state and self.status.get("desired_version", -1) >= version

        await self.service.peer.until(there)
        return self.status

    async def set_interval(self, seconds: float) -> None:
        """An operator sets a live key, and the camera follows."""
        agent = {"telemetry": {"interval_s": seconds}}
        self.service.want({"agent": agent})
        cloud = self.service.cloud
        await self.service.peer.until(
            lambda: cloud.reported.get("agent") == agent and self.status["state"] == "applied"
        )
        assert self.applied[-1].telemetry.interval_s == seconds


@contextlib.asynccontextmanager
async def camera(service: WiredShadow, session: Session, folder: Path, settle_s: float = 0) -> AsyncIterator[Camera]:
    site = {"telemetry": {"interval_s": 60}, "config": {"targets": {"lens": {"path": str(folder / "lens.json")}}}}
    made = Camera(service, session)
    store = await Store.open(folder / "state.db")
    made.configuration = configuration = Configuration(
        site=site,
        settings=settings_file.validate(site, "site"),
        store=store,
        shadow=ShadowClient(session, THING, "config"),
        units=made,
        gate=made,
        apply_agent=made.apply_agent,
        mutation_lock=asyncio.Lock(),
        online=lambda: session.link.state == "connected",
        settle_s=settle_s,
    )
    session.on_ready(configuration.on_ready)
    session.subscribe(
        topics.accepted(topics.shadow_update(THING, "config")),
        lambda _, payload: configuration.look_again() if b'"desired"' in payload else None,
    )
    task = asyncio.create_task(configuration.run())
    try:
        async with running(session):
            yield made
            assert not task.done(), "the configuration has ended"
    finally:
        task.cancel()
        await asyncio.wait({task})
        await store.close()


@contextlib.asynccontextmanager
async def reporter(session: Session) -> AsyncIterator[Reporter]:
    made = Reporter(ShadowClient(session, THING, "config"))
    async with running(session):
        yield made


def document(size: int = 0, **status: Any) -> dict[str, Any]:
    """A report with a mirror of `size` bytes."""
    mirror = {"targets": {"lens": {"note": "n" * size}}} if size else {}
    return {**mirror, "status": {"state": "applied", "desired_version": 1, "errors": [], **status}}


def requests(service: WiredShadow) -> list[str]:
    """What was asked for, in order: get or update."""
    published = service.peer.of(mqtt.PUBLISH)
    return [packet.topic.rpartition("/")[2] for packet in published if packet.topic.startswith(service.prefix)]


@pytest.mark.conformance("C-SHDW-01", "C-SHDW-02")
async def test_after_every_connect_it_is_subscribed_then_asked_and_where_nothing_is_all_is_reported(
    service, peer, session, tmp_path
):
    async with camera(service, session, tmp_path) as cam:
        await cam.until("applied", 0)
        whole = {"state": "applied", "desired_version": 0, "errors": []}
        assert service.updates == [{"state": {"reported": {"status": whole}}}]
        for end in range(2, 5):
            peer.forget_sessions()
            if end == 3:
                service.cloud.delete()
            gets = service.gets
            peer.cut()
            await peer.until(lambda gets=gets: service.gets > gets)
            await cam.until("applied", 0)
        await cam.set_interval(10)
    wanted = {f"{SHADOW}/{name}" for name in ("get/accepted", "get/rejected", "update/accepted", "update/rejected")}
    wanted |= {f"{SHADOW}/update/delta", f"{SHADOW}/delete/accepted"}
    for connection in range(1, 5):
        packets = [packet for packet in peer.packets if packet.connection == connection]
        first_get = next(n for n, packet in enumerate(packets) if packet.topic == f"{SHADOW}/get")
        before = {name for packet in packets[:first_get] if packet.kind == mqtt.SUBSCRIBE for name in packet.filters}
        assert before == wanted
        assert not [name for name in before if "#" in name or "+" in name]
    assert service.updates[1] == service.updates[0], "after the deletion all of it again"
    print("4 connects, one after a deletion, tried")


@pytest.mark.conformance("C-SHDW-02")
async def test_where_the_shadow_is_found_to_be_gone_the_same_report_is_written_again(service, session):
    async with reporter(session) as reports:
        for _ in range(3):
            await reports.read()
            await reports.send(document(), document)
            await reports.send(document(), document)
            service.cloud.delete()
    assert service.updates == [{"state": {"reported": document()}}] * 3


@pytest.mark.conformance("C-SHDW-03")
async def test_what_was_desired_while_off_line_comes_with_the_get(service, session, tmp_path):
    version = service.cloud.want({"agent": {"telemetry": {"interval_s": 10}}})
    await asyncio.sleep(0)
    service.told.clear()
    async with camera(service, session, tmp_path) as cam:
        await cam.until("applied", version)
        assert cam.applied[-1].telemetry.interval_s == 10
        assert service.cloud.delta == {}
    assert service.told == [], "no delta message was needed"


class TestVersions:
    @pytest.mark.conformance("C-SHDW-04")
    async def test_old_and_repeated_deltas_are_ignored_until_the_shadow_is_deleted_or_gone(
        self, service, peer, session
    ):
        shadow, arrived = ShadowClient(session, THING, "config"), asyncio.Queue[tuple[int, dict]]()
        shadow.on_delta(lambda version, state: arrived.put_nowait((version, state)))

        def delta(version: int) -> None:
            peer.send(f"{SHADOW}/update/delta", {"version": version, "state": {"v": version}, "timestamp": 1})

        async with running(session), asyncio.timeout(20):
            for version in (7, 7, 3, 8, 1):
                delta(version)
            peer.send(f"{SHADOW}/delete/accepted", {"version": 8, "timestamp": 1})
            for version in (2, 1, 2, 3):
                delta(version)
            expected = [(7, {"v": 7}), (8, {"v": 8}), (0, {}), (2, {"v": 2}), (3, {"v": 3})]
            assert [await arrived.get() for _ in expected] == expected
            assert await shadow.get() is None
            delta(1)
            assert await arrived.get() == (1, {"v": 1})
            service.answers.append({"state": {"desired": {"v": 5}}, "version": 5})
            await shadow.get()
            for version in (4, 5, 6):
                delta(version)
            assert await arrived.get() == (6, {"v": 6})

    @pytest.mark.conformance("C-SHDW-04")
    @pytest.mark.parametrize("forget", [False, True])
    async def test_a_shadow_deleted_and_made_anew_while_on_line_is_followed(self, service, session, tmp_path, forget):
        async with camera(service, session, tmp_path) as cam:
            for seconds in (10, 20, 30):
                await cam.set_interval(seconds)
            before = service.cloud.version
            service.delete(forget_version=forget)
            await service.peer.until(lambda: service.cloud.exists)
            assert service.cloud.reported.keys() == {"status"}
            assert cam.applied[-1].telemetry.interval_s == 60, "nothing is desired any more"
            await cam.set_interval(40)
            assert (service.cloud.version < before) == forget

    @pytest.mark.conformance("C-SHDW-04")
    async def test_a_delta_that_our_own_report_brings_about_asks_for_nothing(self, service, peer, session):
        shadow, arrived = ShadowClient(session, THING, "config"), []
        shadow.on_delta(lambda version, _: arrived.append(version))
        async with running(session):
            service.cloud.want({"a": 1})
            await shadow.get()
            for number in range(3):
                await shadow.report({"n": number})
            await peer.until(lambda: len(peer.of(mqtt.PUBACK)) == 8)
            await session.publish("t/after", b"")
        assert len(service.told) == 4
        assert arrived in ([], [1]), "only what the operator did, if the get did not tell it first"


@pytest.mark.conformance("C-SHDW-05", "C-SHDW-13")
async def test_what_is_refused_is_reported_once_and_the_old_value_stays(service, peer, session, tmp_path):
    async with camera(service, session, tmp_path) as cam:
        await cam.set_interval(10)
        applied = len(cam.applied)
        wanted = {"agent": {"telemetry": {"interval_s": -1}, "log": {"level": "debug"}}}
        version = service.want(wanted)
        status = await cam.until("rejected", version)
        assert [error["pointer"] for error in status["errors"]] == ["/agent/telemetry/interval_s"]
        assert service.cloud.reported["agent"] == {"telemetry": {"interval_s": 10}, "log": {"level": "info"}}
        assert service.cloud.delta == wanted
        updates = len(service.updates)
        for _ in range(5):
            gets = service.gets
            service.cloud.version += 1
            for _ in range(3):
                service.cloud.deliver(service.cloud.version, service.cloud.delta)
            await peer.until(lambda gets=gets: service.gets > gets)
        assert len(cam.applied) == applied
        await cam.set_interval(20)
        assert len(service.updates) == updates + 1, "the repeated deltas were answered by no report"
        assert len(cam.applied) == applied + 1
    print("15 repeated deltas tried")


@pytest.mark.conformance("C-SHDW-06")
async def test_answers_to_others_are_not_ours(peer, session):
    """Each comes before the right one: another token, none, ours on another topic, refusals and odd forms of all these."""
    foreign: list[Any] = ["other", "", None, 7, [], {"clientToken": "x"}]

    def service(packet: Packet):
        token = packet.json()["clientToken"]
        for each in foreign:
            for outcome in ("accepted", "rejected"):
                yield f"{packet.topic}/{outcome}", {"code": 400, "version": 66, "state": {}, "clientToken": each}
        yield f"{packet.topic}/accepted", {"version": 66, "state": {}}
        other = "update" if packet.topic.endswith("get") else "get"
        for outcome in ("accepted", "rejected"):
            yield f"{SHADOW}/{other}/{outcome}", {"code": 400, "version": 66, "state": {}, "clientToken": token}
        yield f"{packet.topic}/accepted", {"version": 5, "state": {"desired": {"a": 1}}, "clientToken": token}

    peer.serve(f"{SHADOW}/get", service)
    peer.serve(f"{SHADOW}/update", service)
    shadow = ShadowClient(session, THING, "config")
    async with running(session):
        found = await shadow.get()
        assert (found.version, found.desired) == (5, {"a": 1})
        assert await shadow.report({"b": 1}) == 5
    print(f"{2 * (2 * len(foreign) + 3)} foreign answers tried")


@pytest.mark.conformance("C-SHDW-07", "C-SHDW-08", "C-SHDW-09")
async def test_only_reported_is_written_with_null_for_what_is_gone_and_arrays_whole(service, session, tmp_path):
    cloud = service.cloud
    cloud.exists, cloud.version = True, 40
    cloud.reported = {"legacy": {"x": 1}, "agent": {"removed_key": 1}, "targets": {"gone": {"a": [1]}}}
    async with camera(service, session, tmp_path) as cam:
        await cam.until("applied", 0)
        first = service.updates[0]["state"]["reported"]
        assert (first["legacy"], first["agent"], first["targets"]) == (None, None, None)
        assert cloud.reported.keys() == {"status"}
        wishes: list[dict[str, Any] | None] = [
            {"targets": {"lens": {"zones": [1, 2, 3], "name": "a"}}, "agent": {"log": {"level": "debug"}}},
            {"targets": {"lens": {"zones": [1, 2, 4], "name": "a"}}, "agent": {"telemetry": {"interval_s": 10}}},
            {"targets": {"lens": {"zones": []}}},
            None,
        ]
        sent = []
        for wanted in wishes:
            before = len(service.updates)
            await cam.until("applied", service.want(wanted))
            assert {key: cloud.reported.get(key) for key in ("agent", "targets")} == {
                "agent": (wanted or {}).get("agent"),
                "targets": (wanted or {}).get("targets"),
            }
            assert cloud.desired == (wanted or {})
            merged: dict[str, Any] = {}
            for update in service.updates[before:]:
                merged |= update["state"]["reported"]
            sent.append(merged)
        assert sent[1]["targets"] == {"lens": {"zones": [1, 2, 4]}}
        assert sent[1]["agent"] == {"log": None, "telemetry": {"interval_s": 10}}
        assert sent[2]["targets"] == {"lens": {"zones": [], "name": None}}
        assert sent[2]["agent"] is None
        assert sent[3]["targets"] is None
    for update in service.updates:
        assert update.keys() == {"state"}
        assert update["state"].keys() == {"reported"}
    print(f"{len(service.updates)} updates over {len(wishes)} changes tried")


@pytest.mark.conformance("C-SHDW-10")
async def test_however_much_is_desired_the_report_fits_beside_it(service, session, tmp_path):
    """Growing documents of a target, in force each; the service would refuse what is larger than a shadow or too deep."""
    left_out = []
    async with camera(service, session, tmp_path) as cam:
        lengths = (100, 3000, 3700, 4000, 7000, 7800, 7950, 8000)
        for length in lengths:
            wanted = {"targets": {"lens": {"note": "ü" * (length // 2), "a": {"b": {"c": {"d": {"e": length}}}}}}}
            version = service.want(wanted)
            await cam.until("applied", version)
            assert service.cloud.desired == wanted
            whole = {"desired": service.cloud.desired, "reported": service.cloud.reported}
            assert len(json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()) < LIMIT_BYTES
            left_out.append("targets" not in service.cloud.reported)
    assert len(service.updates) == len(service.cloud.reports), "it was cut before it was sent, none was refused"
    assert left_out == sorted(left_out)
    assert {True, False} == set(left_out)
    print(f"{len(lengths)} sizes of desired tried, {sum(left_out)} not mirrored for want of room")


class TestRefusals:
    @pytest.mark.conformance("C-SHDW-11")
    async def test_after_a_conflict_the_shadow_is_read_and_the_update_made_anew(self, service, session):
        cloud = service.cloud
        cloud.exists, cloud.reported = True, {"a": 1}
        async with reporter(session) as reports:
            await reports.read()
            cloud.reported = {"b": 2}
            cloud.refuse_next = [CloudError("409", "Version conflict")]
            await reports.send(document(), document)
            assert requests(service) == ["get", "update", "get", "update"]
            assert [update["state"]["reported"].keys() - {"status"} for update in service.updates] == [{"a"}, {"b"}]
            assert cloud.reported == document()
            cloud.refuse_next = [CloudError("409", "Version conflict")] * 10
            with pytest.raises(CloudError) as caught:
                await reports.send(document(job="j"), document)
            assert caught.value.retryable, "later, with a growing pause"
            assert len(cloud.refuse_next) == 7
            assert reports.in_doubt

    @pytest.mark.conformance("C-SHDW-11")
    async def test_throttled_or_failed_it_waits_longer_each_time(self, service, session, tmp_path):
        service.cloud.refuse_next = [CloudError("429", "slow down"), CloudError("500", "Internal service failure")]
        async with camera(service, session, tmp_path) as cam:
            await cam.until("applied", 0)
        times = [packet.at for packet in service.peer.of(mqtt.PUBLISH, topic=f"{SHADOW}/update")]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert len(gaps) == 2
        assert gaps[0] > 0.5
        assert gaps[1] > 1.0

    @pytest.mark.conformance("C-SHDW-11")
    async def test_what_is_malformed_to_the_service_is_logged_once_and_not_sent_again(self, service, peer, session):
        service.cloud.refuse_next = [CloudError("400", "State contains an invalid node")]
        with capture_logs() as lines:
            async with reporter(session) as reports:
                for _ in range(3):
                    await reports.send(document(), document, resend=True)
                    await reports.read()
                assert len(service.updates) == 1
                await reports.send(document(job="j"), document)
                assert len(service.updates) == 2
        assert [line["code"] for line in lines if line["log_level"] == "error"] == ["400"]

    @pytest.mark.conformance("C-SHDW-11")
    async def test_what_is_too_large_to_the_service_is_cut_until_it_fits(self, service, session):
        """At every number of refusals in a row, until nothing but the state is left, and then it ends."""
        errors = [{"pointer": f"/{n}", "message": "m" * 200, "code": "c"} for n in range(8)]
        tried = 0
        async with reporter(session) as reports:
            for refusals in range(8):
                full = document(2000, errors=errors, desired_version=refusals)
                service.cloud.refuse_next = [
                    CloudError("413", "The payload exceeds the maximum size allowed")
                ] * refusals
                before = len(service.updates)
                await reports.send(full, lambda n=refusals: {"status": {"state": "applied", "desired_version": n}})
                tries = len(service.updates) - before
                left = len(service.cloud.refuse_next)
                service.cloud.refuse_next = []
                await reports.send(full, document)
                assert len(service.updates) == before + tries, "the same content is not sent again"
                if not left and tries > refusals:
                    assert service.cloud.reported["status"]["desired_version"] == refusals
                    assert service.cloud.reported["status"]["state"] == "applied"
                tried += 1
            assert left, "it gave up"
            await reports.send(document(10), document)
            assert service.cloud.reported == document(10)
        print(f"{tried} numbers of refusals in a row tried, {tries} updates the most")

    @pytest.mark.conformance("C-SHDW-11")
    async def test_where_the_service_takes_fewer_levels_the_state_is_told_all_the_same(self, service, session):
        least = {"status": {"state": "applied", "desired_version": 1}}
        service.cloud.refuse_next = [CloudError("400", "JSON contains too many levels of nesting; maximum is 6")]
        async with reporter(session) as reports:
            await reports.send(document(100), lambda: least)
        assert service.cloud.reported == least

    @pytest.mark.parametrize("code", ["400", "413", "403"])
    async def test_a_refusal_shows_that_the_cloud_is_reached(self, service, session, code):
        async with reporter(session) as reports:
            service.cloud.refuse_next = [CloudError(code, "no")]
            await reports.acknowledge(document(500))
            await reports.acknowledge(document(500))
            assert len(service.updates) == (3 if code == "413" else 2)
            assert "status" in service.updates[-1]["state"]["reported"]
            service.cloud.refuse_next = [CloudError("429", "slow down")]
            with pytest.raises(CloudError):
                await reports.acknowledge(document())
            service.peer.refuse_topics[f"{SHADOW}/update"] = 0x87
            with pytest.raises(CloudError):
                await reports.acknowledge(document())


@pytest.mark.conformance("C-SHDW-12")
async def test_requests_under_way_and_their_rate_are_bounded_for_all_shadows_together(peer, session, monkeypatch):
    monkeypatch.setattr(shadow_module, "PER_SECOND", PER_SECOND)
    held: list[Packet] = []
    most = 0

    def service(packet: Packet):
        nonlocal most
        held.append(packet)
        most = max(most, len(held))
        return ()

    def answer() -> None:
        packet = held.pop(0)
        body = {"version": 1, "state": {}, "clientToken": packet.json()["clientToken"]}
        peer.send(f"{packet.topic}/accepted", body)

    pace = Pace()
    names = ("config", "$package", "status")
    for name in names:
        peer.serve(f"$aws/things/{THING}/shadow/name/{name}/get", service)
    shadows = [ShadowClient(session, THING, name, pace) for name in names]
    async with running(session), asyncio.timeout(60):
        asking = [asyncio.create_task(shadow.get()) for _ in range(12) for shadow in shadows]
        await peer.until(lambda: len(held) == IN_FLIGHT)
        for done in range(len(asking)):
            await peer.until(lambda: held)
            answer()
            await peer.until(lambda done=done: len(peer.of(mqtt.PUBACK)) > done)
        await asyncio.gather(*asking)
    assert most == IN_FLIGHT <= 10
    times = [packet.at for packet in peer.of(mqtt.PUBLISH)]
    assert len(times) == 36
    assert max(sum(start <= at < start + 1 for at in times) for start in times) <= 20
    print(f"{len(times)} requests of {len(names)} shadows at once tried, {most} unanswered at most")


@pytest.mark.conformance("C-SHDW-14")
async def test_a_flapping_value_is_reported_at_most_once_a_second_and_as_it_is_last(
    service, peer, session, tmp_path, monkeypatch
):
    monkeypatch.setattr(shadow_module, "BETWEEN_REPORTS_S", 1.0)
    began, flaps = time.monotonic(), 0
    async with camera(service, session, tmp_path) as cam:
        await cam.until("applied", 0)
        for _ in range(3):
            for _ in range(20):
                flaps += 1
                service.want({"agent": {"telemetry": {"interval_s": 10 + flaps % 2}}})
                await asyncio.sleep(0.002)
            await cam.set_interval(20 + flaps)
        reports = len(service.cloud.reports)
        last = peer.of(mqtt.PUBLISH, topic=f"{SHADOW}/update")[-1].at
    assert 3 < reports < flaps
    assert last - began >= reports - 1
    print(f"{flaps} changes of a flapping value tried, {reports} reports")


ODD: list[dict[str, Any]] = [
    {},
    {"version": 3},
    {"version": "3", "state": {}},
    {"version": True, "state": {}},
    {"version": None, "state": {"desired": {}}},
    {"version": 3.5, "state": {}},
    {"metadata": {"desired": {}}, "version": 3},
    {"state": None, "version": 3},
    {"state": "none", "version": 3},
    {"state": [{"desired": {}}], "version": 3},
    {"state": {"desired": [1], "reported": None}, "version": 10**30},
    {"state": {"desired": "x", "reported": [1]}, "version": 3},
    {"state": {"desired": None, "reported": "x", "delta": [1]}, "version": -3},
    {"state": {"desired": {"agent": [], "targets": 7}}, "version": 3},
    {"state": {"desired": {"agent": {"telemetry": []}, "targets": {"lens": None}}}, "version": 3},
    {"state": {"desired": {"agent": {"telemetry": {"interval_s": float("nan")}}}}, "version": 3},
    {"state": {"desired": {"agent": {"x": [None]}}, "reported": {"status": [], "agent": {"x": []}}}, "version": 3},
    {"state": {"desired": {"targets": {"lens": {"\ud800": "\ud800"}}}}, "version": 3},
    {"state": {"desired": {"a" * 9000: 1}, "reported": {"\ud800": 1}}, "version": 3},
    {"state": {"desired": json.loads('{"a":' * 300 + "1" + "}" * 300)}, "version": 3},
]


async def test_no_form_of_a_shadow_stops_the_configuration(service, peer, session, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.config.configuration.LONGEST_BACK_OFF_S", 0.01)
    async with camera(service, session, tmp_path) as cam:
        for number, odd in enumerate(ODD):
            await cam.set_interval(100 + number)
            service.answers.append(odd)
            cam.configuration.look_again()
            await peer.until(lambda: not service.answers)
        await cam.set_interval(10)
        assert service.cloud.reported["agent"] == {"telemetry": {"interval_s": 10}}
    print(f"{len(ODD)} odd forms of a shadow tried")


async def test_what_is_desired_in_another_form_than_an_object_is_refused_and_not_taken_for_nothing(
    service, session, tmp_path
):
    async with camera(service, session, tmp_path) as cam:
        await cam.set_interval(10)
        service.cloud.version += 1
        service.answers.append({"state": {"desired": ["x"]}, "version": service.cloud.version})
        cam.configuration.look_again()
        status = await cam.until("rejected", service.cloud.version)
        assert status["errors"][0]["code"] == "wrong_type"
        assert cam.applied[-1].telemetry.interval_s == 10
