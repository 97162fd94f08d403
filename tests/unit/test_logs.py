"""The log: its formats, its level, and that secrets do not get through."""

import json
import os
import subprocess
import sys

import pytest

from agent.logs import redact

SCRIPT = """
from agent import logs
logs.configure({format!r})
log = logs.get_logger("test")
log.debug("hidden")
log.info("download from https://b.s3.amazonaws.com/k?X-Amz-Signature=abc123&X=1", private_key="k3y", nested={{"password": "pw"}})
logs.set_level("debug")
log.debug("shown")
try:
    raise ValueError("https://h/p?X-Amz-Credential=deep")
except ValueError:
    log.exception("broke")
"""


def run(log_format):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(format=log_format)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    ).stderr


def test_json_lines():
    lines = [json.loads(line) for line in run("json").splitlines()]
    assert [line["event"] for line in lines][1:] == ["shown", "broke"]
    assert lines[0]["event"] == "download from https://b.s3.amazonaws.com/k?[redacted]"
    assert lines[0]["component"] == "test"
    assert lines[0]["private_key"] == "[redacted]"
    assert lines[0]["nested"] == {"password": "[redacted]"}


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_secret_and_no_escape_code_gets_through(log_format):
    text = run(log_format)
    for secret in ("abc123", "k3y", "pw", "deep", "\x1b"):
        assert secret not in text
    assert "hidden" not in text
    assert "ValueError" in text


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("see https://h/p?a=b, then", "https://h/p", "a=b"),
        ("http://user:pass@proxy:3128", "proxy:3128", "pass"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY----- after", "after", "MHcC"),
        ("-----BEGIN PRIVATE KEY-----\nMHcC", "", "MHcC"),
        ("id AKIAIOSFODNN7EXAMPLE.", "id", "AKIAIOSFODNN7EXAMPLE"),
    ],
)
def test_redaction(text, kept, gone):
    result = redact(text)
    assert kept in result
    assert gone not in result
