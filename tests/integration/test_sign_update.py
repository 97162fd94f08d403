"""scripts/sign-update as an engineer runs it: keys, roots, manifests and job documents that a camera accepts, and clear errors."""

import base64
import errno
import fcntl
import importlib.util
import json
import os
import pty
import shlex
import shutil
import stat
import subprocess
import sys
import termios
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.errors import AgentError, RefusedError
from agent.updates.manifest import GateTerms, Manifest, digest_of, parse_envelope, parse_manifest
from agent.updates.trust import accept_root, key_id, load_root, parse_root, verify
from scripts.signing import jobs, tokens
from scripts.signing.arguments import parser
from scripts.signing.errors import SigningError
from scripts.signing.keys import write_new
from tests.fakes_updates import archive, manifest, member, root_payload, signed_manifest, signed_root

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
    assert "belongs there" in complaint(job(others, artifact))
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


# From here on the tool runs inside this process, as its own main does after the imports.


def tool(*arguments):
    parsed = parser().parse_args([str(a) for a in arguments])
    assert parsed.run(parsed) == 0


def refused(*arguments):
    """What the tool says when it ends with 1."""
    with pytest.raises((SigningError, AgentError, OSError)) as error:
        tool(*arguments)
    if isinstance(error.value, OSError):
        return f"{error.value.filename}: {error.value.strerror}"
    return str(error.value)


def usage(*arguments):
    with pytest.raises(SystemExit) as end:
        tool(*arguments)
    return end.value.code


def read(path):
    return json.loads(path.read_text())


def terms(artifact, *more, installer="app"):
    named = [] if installer in ("deb", "rauc", "agent") else ["--name", "pipe", "--version", "1.2"]
    return ["--target", "pipeline", "--installer", installer, *named, "--counter", "7", *more, artifact]


def written(folder, artifact, *more, **keywords):
    """The payload of a manifest that the tool writes."""
    path = folder / f"{len(list(folder.iterdir()))}.manifest.json"
    tool("manifest", "-o", path, *terms(artifact, *more, **keywords))
    return json.loads(base64.b64decode(read(path)["payload"]))


def private_bytes(path):
    return serialization.load_pem_private_key(path.read_bytes(), None)


@pytest.fixture
def people(tmp_path):
    """Four engineers, each with a key of their own, and the folder `fleet`: two of three release, one emergency."""
    for name in ("anna", "ben", "cleo", "eve"):
        (tmp_path / name).mkdir()
        tool("key", tmp_path / name / f"{name}.key.pem")
    public = {name: tmp_path / name / f"{name}.pub.pem" for name in ("anna", "ben", "cleo", "eve")}
    release = [part for name in ("anna", "ben", "cleo") for part in ("--release-key", public[name])]
    fleet = tmp_path / "fleet"
    tool("keys", fleet, *release, "--release-threshold", 2, "--emergency-key", public["eve"])
    tool("root", "sign", fleet / "root.json", "--key", tmp_path / "eve" / "eve.key.pem")
    return tmp_path


def own_key(people, name):
    return people / name / f"{name}.key.pem"


# Keys


def test_several_keys_and_thresholds(tmp_path, artifact):
    fleet = tmp_path / "fleet"
    tool("keys", fleet, "--release", 3, "--release-threshold", 2, "--emergency", 2, "--emergency-threshold", 2)
    names = {path.name for path in fleet.iterdir()}
    assert names == {
        *(f"release-{n}.key.pem" for n in (1, 2, 3)),
        *(f"emergency-{n}.key.pem" for n in (1, 2)),
        "root.json",
        "keys.json",
    }
    for name in names - {"root.json"}:
        assert stat.S_IMODE((fleet / name).stat().st_mode) == 0o600
    described = read(fleet / "keys.json")["keys"]
    for keyid, entry in described.items():
        public = private_bytes(fleet / entry["private"]).public_key().public_bytes_raw()
        assert (key_id(public), public.hex()) == (keyid, entry["public"])
        assert entry["name"].startswith(entry["role"])
    root = load_root(fleet, None).document
    assert (root.roles.release.threshold, len(root.roles.release.keyids)) == (2, 3)
    assert (root.roles.emergency.threshold, len(root.roles.emergency.keyids)) == (2, 2)
    path = tmp_path / "m.json"
    tool("manifest", "--keys", fleet, "-o", path, *terms(artifact))
    assert verify(read(path), load_root(fleet, None), 1.8e9).roles == {"release"}
    assert len(read(path)["signatures"]) == 2


def test_an_encrypted_key_needs_its_passphrase(tmp_path, artifact, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple\n")
    fleet = tmp_path / "fleet"
    tool("keys", fleet, "--passphrase-file", secret)
    assert b"ENCRYPTED" in (fleet / "release.key.pem").read_bytes()
    asked = ["job", "--keys", fleet, "--url", "http://x/y", *terms(artifact)]
    assert "--passphrase-file" in refused(*asked)
    (tmp_path / "wrong").write_text("correct horse battery maple")
    assert "passphrase is wrong" in refused(*asked, "--passphrase-file", tmp_path / "wrong")
    tool(*asked, "--passphrase-file", secret)
    monkeypatch.setenv("SIGN_UPDATE_PASSPHRASE", "correct horse battery staple")
    tool(*asked)
    (tmp_path / "empty").write_text("\n")
    assert "empty" in refused(*asked, "--passphrase-file", tmp_path / "empty")


def test_a_short_passphrase_makes_no_keys(tmp_path):
    (tmp_path / "short").write_text("secret")
    assert "needs 12" in refused("keys", tmp_path / "fleet", "--passphrase-file", tmp_path / "short")
    assert "--passphrase-file" in refused("keys", tmp_path / "fleet", "--encrypt")
    assert not (tmp_path / "fleet").exists()


def test_keys_that_can_not_work_leave_nothing(tmp_path):
    fleet = tmp_path / "fleet"
    assert "threshold of 3" in refused("keys", fleet, "--release", 2, "--release-threshold", 3)
    assert "has 0 keys" in refused("keys", fleet, "--emergency", 0)
    assert "1 or more" in refused("keys", fleet, "--expires-days", 0)
    tool("key", tmp_path / "a.key.pem")
    both = ["--release-key", tmp_path / "a.pub.pem", "--emergency-key", tmp_path / "a.key.pem"]
    assert "given twice" in refused("keys", fleet, *both)
    assert list(fleet.iterdir()) == []
    assert usage("keys", fleet, "--release", -1) == 2


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    tool("key", tmp_path / "a.key.pem")
    before = (tmp_path / "a.key.pem").read_bytes()
    (tmp_path / "a.pub.pem").unlink()
    assert "not overwritten" in refused("key", tmp_path / "a.key.pem")
    monkeypatch.setattr("os.link", no_hard_links)
    assert "not overwritten" in refused("key", tmp_path / "a.key.pem")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a.key.pem", b"another")
    assert (tmp_path / "a.key.pem").read_bytes() == before
    tool("key", tmp_path / "b.key.pem")
    assert stat.S_IMODE((tmp_path / "b.key.pem").stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"a.key.pem", "b.key.pem", "b.pub.pem"}


def no_hard_links(*_, **__):
    raise PermissionError(errno.EPERM, "a memory stick has no hard links")


def test_a_folder_of_the_first_version_goes_on_working(tmp_path, artifact):
    fleet = tmp_path / "fleet"
    tool("keys", fleet)
    (fleet / "keys.json").unlink()
    tool("job", "--keys", fleet, "--url", "http://x/y", "--allow-downgrade", *terms(artifact))
    tool("root", "new", "--keys", fleet, "--sign")
    assert load_root(fleet, None).version == 2


def test_wrong_keys_are_named(tmp_path, people):
    rsa_key = rsa.generate_private_key(65537, 2048)
    pem = serialization.Encoding.PEM
    no_cipher = serialization.NoEncryption()
    (tmp_path / "rsa.pem").write_bytes(rsa_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_cipher))
    rsa_public = rsa_key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "rsa.pub").write_bytes(rsa_public)
    (tmp_path / "noise").write_bytes(b"noise")
    root = people / "fleet" / "root.json"
    assert "another kind" in refused("root", "sign", root, "--key", tmp_path / "rsa.pem")
    assert "another kind" in refused("keys", tmp_path / "k", "--release-key", tmp_path / "rsa.pub")
    assert "not a private key" in refused("root", "sign", root, "--key", tmp_path / "noise")
    assert "public key" in refused("root", "sign", root, "--key", people / "eve" / "eve.pub.pem")
    assert "is not there" in refused("root", "sign", root, "--key", tmp_path / "nobody.pem")
    assert "is not in" in refused("root", "sign", root, "--key", "eve")
    for text in ("{", '{"schema": 2}', '{"schema": 1, "keys": {"ab": {}}}', '{"schema": 1, "keys": []}'):
        (people / "fleet" / "keys.json").write_text(text)
        assert "keys.json" in refused("root", "sign", root, "--key", "eve")


# Root documents


def emergency_only(tmp_path, *more):
    fleet = tmp_path / "fleet"
    tool("keys", fleet, *more)
    return fleet


def test_a_rotated_root_is_accepted_by_cameras(tmp_path, artifact, capsys):
    fleet = emergency_only(tmp_path, "--emergency", 2, "--emergency-threshold", 2)
    first = load_root(fleet, None)
    tool("key", tmp_path / "new.key.pem")
    old = first.document.roles.release.keyids[0]
    tool("root", "new", "--keys", fleet, "--add-release", tmp_path / "new.key.pem", "--remove", old[:10])
    second = fleet / "2.root.json"
    assert "never" not in capsys.readouterr().err
    assert read(second)["signatures"] == []
    for number, missing in ((1, "1 more is missing"), (2, "goes into keys_dir")):
        with pytest.raises(RefusedError):
            load_root(fleet, None)
        assert "of 2 signatures" in refused("root", "check", fleet / "root.json", second)
        tool("root", "sign", second, "--key", f"emergency-{number}")
        assert missing in capsys.readouterr().err
    accepted = accept_root(first, parse_root(read(second)))
    assert load_root(fleet, first.source).document == accepted.document
    assert (accepted.version, len(accepted.document.roles.release.keyids)) == (2, 1)
    assert accepted.document.roles.release.keyids != [old]
    tool("root", "check", fleet / "root.json", second)
    assert "will take version 2" in capsys.readouterr().out
    tool("job", "--keys", fleet, "--url", "http://x/y", *terms(artifact))
    signed = json.loads(capsys.readouterr().out)["manifest"]
    assert verify(signed, accepted, 1.8e9).roles == {"release"}
    with pytest.raises(RefusedError):
        verify(signed, first, 1.8e9)


def test_an_emergency_key_is_replaced_only_with_both(tmp_path):
    fleet = emergency_only(tmp_path)
    first = load_root(fleet, None)
    tool("key", tmp_path / "new.key.pem")
    tool("root", "new", "--keys", fleet, "--add-emergency", tmp_path / "new.pub.pem", "--remove", "emergency")
    second = fleet / "2.root.json"
    tool("root", "sign", second, "--key", tmp_path / "new.key.pem")
    with pytest.raises(RefusedError, match="not signed by enough emergency keys of version 1"):
        accept_root(first, parse_root(read(second)))
    assert "version 1" in refused("root", "check", fleet / "root.json", second)
    assert "no emergency key" in refused("root", "sign", second, "--key", "release")
    tool("root", "sign", second, "--key", "emergency")
    assert accept_root(first, parse_root(read(second))).version == 2
    assert "signed already" in refused("root", "sign", second, "--key", "emergency")
    third = tmp_path / "third.json"
    third.write_text((fleet / "root.json").read_text())
    assert "next one only" in refused("root", "check", second, third)


def test_a_root_that_is_signed_elsewhere_needs_the_one_before(tmp_path):
    fleet = emergency_only(tmp_path)
    tool("key", tmp_path / "new.key.pem")
    tool("root", "new", "--keys", fleet, "--add-emergency", tmp_path / "new.key.pem", "--remove", "emergency")
    elsewhere = tmp_path / "stick" / "2.root.json"
    elsewhere.parent.mkdir()
    shutil.copy(fleet / "2.root.json", elsewhere)
    old_key = fleet / "emergency.key.pem"
    assert "--previous" in refused("root", "sign", elsewhere, "--key", old_key)
    assert "is version 2" in refused("root", "sign", elsewhere, "--key", old_key, "--previous", elsewhere)
    tool("root", "sign", elsewhere, "--key", old_key, "--previous", fleet / "root.json")
    tool("root", "sign", elsewhere, "--key", tmp_path / "new.key.pem")
    tool("root", "check", fleet / "root.json", elsewhere)


def test_root_new_asks_for_what_can_work(tmp_path):
    fleet = emergency_only(tmp_path)
    assert "threshold of 2" in refused("root", "new", "--keys", fleet, "--release-threshold", 2)
    assert "has 0 keys" in refused("root", "new", "--keys", fleet, "--remove", "release")
    assert "0 keys of version 1 fit" in refused("root", "new", "--keys", fleet, "--remove", "abcdef")
    again = ["--add-release", fleet / "release.key.pem"]
    assert "already" in refused("root", "new", "--keys", fleet, *again)
    shared = ["--add-release", fleet / "emergency.key.pem"]
    assert "already" in refused("root", "new", "--keys", fleet, *shared)
    assert not (fleet / "2.root.json").exists()
    tool("root", "new", "--keys", fleet)
    assert "is there already" in refused("root", "new", "--keys", fleet)


def test_root_show_says_what_is_wrong(tmp_path, capsys):
    fleet = emergency_only(tmp_path, "--expires-days", 30)

    def shown(name="root.json"):
        tool("root", "show", fleet / name)
        return capsys.readouterr().out

    assert "root version 1" in shown()
    assert "expires in 30 days" in shown() or "expires in 29 days" in shown()
    assert "release: 1 of 1 keys must sign" in shown()
    assert "emergency: good, emergency of version 1" in shown()
    tool("root", "new", "--keys", fleet)
    assert "signed by nobody yet" in shown("2.root.json")
    assert "version 1's emergency: 0 of 1 signature" in shown("2.root.json")
    tool("root", "sign", fleet / "2.root.json", "--key", "emergency")
    assert shown("2.root.json").endswith("complete\n")
    spoilt = read(fleet / "2.root.json")
    spoilt["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    (fleet / "2.root.json").write_text(json.dumps(spoilt))
    assert "does not fit" in shown("2.root.json")
    assert "does not fit" in refused("root", "sign", fleet / "2.root.json", "--key", "emergency")
    (fleet / "2.root.json").rename(fleet / "7.elsewhere")
    assert "root document" in refused("verify", fleet / "root.json", "--root", fleet)
    assert "not valid JSON" in refused("root", "show", fleet / "release.key.pem")
    (fleet / "x.json").write_text("[]")
    assert "not a root document" in refused("root", "show", fleet / "x.json")


def test_a_root_that_can_not_work_is_not_signed(tmp_path):
    tool("key", tmp_path / "a.key.pem")
    shared, unknown, false = root_payload(), root_payload(), root_payload()
    shared["roles"]["release"] = shared["roles"]["emergency"]
    unknown["roles"]["release"]["keyids"] = ["ab" * 32]
    false["keys"]["ab" * 32] = false["keys"].pop(false["roles"]["release"]["keyids"][0])
    for payload, said in (
        (shared, "in both roles"),
        (unknown, "a key that is not there"),
        (false, "not the digest"),
        (root_payload(expires="2030-02-31T00:00:00Z"), "is not a time"),
        ({**root_payload(), "more": 1}, "more: unknown key"),
    ):
        (tmp_path / "root.json").write_text(json.dumps(signed_root(payload)))
        assert said in refused("root", "sign", tmp_path / "root.json", "--key", tmp_path / "a.key.pem")
        assert said in refused("root", "show", tmp_path / "root.json")


def test_an_expired_root_signs_nothing(tmp_path, artifact):
    (tmp_path / "root.json").write_text(json.dumps(signed_root(root_payload(expires="2026-01-01T00:00:00Z"))))
    path = tmp_path / "m.json"
    path.write_text(json.dumps(signed_manifest()))
    assert "root version 1 expired" in refused("verify", path, "--root", tmp_path)
    (tmp_path / "root.json").write_text(json.dumps(signed_root(root_payload())))
    tool("verify", path, "--root", tmp_path)
    path.write_text(json.dumps(signed_manifest(expires="2026-01-01T00:00:01Z")))
    assert "the manifest expired" in refused("verify", path, "--root", tmp_path)
    tool("key", tmp_path / "a.key.pem")
    assert "the manifest expired" in refused("sign", path, "--key", tmp_path / "a.key.pem")


# Manifests


def test_two_of_three_sign_in_turn(people, artifact, capsys):
    root, path = people / "fleet" / "root.json", people / "m.json"
    camera = load_root(people / "fleet", None)
    tool("manifest", "-o", path, *terms(artifact))
    assert read(path)["signatures"] == []
    assert "0 of 2 signatures; 2 more are missing" in refused("verify", path, "--root", root)
    assert "0 of 2" in refused("job", "--manifest", path, "--root", root, "--url", "http://x/y")
    tool("sign", path, "--root", root, "--key", own_key(people, "anna"))
    said = capsys.readouterr().err
    assert "pipe 1.2 for target pipeline" in said
    assert "1 of 2 signatures; 1 more is missing, from" in said
    assert {"ben", "cleo"} <= set(said.replace("(", " ").replace(")", " ").replace(",", " ").split())
    assert "signed already" in refused("sign", path, "--key", own_key(people, "anna"))
    with pytest.raises(RefusedError, match="not signed by enough"):
        verify(read(path), camera, 1.8e9)
    assert "is not in root version 1" in refused("sign", path, "--root", root, "--key", stranger(people))
    tool("sign", path, "--root", root, "--key", own_key(people, "cleo"))
    assert "complete" in capsys.readouterr().err
    assert verify(read(path), camera, 1.8e9).roles == {"release"}
    tool("verify", path, "--root", root, "--artifact", artifact)
    tool("job", "--manifest", path, "--root", root, "--url", "http://x/y", artifact)


def stranger(people):
    tool("key", people / "stranger.key.pem")
    return people / "stranger.key.pem"


def test_a_job_says_whose_signature_is_missing(people, artifact):
    (people / "fleet" / "anna.key.pem").write_bytes(own_key(people, "anna").read_bytes())
    described = read(people / "fleet" / "keys.json")
    for entry in described["keys"].values():
        entry["private"] = f"{entry['name']}.key.pem"
    (people / "fleet" / "keys.json").write_text(json.dumps(described))
    said = refused("job", "--keys", people / "fleet", "--url", "http://x/y", *terms(artifact))
    assert "release: 1 of 2 signatures; 1 more is missing" in said
    assert "ben.key.pem is not there" in said
    assert "`manifest` and `sign`" in said
    path = people / "m.json"
    tool("manifest", "--keys", people / "fleet", "-o", path, *terms(artifact))
    assert len(read(path)["signatures"]) == 1
    assert "nothing was signed" in refused("sign", path, "--keys", people / "fleet")
    tool("sign", path, "--keys", people / "fleet", "--key", own_key(people, "ben"))
    tool("verify", path, "--keys", people / "fleet")


def test_a_downgrade_without_emergency_is_not_complete(people, artifact, capsys):
    root, path = people / "fleet" / "root.json", people / "m.json"
    tool("manifest", "-o", path, "--allow-downgrade", *terms(artifact))
    for name in ("anna", "ben"):
        tool("sign", path, "--root", root, "--key", own_key(people, name))
    assert "not complete yet: emergency: 0 of 1" in capsys.readouterr().err
    assert "allow_downgrade counts with emergency" in refused("verify", path, "--root", root)
    tool("sign", path, "--root", root, "--key", own_key(people, "eve"))
    said = capsys.readouterr()
    assert "REPLACE A NEWER VERSION" in said.err
    tool("verify", path, "--root", root)
    assert "signed by release and emergency" in capsys.readouterr().out


def test_emergency_must_be_there_when_asked_for(keys, artifact, tmp_path):
    fleet = tmp_path / "fleet"
    shutil.copytree(keys, fleet)
    (fleet / "emergency.key.pem").unlink()
    asked = ["job", "--keys", fleet, "--url", "http://x/y", *terms(artifact)]
    tool(*asked)
    assert "emergency: 0 of 1" in refused(*asked, "--emergency")
    assert "emergency.key.pem is not there" in refused(*asked, "--allow-downgrade")


def test_every_key_of_the_manifest_can_be_set(tmp_path, artifact):
    given = "--compatible a --compatible b --requires camera-agent=0.2 --requires os=1 --arch aarch64 --min-capture-ratio 0.5"
    given += " --offline-policy roll_back --restart none --rollback no --allow-downgrade --stable-for 5 --deadline 60"
    given += " --expires 2030-01-01T00:00:00Z --id release-7"
    payload = written(tmp_path, artifact, *given.split())
    assert payload == {
        "schema": 1,
        "id": "release-7",
        "target": "pipeline",
        "installer": "app",
        "name": "pipe",
        "version": "1.2",
        "security_counter": 7,
        "compatible": ["a", "b"],
        "requires": {"camera-agent": "0.2", "os": "1"},
        "arch": "aarch64",
        "size": artifact.stat().st_size,
        "installed_size": 510,
        "sha256": digest_of(artifact),
        "created": payload["created"],
        "expires": "2030-01-01T00:00:00Z",
        "restart": "none",
        "gate": {"stable_for_s": 5, "deadline_s": 60, "min_capture_ratio": 0.5, "offline_policy": "roll_back"},
        "rollback": "no",
        "allow_downgrade": True,
    }
    assert set(payload) == {field.alias or name for name, field in Manifest.model_fields.items()}
    assert set(payload["gate"]) == set(GateTerms.model_fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--version", "latest"], "version: "),
        (["--counter", "-1"], "security_counter: "),
        (["--name", "Pipe Line"], "name: "),
        (["--target", "a b"], "target: "),
        (["--min-capture-ratio", "2"], "min_capture_ratio: "),
        (["--stable-for", "nan"], "NaN"),
        (["--requires", "x"], "--requires x"),
        (["--requires", "x=1", "--requires", "x=2"], "--requires x=2"),
        (["--requires", "x=new"], "requires.x"),
        (["--compatible", "ä"], "compatible"),
        (["--expires-days", "0"], "--expires-days 0"),
        (["--expires-days", "9999999"], "too far away"),
        (["--expires", "2020-01-01T00:00:00Z"], "expires is not after created"),
        (["--expires", "tomorrow"], "expires: "),
        (["--expires", "2030-02-31T00:00:00Z"], "is not a time"),
    ],
)
def test_wrong_values_are_named(tmp_path, artifact, options, said):
    fixed = terms(artifact)
    for option in options[::2]:
        if option in fixed:
            del fixed[fixed.index(option) : fixed.index(option) + 2]
    assert said in refused("manifest", "-o", tmp_path / "m.json", *options, *fixed)
    assert not (tmp_path / "m.json").exists()


def test_wrong_artifacts_are_named(tmp_path, artifact):
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in refused("manifest", *terms(tmp_path / "empty"))
    assert "is not a file" in refused("manifest", *terms(tmp_path))
    assert "No such file" in refused("manifest", *terms(tmp_path / "none"))
    assert usage("manifest", artifact) == 2
    assert usage("manifest", *terms(artifact, installer="floppy")) == 2
    (tmp_path / "m.json").write_text("")
    assert "is there already" in refused("manifest", "-o", tmp_path / "m.json", *terms(artifact))


def test_verify_compares_the_artifact(tmp_path, keys, artifact):
    path = tmp_path / "m.json"
    tool("manifest", "--keys", keys, "-o", path, *terms(artifact))
    tool("verify", path, "--root", keys, "--artifact", artifact)
    other = tmp_path / "other.tar.gz"
    content = bytearray(artifact.read_bytes())
    other.write_bytes(content + b"x")
    assert "bytes" in refused("verify", path, "--root", keys, "--artifact", other)
    content[-1] ^= 1
    other.write_bytes(content)
    assert "another file" in refused("verify", path, "--root", keys, "--artifact", other)
    job_file = tmp_path / "job.json"
    tool("job", "--manifest", path, "--keys", keys, "--url", "http://x/y", "-o", job_file)
    tool("verify", job_file, "--root", keys / "root.json")
    document = read(job_file)
    document["target"] = "other"
    job_file.write_text(json.dumps(document))
    assert "target other" in refused("verify", job_file, "--root", keys / "root.json")
    assert "another file" in refused("job", "--manifest", path, "--keys", keys, "--url", "http://x/y", other)


# Installers


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_package_describes_itself(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr").mkdir()
    (tree / "usr" / "file").write_bytes(b"x" * 3000)

    def package(**changes):
        fields = {"Package": "pipe-deb", "Version": "3.0-1", "Architecture": "arm64", "Installed-Size": "12"} | changes
        lines = [f"{key}: {value}" for key, value in fields.items() if value]
        (tree / "DEBIAN" / "control").write_text("\n".join([*lines, "Maintainer: x", "Description: x", ""]))
        built = tmp_path / "pipe.deb"
        subprocess.run(["dpkg-deb", "--build", "-Znone", tree, built], check=True, capture_output=True)
        return built

    payload = written(tmp_path, package(), installer="deb")
    assert (payload["name"], payload["version"], payload["arch"]) == ("pipe-deb", "3.0-1", "aarch64")
    assert (payload["installed_size"], payload["restart"]) == (12 * 1024, "unit")
    written(tmp_path, package(), "--version", "3.0-1", installer="deb")
    payload = written(tmp_path, package(**{"Version": "1:3", "Installed-Size": ""}), installer="deb")
    assert (payload["version"], payload["installed_size"]) == ("1:3", 3000)
    for options, said in (
        (["--version", "3.0-2"], "--version 3.0-2 differs"),
        (["--arch", "x86_64"], "--arch x86_64 differs"),
    ):
        assert said in refused("manifest", *terms(package(), *options, installer="deb"))
    for changes, said in (
        ({"Installed-Size": "much"}, "is not a number"),
        ({"Architecture": "m68k"}, "is for m68k"),
    ):
        assert said in refused("manifest", *terms(package(**changes), installer="deb"))
    (tmp_path / "no.deb").write_bytes(b"no package")
    assert "not a Debian package" in refused("manifest", *terms(tmp_path / "no.deb", installer="deb"))


def bundle(tmp_path):
    content = tmp_path / "content"
    content.mkdir()
    (content / "rootfs.img").write_bytes(bytes(65536))
    (content / "manifest.raucm").write_text(
        "[update]\ncompatible=cam-x\nversion=3.1\n[bundle]\nformat=plain\n[image.rootfs]\nfilename=rootfs.img\n"
    )
    request = "req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -subj /CN=t -days 2"
    subprocess.run(["openssl", *request.split()], cwd=tmp_path, check=True, capture_output=True)
    command = ["rauc", "bundle", "--cert=cert", "--key=key", "content", "b.raucb"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "b.raucb"


@pytest.mark.skipif(not (shutil.which("rauc") and shutil.which("mksquashfs")), reason="needs rauc and squashfs-tools")
def test_a_bundle_is_compared_with_what_rauc_says(tmp_path, monkeypatch, capsys):
    built = bundle(tmp_path)
    payload = written(tmp_path, built, "--name", "os", installer="rauc")
    assert (payload["version"], payload["restart"], payload["installed_size"]) == ("3.1", "reboot", 65536)
    fixed = terms(built, "--name", "os", installer="rauc")
    assert "3.1" in refused("manifest", "--version", "3.2", *fixed)
    assert "for cam-x" in refused("manifest", "--compatible", "cam-y", *fixed)
    written(tmp_path, built, "--name", "os", "--compatible", "cam-x", installer="rauc")
    assert "needs reboot" in refused("manifest", "--restart", "unit", *fixed)
    assert "--name is needed" in refused("manifest", *terms(built, installer="rauc"))
    (tmp_path / "no.raucb").write_bytes(b"x" * 100)
    assert "not a RAUC bundle" in refused("manifest", *terms(tmp_path / "no.raucb", installer="rauc"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--version is needed" in refused("manifest", *fixed)
    capsys.readouterr()
    written(tmp_path, built, "--name", "os", "--version", "9", installer="rauc")
    assert "not checked" in capsys.readouterr().err


def test_an_agent_has_its_program(tmp_path):
    program = member("./bin/camera-agent", b"#!/bin/sh\n", mode=0o755)
    payload = written(tmp_path, archive(tmp_path / "a.tar.gz", program), "--version", "1", installer="agent")
    assert (payload["name"], payload["restart"], payload["installed_size"]) == ("camera-agent", "unit", 10)
    for made in (member("bin/other", b"x", mode=0o755), member("bin/camera-agent", b"x", mode=0o644)):
        fixed = terms(archive(tmp_path / "b.tar.gz", made), "--version", "1", installer="agent")
        assert "no executable bin/camera-agent" in refused("manifest", *fixed)
    again = terms(tmp_path / "a.tar.gz", "--version", "1", "--restart", "reboot", installer="agent")
    assert "needs unit" in refused("manifest", *again)


# Job documents


def test_the_job_document_is_ready_for_aws(tmp_path, keys, artifact, capsys):
    path = tmp_path / "a job.json"
    urls = ["--url", "s3://bucket/a/b.tar.gz", "--url", "iot-stream:fleet-1/255"]
    tool("job", "--keys", keys, *urls, "-o", path, *terms(artifact))
    text = path.read_bytes()
    assert text.isascii()
    assert len(text) < 32 * 1024
    assert json.loads(text)["urls"][1] == "iot-stream:fleet-1/255"
    upload, stream, create = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  aws ")]
    assert shlex.split(upload) == ["aws", "s3", "cp", str(artifact), "s3://bucket/a/b.tar.gz"]
    given = shlex.split(stream)
    files = json.loads(given[given.index("--files") + 1])
    assert files == [{"fileId": 255, "s3Location": {"bucket": "bucket", "key": "a/b.tar.gz"}}]
    assert f"file://{path}" in shlex.split(create)
    assert "--presigned-url-config" in create
    tool("job", "--keys", keys, "--url", "https://x/y", *terms(artifact))
    assert "--presigned-url-config" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "iot-stream:x/256",
        "iot-stream:x",
        "iot-stream:a b/1",
        "https://",
        "https://x/ä",
        "https://x/a b",
        "s3://b",
        "s3://bucket/a}b",
        "file:///x",
        "${aws:iot:s3-presigned-url:x}",
    ],
)
def test_unusable_urls_are_refused(url):
    with pytest.raises(SigningError, match="--url"):
        jobs.job_url(url)


def test_a_stream_warns_of_what_is_too_large():
    small, large = (Manifest.model_validate(manifest(size=size)) for size in (24_000_000, 24_000_001))
    assert jobs.warnings(small, ["iot-stream:x/1"]) == []
    assert "24000000" in jobs.warnings(large, ["https://x/y", "iot-stream:x/1"])[0]
    assert jobs.warnings(large, ["https://x/y"]) == []
    with pytest.raises(SigningError, match="32768"):
        jobs.job_document(small, signed_manifest(), [f"https://x/{'y' * 32_000}"])


def test_job_usage(keys, artifact, tmp_path):
    url = ["--url", "http://x/y"]
    assert usage("job", "--keys", keys, *url, artifact) == 2
    assert usage("job", "--keys", keys, *terms(artifact)) == 2
    assert usage("job", *url, *terms(artifact)) == 2
    assert usage("job", "--root", keys / "root.json", *url, *terms(artifact)) == 2
    assert usage("job", "--keys", keys, "--manifest", tmp_path / "m", "--version", "1", *url) == 2
    assert usage("sign", tmp_path / "m") == 2
    assert usage("root") == 2
    assert "No such file" in refused("job", "--keys", keys, "--manifest", tmp_path / "m", *url)


# On a terminal


def on_a_terminal(answers, *arguments):
    """Run the tool on a terminal of its own and answer its questions in turn; its status and all that was shown."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
    finally:
        os.close(slave)
    shown, left = b"", list(answers)
    try:
        while block := _shown_by(master):
            shown += block
            if left and shown.rstrip(b" ").endswith(left[0][0]):
                os.write(master, left.pop(0)[1] + b"\n")
        return process.wait(timeout=30), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _shown_by(master):
    try:
        return os.read(master, 4096)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def test_on_a_terminal_it_asks(tmp_path, artifact):
    key, path, secret = tmp_path / "a.key.pem", tmp_path / "m.json", b"correct horse battery"
    differ = [(b"new keys:", secret), (b"again:", b"something else")]
    status, shown = on_a_terminal(differ, "key", key, "--encrypt")
    assert (status, key.exists()) == (1, False)
    assert "differ" in shown
    status, shown = on_a_terminal([(b"new keys:", secret), (b"again:", secret)], "key", key, "--encrypt")
    assert (status, secret.decode() in shown) == (0, False)
    tool("manifest", "-o", path, *terms(artifact))
    status, shown = on_a_terminal([(b"[y/N]", b"n")], "sign", path, "--key", key)
    assert (status, read(path)["signatures"]) == (1, [])
    assert "pipe 1.2 for target pipeline" in shown
    yes = [(b"[y/N]", b"y"), (f"{key}:".encode(), secret)]
    status, shown = on_a_terminal(yes, "sign", path, "--key", key)
    assert (status, len(read(path)["signatures"])) == (0, 1), shown


# PKCS#11

LIBRARY = Path("/usr/lib/softhsm/libsofthsm2.so")
needs_softhsm = pytest.mark.skipif(
    not (
        LIBRARY.exists()
        and shutil.which("softhsm2-util")
        and shutil.which("pkcs11-tool")
        and importlib.util.find_spec("pkcs11")
    ),
    reason="needs softhsm2, opensc and the library python-pkcs11",
)


@pytest.fixture
def token(tmp_path):
    """A SoftHSM token `fleet hsm` with the Ed25519 keys release and emergency; gives its environment."""
    (tmp_path / "tokens").mkdir()
    settings = tmp_path / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {tmp_path}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    (tmp_path / "pin").write_text("1234\n")
    environment = {**os.environ, "SOFTHSM2_CONF": str(settings)}

    def quietly(*command):
        subprocess.run(command, env=environment, check=True, capture_output=True)

    new = ["--init-token", "--free", "--pin", "1234", "--so-pin", "5678"]
    quietly("softhsm2-util", *new, "--label", "fleet hsm")
    quietly("softhsm2-util", *new, "--label", "other")
    login = ["pkcs11-tool", "--module", LIBRARY, "--token-label", "fleet hsm", "--login", "--pin", "1234"]
    for number, kind, label in (
        ("01", "EC:edwards25519", "release"),
        ("02", "EC:edwards25519", "emergency"),
        ("03", "EC:edwards25519", "twice"),
        ("04", "EC:edwards25519", "twice"),
        ("05", "EC:prime256v1", "nist"),
    ):
        quietly(*login, "--keypairgen", "--key-type", kind, "--label", label, "--id", number)
    return environment


def uri(label, token="fleet%20hsm"):
    return f"pkcs11:token={token};object={label}"


@needs_softhsm
def test_keys_in_a_token(tmp_path, token, artifact):
    fleet, path = tmp_path / "fleet", tmp_path / "m.json"
    with_pin = ["--pin-file", tmp_path / "pin"]
    roles = ["--release-key", uri("release"), "--emergency-key", uri("emergency"), "--module", LIBRARY]

    def ran(*arguments, status=0):
        done = run(*arguments, env=token)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    ran("keys", fleet, *roles, *with_pin)
    assert {p.name for p in fleet.iterdir()} == {"root.json", "keys.json"}
    assert "1234" not in (fleet / "keys.json").read_text()
    root = load_root(fleet, None)
    signed = run("job", "--keys", fleet, "--url", "http://x/y", *with_pin, "--emergency", *terms(artifact), env=token)
    assert verify(json.loads(signed.stdout)["manifest"], root, 1.8e9).roles == {"release", "emergency"}
    ran("root", "new", "--keys", fleet, "--sign", *with_pin)
    assert load_root(fleet, None).version == 2
    ran("manifest", "-o", path, *terms(artifact))
    direct = ["sign", path, "--module", LIBRARY, *with_pin, "--key"]
    ran(*direct, "pkcs11:token=fleet%20hsm;id=%01")
    assert verify(read(path), root, 1.8e9).roles == {"release"}
    (tmp_path / "wrong").write_text("4321")
    by_name = ["job", "--keys", fleet, "--url", "http://x/y", *terms(artifact)]
    assert "PIN of token fleet hsm is wrong" in ran(*by_name, "--pin-file", tmp_path / "wrong", status=1)
    assert "--pin-file" in ran(*by_name, status=1)
    for key, said in (
        (uri("release", "nowhere"), "token nowhere is not there"),
        (uri("nobody"), "no Ed25519 public key nobody"),
        (uri("nist"), "no Ed25519 public key nist"),
        (uri("twice"), "2 keys twice"),
    ):
        assert said in ran(*direct, key, status=1)


@needs_softhsm
def test_what_a_token_signs_is_checked(tmp_path, token, artifact):
    """A token whose private key has another key's public half beside it signs nothing that is kept."""
    login = ["pkcs11-tool", "--module", LIBRARY, "--token-label", "fleet hsm", "--login", "--pin", "1234"]
    for command in (
        ["--delete-object", "--type", "pubkey", "--id", "01"],
        ["--read-object", "--type", "pubkey", "--id", "02", "--output-file", str(tmp_path / "public")],
    ):
        subprocess.run([*login, *command], env=token, check=True, capture_output=True)
    made = "import pkcs11; from cryptography.hazmat.primitives.serialization import load_pem_public_key as load\n"
    made += "from pkcs11 import Attribute as A, ObjectClass as O, KeyType as K\n"
    made += f"raw = load(open({str(tmp_path / 'public')!r}, 'rb').read()).public_bytes_raw()\n"
    made += f"token = pkcs11.lib({str(LIBRARY)!r}).get_token(token_label='fleet hsm')\n"
    made += "with token.open(rw=True, user_pin='1234') as s:\n"
    made += "    s.create_object({A.CLASS: O.PUBLIC_KEY, A.KEY_TYPE: K.EC_EDWARDS, A.TOKEN: True, A.LABEL: 'release', "
    made += "A.ID: b'\\x01', A.EC_PARAMS: bytes.fromhex('130c656477617264733235353139'), A.EC_POINT: b'\\x04\\x20' + raw})\n"
    subprocess.run([sys.executable, "-c", made], env=token, check=True)
    path = tmp_path / "m.json"
    tool("manifest", "-o", path, *terms(artifact))
    asked = ["sign", path, "--module", LIBRARY, "--pin-file", tmp_path / "pin", "--key", uri("release")]
    done = run(*asked, env=token)
    assert done.returncode == 1
    assert "signed with another key" in done.stderr
    assert read(path)["signatures"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pkcs11:token=a", "names no key"),
        ("pkcs11:token=a;object=b?pin-value=1234", "a PIN does not belong"),
        ("pkcs11:token=a;object=b;colour=red", "'colour=red' is not understood"),
        ("pkcs11:token=a;token=b;object=c", "not understood"),
        ("pkcs11:object=b;type=cert", "of type cert"),
    ],
)
def test_wrong_uris_are_named(text, said):
    with pytest.raises(SigningError, match=said):
        tokens.parse_uri(text)


def test_a_uri_is_taken_apart():
    key = tokens.parse_uri("pkcs11:token=a%20b;id=%01%ff;type=private?module-path=/x&pin-source=file:/p")
    assert (key.token, key.key_id, key.module, key.pin_source) == ("a b", b"\x01\xff", "/x", Path("/p"))
    assert tokens.with_module("pkcs11:object=a", "/x y") == "pkcs11:object=a?module-path=/x%20y"
    assert tokens.parse_uri(tokens.with_module("pkcs11:object=a", "/x y")).module == "/x y"
    assert tokens.parse_uri("pkcs11:object=a", "/z").module == "/z"


def test_a_token_without_its_library_is_named(tmp_path, keys, monkeypatch):
    path, asked = tmp_path / "m.json", ["--key", "pkcs11:object=a"]
    path.write_text(json.dumps(signed_manifest()))
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    assert "pip install python-pkcs11" in refused("sign", path, *asked)
    monkeypatch.setitem(sys.modules, "pkcs11", ModuleType("pkcs11"))
    sys.modules["pkcs11"].PinIncorrect = sys.modules["pkcs11"].PKCS11Error = RuntimeError
    assert "Give --module" in refused("sign", path, *asked)
    assert "nowhere.so is not there" in refused("sign", path, *asked, "--module", "/nowhere.so")


# Not one bit may differ


def accepted_flips(document, accepts, expected):
    """Flip every bit of the JSON text in turn: how many were tried, and how many were accepted; these must mean the same."""
    text = json.dumps(document, indent=2).encode()
    accepted = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            meant = accepts(json.loads(bytes(flipped)))
        except (AgentError, ValueError):
            continue
        assert meant == expected, f"bit {bit} changes what is signed"
        accepted += 1
    return 8 * len(text), accepted


def test_no_flipped_bit_of_an_envelope_is_accepted(tmp_path, keys, people, artifact):
    tried = 0
    root = load_root(keys, None)
    tool("manifest", "--keys", keys, "-o", tmp_path / "one.json", *terms(artifact))
    two, fleet = tmp_path / "two.json", load_root(people / "fleet", None)
    tool("manifest", "-o", two, *terms(artifact))
    for name in ("anna", "ben"):
        tool("sign", two, "--key", own_key(people, name))
    for path, trusted in ((tmp_path / "one.json", root), (two, fleet)):
        meant = verify(read(path), trusted, 1.8e9)
        flips, accepted = accepted_flips(read(path), lambda text, by=trusted: verify(text, by, 1.8e9), meant)
        assert accepted == 0
        tried += flips
    flips, accepted = accepted_flips(root.source, lambda text: parse_root(text).document, root.document)
    assert accepted == 0
    tried += flips
    print(f"{tried} envelopes with one bit flipped tried, 0 accepted")
    assert tried > 20_000


def test_a_signature_too_many_changes_nothing(tmp_path, people, artifact):
    """With three signatures where two are enough, a keyid may be spoilt; the meaning stays the same."""
    path, root = tmp_path / "three.json", load_root(people / "fleet", None)
    tool("manifest", "-o", path, *terms(artifact))
    for name in ("anna", "ben", "cleo"):
        tool("sign", path, "--key", own_key(people, name))
    meant = verify(read(path), root, 1.8e9)
    tried, accepted = accepted_flips(read(path), lambda text: verify(text, root, 1.8e9), meant)
    print(
        f"{tried} envelopes with a signature too many and one bit flipped tried, {accepted} accepted with the same meaning"
    )
    assert 0 < accepted <= 3 * 64 * 8


# The page for engineers


def commands_of_the_page():
    page = (SCRIPT.parents[1] / "docs" / "signing.md").read_text()
    return [line for block in page.split("```sh\n")[1:] for line in block.partition("```")[0].splitlines()]


@needs_softhsm
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_every_command_of_the_page_works(tmp_path, monkeypatch, capsys):
    """In one folder, in the order of docs/signing.md; the tool in this process, the rest as written."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("SIGN_UPDATE_PASSPHRASE", "correct horse battery staple")
    monkeypatch.setenv("SIGN_UPDATE_PIN", "123456")
    for version in ("1.9", "2.0", "2.1"):
        archive(tmp_path / f"pipeline-{version}.tar.gz", member("bin/run", version.encode()))
    count = 0
    for line in commands_of_the_page():
        program, *arguments = shlex.split(line)
        if program == "sign-update":
            tool(*arguments)
        else:
            subprocess.run([program, *arguments], check=True, capture_output=True)
        count += 1
    capsys.readouterr()
    print(f"{count} commands of docs/signing.md tried")
    assert load_root(tmp_path / "team", None).version == 3
    assert len(read(tmp_path / "pipeline-2.1.json")["signatures"]) == 3
    downgrade = verify(read(tmp_path / "job-1.9.json")["manifest"], load_root(tmp_path / "fleet", None), 1.8e9)
    assert downgrade.manifest.allow_downgrade
    assert "emergency" in downgrade.roles
