"""Certificates and keys on disk: reading, making, and switching so that every interruption leaves a complete pair."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.cloud import identity
from agent.errors import CloudError
from agent.settings import Cloud, Paths, Settings
from tests.certificates import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def settings_in(folder: Path, **changes) -> Settings:
    return Settings(paths=Paths(state_dir=folder), **changes)


def new_pair(authority: Authority, name: str) -> tuple[bytes, bytes]:
    key, request = identity.make_key_and_request(name)
    return authority.sign(request.decode()).encode(), key


def keep(settings: Settings, authority: Authority, thing: str) -> bytes:
    certificate, key = new_pair(authority, thing)
    generation = identity.stage(settings.certificate_file, key)
    identity.switch(generation, certificate, thing, settings.certificate_file, settings.private_key_file)
    return certificate


def test_the_facts_of_a_certificate(authority):
    pair = authority.client("cam-7", days=10)
    facts = identity.read_certificate(pair.certificate_file)
    assert facts.common_name == "cam-7"
    assert facts.not_before < time.time() < facts.not_after < time.time() + 11 * 86400
    certificate = x509.load_pem_x509_certificate(pair.certificate_file.read_bytes())
    from hashlib import sha256

    assert facts.id == sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    assert identity.certificate_id(pair.certificate_file.read_bytes()) == facts.id
    assert identity.certificate_id(pair.certificate_file.read_bytes().replace(b"\n", b"\r\n")) == facts.id


@pytest.mark.parametrize(
    "pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----"], ids=["empty", "text", "broken"]
)
def test_what_is_no_certificate_raises(pem, tmp_path):
    for read in (identity.certificate_id, identity.parse_certificate):
        with pytest.raises(CloudError) as caught:
            read(pem)
        assert caught.value.code == "certificate"
    with pytest.raises(CloudError, match="none"):
        identity.read_certificate(tmp_path / "none")


def test_keys_match_only_their_certificate(authority):
    one, two = new_pair(authority, "one"), new_pair(authority, "two")
    assert identity.key_matches(*one)
    assert not identity.key_matches(one[0], two[1])
    assert not identity.key_matches(one[0], b"no key")
    assert not identity.key_matches(b"no certificate", one[1])


def test_a_request_names_the_camera_and_is_short_enough():
    key, request = identity.make_key_and_request("c" * 200)
    parsed = x509.load_pem_x509_csr(request)
    assert parsed.is_signature_valid
    assert parsed.public_key().curve.name == "secp256r1"
    assert len(request) <= 4096
    assert b"PRIVATE KEY" in key


def test_a_new_identity_is_kept_private_and_found_again(authority, tmp_path):
    settings = settings_in(tmp_path)
    assert not identity.exists(settings)
    certificate = keep(settings, authority, "cam-9")
    assert identity.exists(settings)
    assert settings.certificate_file.read_bytes() == certificate
    assert settings.private_key_file.stat().st_mode & 0o777 == 0o600
    assert identity.key_matches(certificate, settings.private_key_file.read_bytes())
    kept = json.loads((tmp_path / "identity" / "thing.json").read_text())
    assert kept["thing_name"] == identity.thing_name(settings) == "cam-9"
    assert kept["certificate_id"] == identity.certificate_id(certificate)


def test_the_generation_before_is_kept_and_older_ones_are_not(authority, tmp_path):
    settings = settings_in(tmp_path)
    for number in range(4):
        keep(settings, authority, f"cam-{number}")
    assert identity.thing_name(settings) == "cam-3"
    assert len(list((tmp_path / "identity").glob("generation-*"))) == 2


def test_a_certificate_for_another_key_changes_nothing(authority, tmp_path):
    settings = settings_in(tmp_path)
    certificate = keep(settings, authority, "cam-1")
    generation = identity.stage(settings.certificate_file, new_pair(authority, "x")[1])
    with pytest.raises(CloudError):
        identity.switch(
            generation, new_pair(authority, "x")[0], "x", settings.certificate_file, settings.private_key_file
        )
    identity.discard(generation)
    assert settings.certificate_file.read_bytes() == certificate
    assert identity.thing_name(settings) == "cam-1"


def test_the_thing_name_comes_from_settings_then_provisioning_then_the_certificate(authority, tmp_path):
    pair = authority.client("from-certificate")
    by_hand = settings_in(
        tmp_path, cloud=Cloud(certificate_file=pair.certificate_file, private_key_file=pair.private_key_file)
    )
    assert identity.thing_name(by_hand) == "from-certificate"
    assert identity.thing_name(by_hand.model_copy(update={"thing_name": "set"})) == "set"
    odd = authority.client("AWS IoT Certificate")
    with pytest.raises(CloudError) as caught:
        identity.thing_name(settings_in(tmp_path, cloud=Cloud(certificate_file=odd.certificate_file)))
    assert caught.value.code == "thing_name_unknown"


class PowerCutError(BaseException):
    pass


@pytest.mark.parametrize("before", ["nothing", "generation", "plain files", "separate folders"])
def test_a_power_cut_at_any_step_leaves_one_complete_pair(before, authority, tmp_path, monkeypatch):
    """Cut before the first, second, … change of the file system, and look at what a restart would find."""
    step = 0
    while True:
        folder = tmp_path / str(step)
        settings = prepare(before, folder, authority)
        old = settings.certificate_file.read_bytes() if before != "nothing" else None
        new, key = new_pair(authority, "new")
        with monkeypatch.context() as patch:
            cut_before(patch, step)
            try:
                generation = identity.stage(settings.certificate_file, key)
                identity.switch(generation, new, "new", settings.certificate_file, settings.private_key_file)
                finished = True
            except PowerCutError:
                finished = False
        if finished:
            assert settings.certificate_file.read_bytes() == new
        if identity.exists(settings):
            certificate = settings.certificate_file.read_bytes()
            assert certificate in (old, new)
            assert identity.key_matches(certificate, settings.private_key_file.read_bytes())
            if certificate == new:
                assert identity.thing_name(settings) == "new"
        else:
            assert before == "nothing"
        keep(settings, authority, "after")
        assert identity.thing_name(settings) == "after"
        if finished:
            break
        step += 1
    assert step > 8


def prepare(before: str, folder: Path, authority: Authority) -> Settings:
    settings = settings_in(folder)
    if before == "separate folders":
        cloud = Cloud(
            certificate_file=folder / "certs" / "device.pem", private_key_file=folder / "private" / "device.key"
        )
        settings = settings_in(folder, cloud=cloud)
    if before == "generation":
        keep(settings, authority, "old")
    elif before != "nothing":
        certificate, key = new_pair(authority, "old")
        for path, data in ((settings.certificate_file, certificate), (settings.private_key_file, key)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return settings


def cut_before(patch: pytest.MonkeyPatch, step: int) -> None:
    count = 0

    def cutting(real):
        def call(*args, **kwargs):
            nonlocal count
            if count == step:
                raise PowerCutError
            count += 1
            return real(*args, **kwargs)

        return call

    for name in ("rename", "symlink_to", "mkdir", "unlink"):
        patch.setattr(Path, name, cutting(getattr(Path, name)))
    real_open = os.open
    opener = cutting(real_open)
    patch.setattr(
        os,
        "open",
        lambda path, flags, *rest, **named: (opener if flags & os.O_CREAT else real_open)(path, flags, *rest, **named),
    )


def test_pairs_made_by_tests_are_pairs(authority):
    pair: Pair = authority.client("check")
    assert identity.key_matches(pair.certificate_file.read_bytes(), pair.private_key_file.read_bytes())
