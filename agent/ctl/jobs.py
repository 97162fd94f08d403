"""`agentctl jobs`: what the cloud asked this camera to do, how it went and why; watch one, cancel it, or try a document."""
# pathlib would cost some milliseconds at every start.
# ruff: noqa: PTH123

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from agent.ctl import output
from agent.ctl.arguments import name, seconds
from agent.ctl.client import Client
from agent.ctl.exits import ANSWERED, BAD, ERROR, TIMED_OUT, Failure

Json = dict[str, Any]

RUNNING = "IN_PROGRESS"
FILE_LIMIT = 128 * 1024
BY_THE_CLOUD = {
    "CANCELED": "the cloud cancelled it",
    "TIMED_OUT": "the cloud's time for it ran out",
    "REMOVED": "the cloud has removed it",
}


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", prog=parser.prog, metavar="list|show|watch|cancel|plan")

    def action(word: str, does: str) -> ArgumentParser:
        return actions.add_parser(word, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=parser.epilog)

    listing = action("list", "the latest jobs, the newest first (without an action: this)")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="how many [20]")
    shown = action("show", "one job with its details")
    watched = action("watch", "follow one job to its end; exit 11 unless it succeeds")
    watched.add_argument("--timeout", type=seconds, metavar="S", help="give up after this time, exit 6 [never]")
    cancelled = action("cancel", "ask a running job to stop where it safely can")
    for command in (shown, watched, cancelled):
        command.add_argument("id", type=name, metavar="ID", help="the job's id")
    planned = action("plan", "what this camera would do with a job document; exit 11 if it would refuse")
    planned.add_argument(
        "file", type=name, metavar="FILE", help="the document, as it is given to the cloud; - for standard input"
    )


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
        case "plan":
            return _plan(arguments, client.post("/v1/jobs/plan", _document(arguments.file), plan=dict))
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
    first, *rest = output.table_rows(rows)
    lines = first
    for row, job in zip(rest, jobs, strict=True):
        lines += [*row, *(output.paragraph("", story(job), 4) if story(job) else [])]
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


def _plan(arguments: Namespace, reply: Json) -> int:
    plan = reply["plan"]
    accepted = plan["accepted"] is True
    if arguments.json:
        output.show_json(reply)
    elif accepted:
        steps = [output.paragraph(f"{number}. ", str(step), 2) for number, step in enumerate(plan["steps"], 1)]
        verdict = output.paint("this camera would take it", "good")
        output.show(
            [f"{output.clean(plan.get('operation') or 'job')}: {verdict}", *(line for step in steps for line in step)]
        )
    else:
        lines = [f"{output.paint('this camera would refuse it', 'bad')} ({output.clean(plan['code'])})"]
        lines += output.paragraph("", str(plan["message"]), 2)
        output.show(lines + (output.paragraph("what to do: ", str(plan["hint"]), 2) if plan.get("hint") else []))
    return ANSWERED if accepted else BAD


def _document(path: str) -> bytes:
    """What is in the file, when it is JSON and not too large to be asked about. Raises Failure."""
    shown = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(FILE_LIMIT + 1) if sys.stdin else b""
        else:
            with open(path, "rb") as file:
                data = file.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Failure(ERROR, "document_unreadable", f"{shown}: {reason}", "name a file with a job document") from None
    if len(data) > FILE_LIMIT:
        raise Failure(
            ERROR, "document_too_large", f"{shown}: larger than {FILE_LIMIT} bytes", "AWS takes 32 KiB at most"
        )

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number in JSON")

    try:
        json.loads(data, parse_constant=refuse)
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = str(error) if data.strip() else "it is empty"
    else:
        return data
    raise Failure(ERROR, "document_not_json", f"{shown}: not JSON: {why}", "mend the file")


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
