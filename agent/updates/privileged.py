"""The part of the agent that runs as root: `python -m agent.updates.privileged REQUEST`, one request for a Debian package.

Started as camera-agent-deb@REQUEST.service, REQUEST being `<verb>_<id>_<target>`. What is asked for stands in the file
`deb-requests/<id>.json` of the agent's state folder and is not trusted; agent.toml and the update keys are, being root's.
The result is `<id>.json` in the folder of results. Exit status: 0 done, 1 failed, 2 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import settings, settings_file
from agent.errors import AgentError, FailedError, RefusedError, SettingsError
from agent.host.files import write_atomic
from agent.updates.installers.deb_store import STORE, DebStore, open_plain
from agent.updates.installers.deb_work import VERBS, DebWork, check_believed
from agent.updates.installers.dpkg import Dpkg

RESULTS = Path("/run/camera-agent-deb")
REQUESTS = "deb-requests"
REQUEST = re.compile(r"(" + "|".join(VERBS) + r")_([0-9a-f]{16})_([a-z0-9][a-z0-9_-]{0,31})")
MAX_REQUEST_BYTES = 200_000
RESULT_LIFE_S = 86_400
MAX_RESULTS = 64


def main(argv: list[str] | None = None) -> int:
    """Carry out one request; see the module."""
    arguments = _parser().parse_args(argv)
    match = REQUEST.fullmatch(arguments.request)
    if match is None:
        print("the request is not VERB_ID_TARGET; nothing was changed", file=sys.stderr)
        return 2
    # At a shutdown dpkg is let to its end. A handler, for what is ignored would be ignored by dpkg and its scripts, too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    os.umask(0o022)
    verb, request_id, target = match.groups()
    try:
        words = _carry_out(arguments, verb, request_id, target)
        result = {"status": "done", "code": "", "message": words, "hint": ""}
    except AgentError as error:
        status = "refused" if isinstance(error, RefusedError | SettingsError) else "failed"
        result = {"status": status, "code": error.code, "message": error.message, "hint": error.hint}
    except ValueError:
        result = {"status": "refused", "code": "request_malformed", "message": "the request makes no sense", "hint": ""}
    except OSError as error:
        words = f"{error.filename or ''}: {error.strerror or type(error).__name__}"
        result = {"status": "failed", "code": "io_error", "message": words, "hint": ""}
    _report(arguments.results, request_id, result)
    print(f"{verb} {target}: {result['status']}: {result['message']}", file=sys.stderr)
    return {"done": 0, "failed": 1, "refused": 2}[result["status"]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="camera-agent-deb", description="One change of a Debian package, as root.")
    parser.add_argument("--config", type=Path, default=settings.DEFAULT_CONFIG_FILE, help="agent.toml")
    parser.add_argument("--store", type=Path, default=STORE, help="root's own folder of .debs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--root", type=Path, help="another tree than the machine's own")
    parser.add_argument("request", help="VERB_ID_TARGET")
    return parser


def _carry_out(arguments: argparse.Namespace, verb: str, request_id: str, target: str) -> str:
    for path in (Path(__file__), Path(sys.executable), arguments.config):
        check_believed(path)
    loaded = settings_file.load(arguments.config)
    wanted = loaded.updates.targets.get(target)
    if wanted is None or wanted.installer != "deb":
        raise RefusedError(
            "unknown_target", f"{arguments.config} has no target {target} of installer deb", "see docs/deb.md"
        )
    agents_own = frozenset({loaded.paths.state_dir.stat().st_uid})
    request = read_request(loaded.paths.state_dir / REQUESTS / f"{request_id}.json", agents_own)
    work = DebWork(
        DebStore(arguments.store),
        Dpkg(arguments.root),
        keys_dir=loaded.updates.keys_dir,
        artifact_owners=agents_own,
    )
    return work.do(verb, target, wanted.package, request)


def read_request(path: Path, owners: frozenset[int]) -> Mapping[str, Any]:
    """What the agent asks for; nothing of the file's content is ever repeated. Raises RefusedError, FailedError, OSError."""
    with open_plain(path, owners) as file:
        text = file.read(MAX_REQUEST_BYTES + 1)
    try:
        document = json.loads(text) if len(text) <= MAX_REQUEST_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RefusedError("request_malformed", "the request can't be read")
    return document


def read_result(path: Path) -> Mapping[str, str] | None:
    """A result, None when there is none."""
    try:
        document = json.loads(path.read_bytes())
        return {key: str(document[key]) for key in ("status", "code", "message", "hint")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise FailedError("io_error", f"the result {path} can't be read") from None


def _report(folder: Path, request_id: str, result: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    ages = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            ages.append((path.stat().st_mtime, path))
    for place, (modified, path) in enumerate(sorted(ages, reverse=True), start=2):
        if place > MAX_RESULTS or modified < time.time() - RESULT_LIFE_S:
            path.unlink(missing_ok=True)
    clean = {key: "".join(c if c.isprintable() else " " for c in text) for key, text in result.items()}
    write_atomic(folder / f"{request_id}.json", json.dumps(clean).encode(), mode=0o644)


if __name__ == "__main__":
    sys.exit(main())
