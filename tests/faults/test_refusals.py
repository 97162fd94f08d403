"""The real agent before a cloud that refuses, forgets, repeats and mixes up. Whatever it does, every job ends once, with the truth."""

from __future__ import annotations

import pytest

from agent.host.clock import clock_synchronised
from tests.certificates import Authority
from tests.faults.cloud import TOPIC_PREFIX, authority
from tests.faults.scene import scene, started, together
from tests.integration.mqtt_peer import CONNECT, PUBLISH, SUBSCRIBE

JOBS = "$aws/things/cam-1/jobs"


# ---- why there is no connection ------------------------------------------------------------------------------------


@pytest.mark.conformance("C-CONN-07")
async def test_status_says_why_there_is_no_connection_and_it_goes_on_by_itself(tmp_path):
    def reasons(*codes):
        def script(s):
            s.cloud.peer.connack_reasons = list(codes)

        return script

    async def back(s):
        await s.relay.plug()

    cases = {
        "not_authorised": (reasons(0x87, 0x87), "ACTIVE"),
        "closed": (reasons(-1, -1), "by itself"),
        "throttled": (reasons(0x97, 0x97), "quotas"),
        "refused": (reasons(0x82, 0x82), "log"),
    }

    async def connack(code):
        script, hint = cases[code]
        async with scene(tmp_path / code, "cam-1") as s:
            script(s)
            s.offer()
            await s.agent.start()
            await s.shows(code, hint=hint)
            await s.ends_well()

    async def nobody_listens():
        async with scene(tmp_path / "tcp", "cam-1") as s:
            await s.relay.unplug()
            s.offer()
            await s.agent.start()
            await s.shows("tcp", hint=str(s.relay.port))
            await s.relay.plug()
            await s.ends_well()

    async def reset_at_once():
        async with scene(tmp_path / "reset", "cam-1") as s:
            s.relay.refuse = True
            s.offer()
            await s.agent.start()
            await s.shows("closed", hint="by itself")
            s.relay.refuse = False
            await s.ends_well()

    async def hung_up_thrice():
        async with scene(tmp_path / "thrice", "cam-1") as s:
            s.cloud.peer.connack_reasons = [-1, -1, -1]
            s.offer()
            await s.agent.start()
            await s.shows("not_authorised", hint="iot:Connect as client/cam-1")
            await s.ends_well()

    async def never(code, hint, prepare=None, **overrides):
        name = prepare.__name__ if prepare else code
        async with scene(tmp_path / name, "cam-1", prepare=prepare, **overrides) as s:
            s.offer()
            await s.agent.start()
            await s.shows(code, hint=hint)
            assert not s.cloud.peer.of(CONNECT)

    def other_name(cloud):
        cloud.peer._tls = authority().server_context(authority().server("elsewhere.test"))

    def other_authority(cloud):
        cloud.peer._tls = Authority(tmp_path / "authority", "another authority").server_context()

    expired = authority().client("cam-expired", days=-1)
    await together(
        *(connack(code) for code in cases),
        nobody_listens(),
        reset_at_once(),
        hung_up_thrice(),
        never("dns", "DNS", cloud={"endpoint": "camera.invalid"}),
        never("tls", "ca_file", prepare=other_name),
        never("tls", "ca_file", prepare=other_authority),
        never("proxy", "proxy_url", cloud={"proxy_url": "http://127.0.0.1:9"}),
        never(
            "certificate" if clock_synchronised() else "clock",  # an unsynchronised clock is the likelier culprit
            "date" if not clock_synchronised() else "provision",
            cloud={
                "certificate_file": str(expired.certificate_file),
                "private_key_file": str(expired.private_key_file),
            },
        ),
    )
    print(f"{len(cases) + 8} causes tried")


@pytest.mark.conformance("C-CONN-08")
async def test_a_twin_is_told_and_given_way_to(tmp_path):
    """Three take-overs within two minutes: five minutes of rest. What was under way ends after it all the same."""
    async with scene(tmp_path) as s:
        await s.agent.start()
        await s.ran_once(s.offer("slow"))
        for number in range(3):
            await s.cloud.peer.until(
                lambda at_least=number + 1: len(s.cloud.peer.of(SUBSCRIBE)) and connects(s) >= at_least
            )
            s.cloud.peer.disconnect(0x8E)
            lines = await s.said("taken_over", count=number + 1)
        assert lines[2]["next_s"] >= 300
        assert "3 times" in (await s.shows("taken_over", hint="second device"))["reason"]
        assert connects(s) == 3
        await s.agent.stop()
        await s.agent.start()  # a restart is the technician's way to try again at once
        await s.all_end()
        await s.reports_complete()


def connects(s):
    return len(s.cloud.peer.of(CONNECT))


# ---- subscriptions and acknowledgements ----------------------------------------------------------------------------


@pytest.mark.conformance("C-CONN-11")
async def test_a_refused_subscription_is_shown_and_asked_for_again(tmp_path):
    async def one(name, topic):
        async with scene(tmp_path / name) as s:
            s.cloud.peer.refuse_filters = {topic: 0x87}
            await s.agent.start()
            cloud = await s.shows("subscription_refused", state="connected", hint="iot:Subscribe")
            assert topic in cloud["reason"]
            s.offer()
            s.offer("bad")
            s.cloud.peer.refuse_filters = {}
            await s.ends_well()
            await s.shows("", state="connected")
            assert connects(s) == 1

    await together(
        one("notify", f"{JOBS}/notify-next"),
        one("get", f"{JOBS}/+/get/+"),
        one("update", f"{JOBS}/+/update/+"),
    )
    print("3 refused filters tried")


@pytest.mark.conformance("C-CONN-12")
async def test_a_refused_publish_harms_nothing_else_and_is_sent_again_when_that_may_help(tmp_path):
    async def one(name, topics, code):
        async with scene(tmp_path / name) as s:
            s.cloud.peer.refuse_topics = dict.fromkeys(topics, code)
            await s.agent.start()
            s.offer("bad")
            await s.cloud.peer.until(lambda: [p for p in s.cloud.peer.of(PUBLISH) if p.topic in topics][1:])
            s.cloud.peer.refuse_topics = {}
            await s.ends_well()
            assert connects(s) == 1

    await together(
        one("report", [f"{TOPIC_PREFIX}/cam-1/report"], 0x97),
        one("next", [f"{JOBS}/$next/get"], 0x97),
        one("update", [f"{JOBS}/job-1/update"], 0x97),
        one("forbidden", [f"{JOBS}/job-1/update"], 0x87),
    )
    print("4 refused topics tried")


async def test_a_disconnect_for_each_publish_of_a_job_costs_a_reconnect(tmp_path):
    """AWS IoT also answers a publish that the policy forbids with a DISCONNECT."""

    async def one(name, topic):
        async with scene(tmp_path / name) as s:
            s.cloud.peer.disconnect_topics = {topic: 0x87}
            s.offer("bad")
            await s.agent.start()
            await s.shows("not_authorised", hint="policies")
            s.cloud.peer.disconnect_topics = {}
            await s.ends_well()

    await together(one("next", f"{JOBS}/$next/get"), one("update", f"{JOBS}/job-1/update"))
    print("2 forbidden topics tried")


# ---- forgotten, repeated, mixed up ---------------------------------------------------------------------------------


@pytest.mark.conformance("C-CONN-09", "C-JOBS-01", "C-JOBS-02")
async def test_a_lost_session_loses_no_job(tmp_path):
    async with scene(tmp_path) as s:
        await started(s)
        filters = {name for packet in s.cloud.peer.of(SUBSCRIBE) for name in packet.filters}
        await s.ran_once(s.offer("slow"))
        s.relay.cut()
        await s.cloud.peer.until(lambda: not s.cloud.peer.connections)
        s.cloud.peer.forget_sessions()
        s.offer("bad")  # its notification reaches nobody
        await s.ends_well()
        second = [p for p in s.cloud.peer.packets if p.connection == 2]
        asked = next(i for i, p in enumerate(second) if p.topic.endswith("/get"))
        assert {name for p in second[:asked] if p.kind == SUBSCRIBE for name in p.filters} == filters
        assert f"{JOBS}/$next/get" in [p.topic for p in second]


@pytest.mark.conformance("C-CONN-22", "C-CONN-29", "C-JOBS-09", "C-JOBS-27", "C-JOBS-29")
async def test_notifications_repeated_and_out_of_order(tmp_path):
    async with scene(tmp_path) as s:
        s.cloud.jobs.duplicate_notifications = s.cloud.jobs.reorder = True
        await started(s)
        for _ in range(4):
            for handler in ("note", "bad", "note"):
                s.offer(handler)
            await s.cloud.peer.until(lambda: s.cloud.jobs.pending()[-1].status != "QUEUED")
            s.cloud.peer.send(f"{JOBS}/notify-next", {"timestamp": 1})
            stale = s.cloud.jobs.execution("job-1").whole(document=True) | {"status": "QUEUED", "versionNumber": 1}
            s.cloud.peer.send(f"{JOBS}/notify-next", {"timestamp": 1, "execution": stale})
        await s.ends_well()
        assert connects(s) == 1


@pytest.mark.conformance("C-JOBS-17")
async def test_an_operator_who_changes_the_version_meanwhile(tmp_path):
    async with scene(tmp_path) as s:
        await started(s)
        for handler in ("slow", "bad"):
            s.cloud.jobs.touch(await _seen(s, s.offer(handler)))
        await s.ends_well()


async def _seen(s, job_id):
    """Wait until the job is in progress."""
    await s.cloud.peer.until(lambda: s.cloud.jobs.status(job_id) != "QUEUED")
    return job_id
