"""The steps of the tour: each does one thing through the cloud's side, sees what comes of it, and says what was seen."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from agent.sandbox.fleet import update_document
from agent.sandbox.pipeline import build_artifact
from agent.sandbox.playing import HELLO_JOB
from agent.sandbox.tour_guide import Guide, Json, NotYet, check, part, say, show, until

SETTINGS: dict[str, dict[str, Any]] = {
    "telemetry": {"interval_s": 3},
    "config": {"trial_s": 5, "connectivity_trial_s": 10},
    "capture": {"budget_pct": 10},
}
STABLE_FOR_S = 5
DEADLINE_S = 120
CUT_S = 20.0
REFERENCE_SAMPLES = 16
REPORT_INTERVAL_S = 2
IMAGE_INTERVAL_S = 0.5
GOOD_QUALITY = 80
SHARPNESS_TOLERANCE = 0.15
HOST_METRICS = (
    "system.cpu.utilization",
    "system.memory.usage{state=used}",
    "system.memory.limit",
    "system.uptime",
    "process.memory.usage",
    "process.thread.count",
)


@dataclass(frozen=True)
class Step:
    """`run` returns what was seen, and raises UnexpectedError when it was not what it should be."""

    name: str
    title: str
    run: Callable[[Guide], Awaitable[str]]


async def provision(guide: Guide) -> str:
    certificate = guide.camera.state_dir / "identity" / "certificate.pem"
    check(not await asyncio.to_thread(certificate.exists), f"{certificate} is there already")
    group = guide.sandbox.fleet.group
    before = await guide.aws("iot", "list_things_in_thing_group", thingGroupName=group)
    check(not before["things"], "the group has things already")
    say(f"the group {group} is empty; the camera has a claim certificate and no identity; its agent starts")
    await guide.sandbox.start_agent(guide.camera)
    not_found = guide.sandbox.aws.client("iot").exceptions.ResourceNotFoundException

    async def ask() -> Json:
        try:
            thing = await guide.aws("iot", "describe_thing", thingName=guide.thing)
        except not_found:
            raise NotYet(f"there is no thing {guide.thing}") from None
        principals = (await guide.aws("iot", "list_thing_principals", thingName=guide.thing))["principals"]
        groups = (await guide.aws("iot", "list_thing_groups_for_thing", thingName=guide.thing))["thingGroups"]
        if not principals or not groups:
            raise NotYet("the thing has no certificate or group")
        certificate_id = principals[0].rpartition("/")[2]
        described = await guide.aws("iot", "describe_certificate", certificateId=certificate_id)
        return {
            "thing": thing["thingName"],
            "type": thing["thingTypeName"],
            "certificate": certificate_id,
            "certificateStatus": described["certificateDescription"]["status"],
            "groups": [entry["groupName"] for entry in groups],
        }

    made = await until("the camera registers itself", ask)
    show(made)
    check(made["certificateStatus"] == "ACTIVE" and made["groups"] == [group], "it is not an active member")

    async def connected() -> Json:
        status = await guide.status()
        if status["cloud"]["state"] != "connected":
            raise NotYet(f"{status['cloud']['state']} {status['cloud']['reason']}")
        return status

    await until("the agent is connected as itself", connected)
    return f"thing {made['thing']}, certificate {made['certificate'][:8]}… ACTIVE, group {group}"


async def report(guide: Guide) -> str:
    async def ask() -> Json:
        reports = await guide.reports()
        full = [
            r
            for r in reports
            if r["capture"]["front"].get("sharpness") and all(r["host"].get(name) for name in HOST_METRICS)
        ]
        if not full:
            raise NotYet(f"{len(reports)} reports, without measured images or without all of {', '.join(HOST_METRICS)}")
        return full[-1]

    seen = await until("a report with measured images and machine metrics in the rule's queue", ask)
    front, host = seen["capture"]["front"], seen["host"]
    show(
        part(seen, "thing", "boot_id", "seq", "start", "end", "conditions")
        | {"host": {**part(host, *HOST_METRICS), "…": f"{len(host) - len(HOST_METRICS)} more"}}
        | {"capture": {"front": part(front, "images", "rate_hz", "bytes", "latency_s", "luma", "sharpness", "gaps")}}
    )
    good = front["images"] > 0 and front["rate_hz"] > 0 and front["luma"]["p50"] > 0 and front["sharpness"]["p50"] != 0
    check(good, "a capture metric is zero")
    return (
        f"{front['images']} images, {front['rate_hz']:.2f}/s, luma {front['luma']['p50']}, "
        f"sharpness {front['sharpness']['p50']}, {len(host)} host metrics"
    )


async def configure(guide: Guide) -> str:
    desired: Json = {
        "agent": {
            "telemetry": {"interval_s": REPORT_INTERVAL_S},
            "log": {"level": "debug"},
            "capture": {"sources": {"front": {"interval_s": IMAGE_INTERVAL_S}}},
        },
        "targets": {"pipeline": {"interval_s": IMAGE_INTERVAL_S, "quality": GOOD_QUALITY, "overlay": "on tour"}},
    }
    before = json.loads(await guide.read(guide.camera.pipeline_root / "config.json"))
    say(f"the pipeline's config.json: {json.dumps(before)}", f"update_thing_shadow desired: {json.dumps(desired)}")
    version = await guide.set_desired(desired)
    reported, passed = await guide.reported(version, "applied", "trial")
    show({"reported": reported})
    check("trial" in passed, "it was not on trial first")
    check(part(reported, "agent", "targets") == desired, "reported is not what is desired")
    on_disk = json.loads(await guide.read(guide.camera.pipeline_root / "config.json"))
    check(on_disk == desired["targets"]["pipeline"], f"config.json is {on_disk}")
    level = (await guide.agentctl("config", "get", "log.level")).text.strip()
    check(level == "debug", f"agentctl config get log.level says {level}")

    async def followed() -> Json:
        newest = (await guide.reports())[-1]
        front = newest["capture"]["front"]
        window_s, rate_hz = newest["end"] - newest["start"], front.get("rate_hz", 0)
        if abs(window_s - REPORT_INTERVAL_S) > 0.5 or abs(rate_hz * IMAGE_INTERVAL_S - 1) > 0.3:
            raise NotYet(f"a report of {window_s:.1f} s with {rate_hz:.2f} images/s")
        return {"window_s": round(window_s, 1), "rate_hz": rate_hz}

    seen = await until("reports and images follow the new intervals", followed)
    return (
        f"trial, then applied; reported = desired; {seen['rate_hz']:.2f} images/s, a report every {seen['window_s']} s"
    )


async def refuse(guide: Guide) -> str:
    path = guide.camera.pipeline_root / "config.json"
    before, stat = await guide.read(path), await asyncio.to_thread(path.stat)
    say('update_thing_shadow desired: {"targets": {"pipeline": {"quality": 500}}} (20 to 95 are allowed)')
    version = await guide.set_desired({"targets": {"pipeline": {"quality": 500}}})
    reported, _ = await guide.reported(version, "rejected")
    show({"reported": {"status": reported["status"]}})
    wrong = reported["status"]["errors"][0]
    check(wrong["pointer"] == "/targets/pipeline/quality", f"the pointer is {wrong['pointer']}")
    after = await asyncio.to_thread(path.stat)
    same = (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns) and await guide.read(path) == before
    check(same, f"{path} was written")
    await guide.show_agentctl("config", "diff", expect=10, why="the cloud wants what is not in force")
    version = await guide.set_desired({"targets": {"pipeline": {"quality": GOOD_QUALITY}}})
    await guide.reported(version, "applied")
    return f"rejected: {wrong['pointer']} {wrong['message']}; config.json untouched"


async def run_job(guide: Guide) -> str:
    await guide.create_job("tour-hello", HELLO_JOB)
    details = await guide.job_end("tour-hello", "SUCCEEDED")
    check("hello from" in details.get("stdout", ""), "the handler's output is not in the status details")
    await guide.show_agentctl("jobs", "show", "tour-hello", why="a job is shown")
    await guide.show_agentctl("jobs", "show", "tour-nothing", expect=5, why="there is no such job")
    return f"SUCCEEDED, exit_code {details.get('exit_code')}, stdout {details['stdout']!r}"


async def update(guide: Guide) -> str:
    await _wait_for_reference(guide)
    before = await guide.slot()
    document = await _update(guide, "1.1.0", "good")
    say(f"the link current is {before[:12]}…; the artifact is signed and in the bucket")
    await guide.create_job("tour-update-good", document)
    details = await guide.job_end("tour-update-good", "SUCCEEDED")
    slot, seen = await guide.slot(), (await guide.status())["updates"]["pipeline"]
    check(slot != before, "the link current was not switched")
    check(slot.startswith(seen["slot"]) and seen["version"] == "1.1.0", f"agentctl status says {seen}")
    return f"SUCCEEDED; current {before[:8]}… → {slot[:8]}…, agentctl says {seen['version']}; {details['message']}"


async def roll_back(guide: Guide) -> str:
    await _wait_for_reference(guide)
    before, sharp = await guide.slot(), (await guide.live())["sharpness"]
    say(f"sharpness now: {sharp}; version 1.2.0 blurs the images, all else of it is well")
    await guide.create_job("tour-update-blurry", await _update(guide, "1.2.0", "blurry:5"))
    details = await guide.job_end("tour-update-blurry", "FAILED", images=True)
    check(details["reason_code"] == "capture_worse", f"reason_code is {details['reason_code']}")
    check(await guide.slot() == before, "the link current is not the version before")
    seen = (await guide.status())["updates"]["pipeline"]
    check(seen["version"] == "1.1.0", f"agentctl status says {seen}")

    async def sharp_again() -> float:
        now: float = (await guide.live()).get("sharpness", -9.0)
        if now < sharp - SHARPNESS_TOLERANCE:
            raise NotYet(f"sharpness {now}")
        return now

    again = await until("the images are sharp again", sharp_again)
    await guide.show_agentctl("jobs", "watch", "tour-update-blurry", expect=11, why="a watched job has failed")
    return f"FAILED {details['reason_code']}: {details['message']}; sharpness {again} again"


async def reject(guide: Guide) -> str:
    document = await _update(guide, "1.3.0", "good")
    manifest = document["manifest"]
    payload = json.loads(base64.b64decode(manifest["payload"]))
    payload["version"] = "9.9.9"
    manifest["payload"] = base64.b64encode(json.dumps(payload, separators=(",", ":")).encode()).decode()
    say("the manifest was signed as version 1.3.0; somebody made it 9.9.9 and kept the signature")
    before = await guide.slot(), await _slots(guide)
    await guide.create_job("tour-update-tampered", document)
    details = await guide.job_end("tour-update-tampered", "REJECTED")
    check("signature" in details["reason_code"], f"reason_code is {details['reason_code']}")
    check((await guide.slot(), await _slots(guide)) == before, "something was installed")
    return f"REJECTED {details['reason_code']}: {details['message']}; slots untouched"


async def cut(guide: Guide) -> str:
    known = len(await guide.reports())
    began, began_at = time.monotonic(), time.time()
    await guide.sandbox.proxy.cut()
    say(f"{known} reports so far; every connection to the broker is reset, and new ones are refused")

    async def offline() -> Json:
        cloud: Json = (await guide.status())["cloud"]
        if cloud["state"] == "connected" or not cloud["reason"]:
            raise NotYet(cloud["state"])
        return cloud

    try:
        cloud = await until("agentctl says so", offline)
        why = "not online in time"
        await guide.show_agentctl("status", "--wait", "online", "--timeout", "2", expect=6, why=why)

        async def long_enough() -> int:
            waiting: int = (await guide.status())["outbox"]["messages"]
            if time.monotonic() - began < CUT_S or not waiting:
                raise NotYet(f"{waiting} messages in the outbox")
            return waiting

        waiting = await until(f"the cut lasts {CUT_S:.0f} s", long_enough)
        await guide.show_agentctl("status", why="it answers while off-line")
    finally:
        await guide.sandbox.proxy.restore()
    ended_at = time.time()
    say(f"the cable is back after {ended_at - began_at:.0f} s; {waiting} messages wait on the camera's disk")

    async def complete() -> list[Json]:
        reports, status = await guide.reports(), await guide.status()
        missing = _missing(reports)
        behind = status["outbox"]["messages"]
        if status["cloud"]["state"] != "connected" or max(r["end"] for r in reports) < ended_at or behind or missing:
            raise NotYet(f"{status['cloud']['state']}, {behind} in the outbox, missing {missing}")
        return reports

    reports = await until("everything has arrived", complete)
    late = sorted({r["seq"] for r in reports if began_at < r["end"] < ended_at})
    check(len(late) >= CUT_S / REPORT_INTERVAL_S / 2, f"only {len(late)} reports were made during the cut")
    unique: dict[tuple[str, int], Json] = {}
    for one in reports:
        first = unique.setdefault((one["boot_id"], one["seq"]), one)
        check(first == one, f"two reports have the number {one['seq']}")
    say(
        f"made during the cut, arrived after it: seq {late[0]} to {late[-1]}", f"missing: {_missing(reports) or 'none'}"
    )
    twice = len(reports) - len(unique)
    return (
        f"{cloud['state']} ({cloud['code']}): {cloud['reason']}; {len(late)} reports came later, "
        f"{len(unique)} in all, none missing, {twice or 'none'} twice"
    )


async def revert(guide: Guide) -> str:
    await _wait_for_reference(guide)
    good = await guide.read(guide.camera.pipeline_root / "config.json")
    say('update_thing_shadow desired: {"targets": {"pipeline": {"interval_s": 10}}}: valid, but hardly an image comes')
    version = await guide.set_desired({"targets": {"pipeline": {"interval_s": 10}}})
    reported, passed = await guide.reported(version, "reverted", "trial")
    show({"reported": part(reported, "targets", "status")})
    why = reported["status"]["errors"][0]
    check("trial" in passed, "it was not on trial first")
    check("images a second" in why["message"], f"the reason is {why}")
    check(reported["targets"]["pipeline"]["interval_s"] == IMAGE_INTERVAL_S, "reported does not say the value in force")
    check(await guide.read(guide.camera.pipeline_root / "config.json") == good, "config.json is not as before")
    version = await guide.set_desired({"targets": {"pipeline": {"interval_s": IMAGE_INTERVAL_S}}})
    await guide.reported(version, "applied")

    async def flowing() -> float:
        front = (await guide.reports())[-1]["capture"]["front"]
        rate_hz: float = front.get("rate_hz", 0)
        if abs(rate_hz * IMAGE_INTERVAL_S - 1) > 0.3:
            raise NotYet(f"{rate_hz:.2f} images/s")
        return rate_hz

    rate_hz = await until("the images flow as before", flowing)
    return f"reverted: {why['pointer']} {why['message']}; {rate_hz:.2f} images/s again"


async def wrong_proxy(guide: Guide) -> str:
    await _wait_for_reference(guide)
    document = {"version": "1.0", "operation": "configure", "agent": {"cloud": {"proxy_url": "http://127.0.0.1:9"}}}
    say(f"a job for the whole group: {json.dumps(document)}; nothing listens there")
    await guide.create_job("tour-wrong-proxy", document)
    details = await guide.job_end("tour-wrong-proxy", "FAILED")
    check(details["reason_code"] == "unreachable", f"reason_code is {details['reason_code']}")
    explained = await guide.show_agentctl("config", "explain", "cloud.proxy_url", why="a key is explained")
    check("127.0.0.1:9" not in explained.text, "the wrong proxy is still in force")
    return f"FAILED {details['reason_code']}: {details['message']}"


async def diagnose(guide: Guide) -> str:
    await guide.show_agentctl("status", why="the agent answers")
    doctor = await guide.show_agentctl("doctor", why="no check failed")
    await guide.agentctl("frobnicate", expect=2)
    guide.exit_codes["there is no such verb"] = 2
    ended = await guide.sandbox.stop_agent(guide.camera)
    say(f"the agent is stopped by SIGTERM: exit status {ended}")
    check(ended == 0, f"the agent ended with status {ended}")
    down = await guide.show_agentctl("status", expect=3, why="the agent is down")
    check("Last known state" in down.text and guide.thing in down.text, "it does not say the last known state")
    codes = sorted(guide.exit_codes.items(), key=lambda code: code[1])
    say("exit statuses of agentctl on this tour:", *(f"{status:4}  {why}" for why, status in codes))
    return f"doctor: {doctor.text.splitlines()[0]}; agent down: status 3 and the last known state"


STEPS = (
    Step("provision", "A camera without a certificate provisions itself by its claim", provision),
    Step("report", "Reports arrive, with the machine's metrics and the images'", report),
    Step("configure", "A configuration is applied on trial, and stays", configure),
    Step("refuse", "An invalid configuration is refused, with a pointer to the wrong key", refuse),
    Step("job", "A job for the thing group runs a handler on the camera", run_job),
    Step("update", "A good update is installed, proven and kept", update),
    Step("roll back", "An update that blurs the images is taken back", roll_back),
    Step("reject", "An update with a tampered manifest is rejected", reject),
    Step("cut", "The broker is cut off for 20 s, and nothing is lost", cut),
    Step("revert", "A configuration that hurts the images is taken back", revert),
    Step("wrong proxy", "A job cuts the camera off by a wrong proxy; it comes back by itself", wrong_proxy),
    Step("diagnose", "agentctl says how things are, also when the agent is down", diagnose),
)


async def _wait_for_reference(guide: Guide) -> None:
    """The gate compares pictures once it has enough of them from before the change."""

    async def ask() -> None:
        samples = (await guide.live())["reference_samples"]
        if samples < REFERENCE_SAMPLES:
            raise NotYet(f"{samples} of {REFERENCE_SAMPLES}")

    await until("enough measured images to compare with", ask)


async def _update(guide: Guide, version: str, behaviour: str) -> Json:
    """The document of an update job: its artifact built, uploaded and signed."""
    artifact = await asyncio.to_thread(build_artifact, guide.sandbox.folder / "artifacts", version, behaviour)
    return await asyncio.to_thread(
        update_document, guide.sandbox, artifact, version, stable_for_s=STABLE_FOR_S, deadline_s=DEADLINE_S
    )


async def _slots(guide: Guide) -> list[str]:
    def names() -> list[str]:
        return sorted(path.name for path in (guide.camera.pipeline_root / "slots").iterdir())

    return await asyncio.to_thread(names)


def _missing(reports: list[Json]) -> list[int]:
    """Numbers between the first and the last of each boot that no report has."""
    missing: list[int] = []
    for boot in {report["boot_id"] for report in reports}:
        numbers = {report["seq"] for report in reports if report["boot_id"] == boot}
        missing += sorted(set(range(1, max(numbers) + 1)) - numbers)
    return missing
