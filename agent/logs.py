"""Logging: to the journal when systemd reads it, readable on a terminal, JSON on request; secrets never get through.

Owner of structlog. Everything logs through `get_logger(component)` with an event text and key/value pairs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
SECRET_KEY = re.compile(
    r"(?i:private_?key|secret|password|passwd|passphrase|authorization|credential)"
    r"|(?i:psk|pwd|token|(api|access)[_-]?key)s?[_-]?\d*$|((?<![A-Za-z])(?i:pass)|Pass)$"
)
NO_SECRET_KEY = re.compile(r"[_-](file|files|dir|path|id|ids|at|s|count)$|(File|Path|Dir|Id|Count)$|^client_?[Tt]oken$")
SECRETS = (
    (re.compile(r"(https?://[^\s\"'?]{1,2048})\?[^\s\"'<>]+"), r"\1?[redacted]"),
    (re.compile(r"\b(\w{1,20}://)(?!\[user:password@\])[^/\s:@]{1,256}:[^/\s@]{1,256}@"), r"\1[redacted]@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), "[redacted]"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), "[redacted]"),
)

Logger = structlog.stdlib.BoundLogger
_threshold = LEVELS["info"]


def get_logger(component: str) -> Logger:
    """A logger whose lines carry `component`."""
    logger: Logger = structlog.get_logger(component=component)
    return logger


def set_level(level: str) -> None:
    """Write lines of `level` and above from now on."""
    global _threshold  # noqa: PLW0603  one process, one level
    _threshold = LEVELS[level]


def is_secret(key: str) -> bool:
    """Whether what has this name is a password or the like; `private_key_file` names a file, and is none."""
    return bool(SECRET_KEY.search(key)) and not NO_SECRET_KEY.search(key)


def redact(text: str) -> str:
    """`text` without query strings of URLs, passwords in URLs, private keys and AWS key ids."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def configure(log_format: Literal["auto", "console", "json"] = "auto", level: str = "info") -> None:
    """Choose the output: `auto` is the journal under systemd, else readable lines on standard error."""
    set_level(level)
    processors: list[Any] = [
        _drop_below_threshold,
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    journal = _journal_sender() if log_format == "auto" else None
    if journal:
        processors += [journal]
    elif log_format == "json":
        processors += [stamp, structlog.processors.JSONRenderer(default=str)]
    else:
        processors += [stamp, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *processors],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _drop_below_threshold(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if LEVELS.get(method, LEVELS["error"]) < _threshold:
        raise structlog.DropEvent
    return event


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: "[redacted]" if is_secret(key) else _redact_value(value) for key, value in event.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: "[redacted]" if is_secret(str(k)) else _redact_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact_value(item) for item in value]
    if isinstance(value, (int, float, bool, type(None))):
        return value
    return redact(str(value))


def _journal_sender() -> Any:
    """A final processor that writes structured journal entries; None where no journal reads our standard error."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    stat = os.fstat(sys.stderr.fileno())
    if stream != f"{stat.st_dev}:{stat.st_ino}":
        return None
    try:
        from systemd import journal
    except ImportError:
        return None
    priorities = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

    def send(_: Any, method: str, event: MutableMapping[str, Any]) -> str:
        fields = {re.sub(r"[^A-Z0-9_]", "_", key.upper()).lstrip("_"): str(value) for key, value in event.items()}
        text = fields.pop("EVENT", "")
        shown = " ".join(f"{k.lower()}={v}" for k, v in fields.items() if k not in ("COMPONENT", "LEVEL", "EXCEPTION"))
        journal.send(
            f"{event.get('component', 'agent')}: {text} {shown}".rstrip(),
            PRIORITY=str(priorities.get(method, 3)),
            SYSLOG_IDENTIFIER="camera-agent",
            **fields,
        )
        raise structlog.DropEvent

    return send
