"""Running checks side by side: each waits for those it depends on, and is skipped when one of them failed.

So only root causes are shown as failures. The whole run ends within `DEADLINE_S` whatever hangs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from agent.health.probes.model import Check, ConfigProblem, Finding, Outcome, Site
from agent.health.probes.table import CHECKS

DEADLINE_S = 9.5


class UnknownCheckError(ValueError):
    """A check was asked for that does not exist."""


def list_checks() -> dict[str, str]:
    """Title of every check by its code, in the order of reports: what others depend on comes first."""
    return {check.code: check.title for check in CHECKS}


def run_checks(
    config_path: Path,
    only: Sequence[str] | None = None,
    *,
    site: Site | None = None,
    checks: Sequence[Check] = CHECKS,
) -> list[Finding]:
    """Run all checks, or `only` those and what they depend on; blocking, at most ten seconds.

    Returns a finding for each wanted check in the table's order, and for every dependency that did not pass. Raises
    UnknownCheckError.
    """
    table = {check.code: check for check in checks}
    unknown = set(only or ()) - set(table)
    if unknown:
        raise UnknownCheckError(f"no such check: {', '.join(sorted(unknown))} (there are {', '.join(table)})")
    wanted = set(only) if only else set(table)
    needed = [check for code, check in table.items() if code in _with_dependencies(wanted, table)]
    found = _run(needed, site or Site(config_path))
    return [
        found[check.code] for check in needed if check.code in wanted or found[check.code].status in ("fail", "warn")
    ]


def _run(checks: Sequence[Check], site: Site) -> dict[str, Finding]:
    deadline = time.monotonic() + DEADLINE_S
    waiting = {check.code: check for check in checks}
    running: dict[str, tuple[Check, float]] = {}
    found: dict[str, Finding] = {}
    results: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
    while waiting or running:
        for check in [c for c in waiting.values() if all(d in found for d in c.depends_on)]:
            del waiting[check.code]
            cause = _root_cause(check, found)
            if cause:
                outcome = Outcome("skip", f"not checked because of {cause}")
                found[check.code] = replace(_finding(check, outcome), because=cause)
                continue
            running[check.code] = (check, min(time.monotonic() + check.limit_s, deadline))
            # A daemon thread: one that hangs in the resolver can't be stopped and must not hold up the exit.
            threading.Thread(target=_call, args=(check, site, results), daemon=True).start()
        if not running:
            continue
        try:
            pause = max(min(end for _, end in running.values()) - time.monotonic(), 0)
            code, outcome = results.get(timeout=pause)
        except queue.Empty:
            for code, (check, end) in list(running.items()):
                if end <= time.monotonic():
                    del running[code]
                    found[code] = _finding(check, _no_answer(check))
        else:
            if code in running:
                found[code] = _finding(running.pop(code)[0], outcome)
    return found


def _call(check: Check, site: Site, results: queue.SimpleQueue[tuple[str, Outcome]]) -> None:
    try:
        outcome = check.run(site)
    except ConfigProblem as problem:
        outcome = Outcome(
            "fail", str(problem), "the agent can't use this file", f"camera-agent check-config {site.config_path}"
        )
    except Exception as error:  # noqa: BLE001  a bug in one check must not cost the others
        outcome = Outcome(
            "warn", f"the check itself failed: {type(error).__name__}: {error}", "nothing is known about this point"
        )
    results.put((check.code, outcome))


def _no_answer(check: Check) -> Outcome:
    return Outcome("fail", f"no answer within {check.limit_s:g} s", *check.silent)


def _root_cause(check: Check, found: dict[str, Finding]) -> str:
    for dependency in check.depends_on:
        finding = found[dependency]
        if finding.status == "fail":
            return dependency
        if finding.because:
            return finding.because
    return ""


def _with_dependencies(codes: Iterable[str], table: dict[str, Check]) -> set[str]:
    reached: set[str] = set()
    pending = list(codes)
    while pending:
        code = pending.pop()
        if code not in reached:
            reached.add(code)
            pending += [dependency for dependency in table[code].depends_on if dependency in table]
    return reached


def _finding(check: Check, outcome: Outcome) -> Finding:
    return Finding(
        check.code, check.title, check.severity, outcome.status, outcome.seen, outcome.meaning, outcome.remedy
    )
