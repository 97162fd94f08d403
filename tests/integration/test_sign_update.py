"""scripts/sign-update as an engineer runs it: keys, a job document a camera accepts, and clear errors."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent.updates.manifest import digest_of, parse_envelope, parse_manifest
from agent.updates.trust import load_root, verify
from tests.fakes_updates import archive, member

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sign-update"


def run(*arguments, program=(sys.executable, SCRIPT), **keywords):
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False, **keywords)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "fleet"
    done = run("keys", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def artifact(tmp_path):
    return archive(tmp_path / "app.tar.gz", member("bin/run", b"#!/bin/sh\n", mode=0o755), member("data", b"x" * 500))


def job(keys, artifact, *more, url="https://example.com/app.tar.gz"):
    fixed = ["--target", "pipeline", "--installer", "app", "--name", "pipe", "--version", "1.2", "--counter", "7"]
    return run("job", "--keys", keys, *fixed, "--url", url, *more, artifact)


def test_keys_are_private_and_never_overwritten(keys):
    for name in ("release.key.pem", "emergency.key.pem"):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600
    before = {p.name: p.read_bytes() for p in keys.iterdir()}
    again = run("keys", keys)
    assert again.returncode == 1
    assert "not overwritten" in again.stderr
    assert {p.name: p.read_bytes() for p in keys.iterdir()} == before
    assert load_root(keys, None).version == 1


def test_a_camera_accepts_the_job(keys, artifact):
    done = job(keys, artifact, "--stable-for", "5", "--deadline", "60")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"version", "operation", "target", "manifest", "urls"}
    assert (document["version"], document["operation"], document["target"]) == ("1.0", "update", "pipeline")
    assert document["urls"] == ["https://example.com/app.tar.gz"]
    verified = verify(document["manifest"], load_root(keys, None), 1.8e9)
    manifest = verified.manifest
    assert verified.roles == {"release"}
    assert (manifest.name, manifest.version, manifest.security_counter) == ("pipe", "1.2", 7)
    assert (manifest.gate.stable_for_s, manifest.gate.deadline_s) == (5, 60)
    assert (manifest.sha256, manifest.size) == (digest_of(artifact), artifact.stat().st_size)
    assert manifest.installed_size == 510


def test_a_downgrade_is_signed_by_both(keys, artifact):
    document = json.loads(job(keys, artifact, "--allow-downgrade").stdout)
    verified = verify(document["manifest"], load_root(keys, None), 1.8e9)
    assert verified.roles == {"release", "emergency"}
    assert verified.manifest.allow_downgrade
    emergency = json.loads(job(keys, artifact, "--emergency", "--restart", "none").stdout)
    manifest = parse_manifest(parse_envelope(emergency["manifest"]).payload)
    assert (manifest.allow_downgrade, manifest.restart) == (False, "none")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("s3://fleet/app/1.tar.gz", "${aws:iot:s3-presigned-url:https://s3.amazonaws.com/fleet/app/1.tar.gz}"),
        ("${aws:iot:s3-presigned-url:https://s3.x/b/k}", "${aws:iot:s3-presigned-url:https://s3.x/b/k}"),
        ("http://127.0.0.1:4566/b/k", "http://127.0.0.1:4566/b/k"),
    ],
)
def test_urls(keys, artifact, given, written):
    assert json.loads(job(keys, artifact, url=given).stdout)["urls"] == [written]


def complaint(done):
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("sign-update: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_errors_are_clear(keys, artifact, tmp_path):
    assert "missing" in complaint(job(keys, tmp_path / "missing.tar.gz"))
    assert "root.json" in complaint(job(tmp_path / "nokeys", artifact))
    assert "--url" in complaint(job(keys, artifact, url="ftp://x/y"))
    assert "gate" in complaint(job(keys, artifact, "--stable-for", "900", "--deadline", "9"))
    assert "version" in complaint(job(keys, artifact, "--version", "latest"))
    hostile = archive(tmp_path / "bad.tar.gz", member("../evil", b"x"))
    assert "leaves the slot" in complaint(job(keys, hostile))
    (tmp_path / "zip").write_bytes(b"PK\x03\x04")
    assert "neither" in complaint(job(keys, tmp_path / "zip"))
    others = tmp_path / "others"
    shutil.copytree(keys, others)
    (others / "release.key.pem").unlink()
    assert "release.key.pem" in complaint(job(others, artifact))
    run("keys", tmp_path / "third")
    shutil.copy(tmp_path / "third" / "release.key.pem", others)
    assert "not signed by enough keys" in complaint(job(others, artifact))
    assert run("job").returncode == 2


def test_runs_by_itself_with_the_repositorys_python(tmp_path):
    done = run("keys", tmp_path / "k", program=[SCRIPT], env={"PATH": "/usr/bin:/bin"})
    if not (SCRIPT.parent.parent / ".venv").exists():
        pytest.skip("no .venv in this checkout")
    assert done.returncode == 0, done.stderr


def test_needs_neither_structlog_nor_aiohttp(tmp_path):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['structlog','aiohttp','awscrt','psutil','zstandard'])); import runpy; sys.argv=sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run("keys", tmp_path / "k", program=[sys.executable, "-c", blocked, SCRIPT])
    assert done.returncode == 0, done.stderr
    artifact = archive(tmp_path / "a.tar.gz", member("a", b"x"))
    fixed = [
        "--target",
        "t",
        "--installer",
        "app",
        "--name",
        "n",
        "--version",
        "1",
        "--counter",
        "1",
        "--url",
        "http://x/y",
    ]
    done = run("job", "--keys", tmp_path / "k", *fixed, artifact, program=[sys.executable, "-c", blocked, SCRIPT])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "t"
