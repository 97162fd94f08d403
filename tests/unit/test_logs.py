"""The log: its formats, its level, and that secrets do not get through."""

import json
import os
import subprocess
import sys

import pytest

from agent.logs import is_secret, redact
from agent.settings import Settings

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
        ("http://[user:pass@proxy:3128", "proxy:3128", "pass"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY----- after", "after", "MHcC"),
        ("-----BEGIN PRIVATE KEY-----\nMHcC", "", "MHcC"),
        ("id AKIAIOSFODNN7EXAMPLE.", "id", "AKIAIOSFODNN7EXAMPLE"),
    ],
)
def test_redaction(text, kept, gone):
    result = redact(text)
    assert kept in result
    assert gone not in result


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "passwd",
        "wifi_password",
        "wifiPassword",
        "PASSWORD",
        "password2",
        "admin_passwords",
        "psk",
        "wifi_psk",
        "wifiPsk",
        "WIFI_PSK",
        "psk2",
        "passphrase",
        "pass",
        "rtsp_pass",
        "rtspPass",
        "pwd",
        "api_key",
        "apikey",
        "apiKey",
        "API-KEY",
        "X-API-Key",
        "secret",
        "client_secret",
        "secret_access_key",
        "secretKey",
        "token",
        "auth_token",
        "authToken",
        "accessToken",
        "bearer-token",
        "tokens",
        "private_key",
        "privateKey",
        "credentials",
        "Authorization",
    ],
)
def test_what_a_secret_is_called(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "keyid",
        "key_id",
        "keys_dir",
        "key",
        "private_key_file",
        "claim_private_key_file",
        "credentials_file",
        "privateKeyFile",
        "clientToken",
        "client_token",
        "token_count",
        "token_ttl_s",
        "password_max_age_s",
        "access_key_id",
        "secret_id",
        "compass",
        "bypass",
        "passed",
        "passes",
        "tokenizer",
        "key_frames",
        "author",
    ],
)
def test_what_no_secret_is_called(key):
    assert not is_secret(key)


def field_names(model, path=()):
    for name, field in model.model_fields.items():
        yield (*path, name), field
        below = field.annotation
        if isinstance(below, type) and hasattr(below, "model_fields"):
            yield from field_names(below, (*path, name))


def test_no_key_of_the_agents_own_settings_and_no_description_is_redacted():
    fields = dict(field_names(Settings))
    assert len(fields) > 50
    assert ("cloud", "proxy_url") in fields
    for path, field in fields.items():
        assert not is_secret(path[-1]), path
        assert redact(field.description or "") == (field.description or ""), path
