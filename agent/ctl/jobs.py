"""`agentctl jobs`: what the cloud asked this camera to do, how it went and why; watch one, or cancel it."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

from agent.ctl import output
from agent.ctl.arguments import name, seconds
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED, BAD, TIMED_OUT, Failure

Json = dict[str, Any]

RUNNING = "IN_PROGRESS"
BY_THE_CLOUD = {
    "CANCELED": "the cloud cancelled it",
    "TIMED_OUT": "the cloud's time for it ran out",
    "REMOVED": "the cloud has removed it",
}


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="list|show|watch|cancel")
    listing = actions.add_parser("list", help="the latest jobs, the newest first (without an action: this)")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="how many [20]")
    shown = actions.add_parser("show", help="one job with its details")
    watched = actions.add_parser("watch", help="follow one job to its end; exit 11 unless it succeeds")
    watched.add_argument("--timeout", type=seconds, metavar="S", help="give up after this time, exit 6 [never]")
    cancelled = actions.add_parser("cancel", help="ask a running job to stop where it safely can")
    for command in (shown, watched, cancelled):
        command.add_argument("id", type=name, metavar="ID", help="the job's id")


def run(arguments: Namespace, client: Client) -> int:
    match arguments.action:
        case "show":
            return _show(arguments, client.get(_path(arguments.id), job=dict))
        case "watch":
            return _watch(arguments, client)
        case "cancel":
            reply = client.post(f"{_path(arguments.id)}/cancel")
            if arguments.json:
                output.show_json(reply)
            else:
                output.show(
                    f"{output.clean(arguments.id)}: asked to stop; follow it: agentctl jobs watch {output.clean(arguments.id)}"
                )
            return ANSWERED
        case _:
            return _list(arguments, client.get(f"/v1/jobs?limit={getattr(arguments, 'limit', 20)}", jobs=list))


def outcome(job: Json) -> str:
    """The status in the cloud's words; what the cloud decided otherwise goes first."""
    return str(job.get("superseded") or job.get("status") or RUNNING)


def outcome_colour(job: Json) -> str:
    """How `outcome` is shown."""
    return {"SUCCEEDED": "good", RUNNING: "strong"}.get(outcome(job), "bad")


def name_of(job: Json) -> str:
    """Id and operation."""
    return f"{job.get('job_id', '?')} ({job.get('operation') or 'unknown'})"


def listing(jobs: list[Json]) -> list[str]:
    """Jobs in a table, each with its reason below."""
    headings: list[output.Cell] = [(heading, "quiet") for heading in ("STATUS", "RECEIVED", "OPERATION", "JOB")]
    rows = [headings]
    for job in jobs:
        operation, job_id = str(job.get("operation") or "-"), str(job.get("job_id", "?"))
        rows.append([(outcome(job), outcome_colour(job)), output.moment(job.get("received_at")), operation, job_id])
    first, *rest = output.table(rows)
    lines = [first]
    for line, job in zip(rest, jobs, strict=True):
        lines += [line, *(output.paragraph("", story(job), 4) if story(job) else [])]
    return lines


def _path(job_id: str) -> str:
    from urllib.parse import quote

    return f"/v1/jobs/{quote(job_id, safe='', errors='surrogateescape')}"


def story(job: Json) -> str:
    """What happened, or happens now, in words; empty when nothing is known. Where the cloud and this camera differ, both."""
    message = str((job.get("details") or {}).get("message") or job.get("message") or "")
    tail = f": {message}" if message else ""
    status, ended_as = job.get("status"), job.get("superseded") or job.get("cancelled")
    by = BY_THE_CLOUD.get(str(ended_as), f"the cloud ended it as {ended_as}")
    if job.get("superseded"):
        here = f"here it had ended as {status}{tail}" if status else "it had not begun here"
        return f"{by}; {here}"
    if job.get("cancelled") and not status:
        return f"{by}; it stops where it safely can{tail}"
    return message


def _list(arguments: Namespace, reply: Json) -> int:
    jobs = reply.get("jobs", [])
    if arguments.json:
        output.show_json(reply)
    elif not jobs:
        output.show("no job has arrived yet")
    else:
        output.show(listing(jobs))
    return ANSWERED


def _show(arguments: Namespace, reply: Json) -> int:
    if arguments.json:
        output.show_json(reply)
        return ANSWERED
    job = reply.get("job", {})
    received, ended = job.get("received_at"), job.get("ended_at")
    took = f", took {output.duration(ended - received)}" if received and ended else ""
    lines = [f"{output.clean(name_of(job))}: {output.paint(outcome(job), outcome_colour(job))}"]
    if story(job):
        lines += output.paragraph("  ", story(job), 0)
    rows: list[list[output.Cell]] = [
        ["execution", str(job.get("execution_number", "-"))],
        ["received", output.moment(received)],
        ["ended", f"{output.moment(ended)}{took}"],
    ]
    if job.get("phase") == "ended":
        rows.append(["cloud", "has not taken the outcome yet"])
    rows += [[str(key), str(value)] for key, value in (job.get("details") or {}).items() if key != "message"]
    output.show([*lines, "", *output.table([[(str(label), "quiet"), value] for label, value in rows])])
    return ANSWERED


def _watch(arguments: Namespace, client: Client) -> int:
    end = time.monotonic() + arguments.timeout if arguments.timeout is not None else None
    shown = None
    while True:
        job = client.get(_path(arguments.id), job=dict)["job"]
        now = (outcome(job), story(job))
        if now != shown:
            shown = now
            if arguments.json:
                output.show_json({"job": job}, line=True)
            else:
                status = output.paint(now[0], outcome_colour(job))
                output.show(f"{output.moment(time.time())}  {status}  {output.clean(now[1])}".rstrip())
        if now[0] != RUNNING:
            return ANSWERED if now[0] == "SUCCEEDED" else BAD
        if end is not None and time.monotonic() + 1 > end:
            raise Failure(TIMED_OUT, "still_running", f"{arguments.id} has not ended after {arguments.timeout:g} s")
        time.sleep(1)
