"""Doctor's checks on made cameras: the runner names root causes only, and each check tells good from bad."""

from __future__ import annotations

import ast
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.health.probes import (
    Check,
    Finding,
    Site,
    UnknownCheckError,
    list_checks,
    local,
    model,
    network,
    run_checks,
    runner,
)
from agent.health.probes.certificates import validity
from agent.health.probes.model import Outcome
from agent.settings import Settings

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PASS = Outcome("pass", "fine")
FAIL = Outcome("fail", "broken", "it is broken", "mend it")
# The earliest time a certificate can hold; Hypothesis wants bounds without a zone.
FIRST = datetime.fromtimestamp(0, UTC).replace(year=1950, tzinfo=None)
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(begin: datetime, end: datetime, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cam-0412")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(2**120)
        .not_valid_before(begin)
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM).decode()


def private_key(key: ec.EllipticCurvePrivateKey = KEY) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A healthy camera without a network: everything below one folder."""
    (tmp_path / "state/identity").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "state/identity/certificate.pem").write_text(
        certificate(NOW - timedelta(days=30), NOW + timedelta(days=300))
    )
    key = tmp_path / "state/identity/private-key.pem"
    key.write_text(private_key())
    key.chmod(0o600)
    config = tmp_path / "agent.toml"
    config.write_text(
        f"""
        [cloud]
        endpoint = "localhost"
        [paths]
        state_dir = "{tmp_path}/state"
        runtime_dir = "{tmp_path}/run"
        [capture.sources.front]
        directory = "{tmp_path}/images"
        """
    )
    made = {
        "proc/net/route": "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n",
        "sys/class/net/lo/operstate": "unknown\n",
        "sys/class/net/eth0/operstate": "up\n",
        "sys/class/net/eth0/carrier": "1\n",
    }
    for name, text in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Site(
        config,
        proc=tmp_path / "proc",
        sys=tmp_path / "sys",
        now=NOW.timestamp,
        clock_synchronised=lambda: True,
    )


def of(findings: list[Finding]) -> dict[str, str]:
    return {finding.code: finding.status for finding in findings}


def edit(site: Site, old: str, new: str) -> None:
    site.config_path.write_text(site.config_path.read_text().replace(old, new))


# ---- the runner


def check(code: str, outcome: Outcome | Callable[[Site], Outcome], *depends_on: str, limit_s: float = 5) -> Check:
    run = outcome if callable(outcome) else lambda _: outcome
    return Check(code, code, "critical", run, depends_on, limit_s)


def test_only_root_causes_fail() -> None:
    checks = [
        check("power", FAIL),
        check("lamp", FAIL, "power"),
        check("light", FAIL, "lamp"),
        check("door", PASS),
        check("room", FAIL, "door", "light"),
    ]
    findings = run_checks(Path("/nowhere"), checks=checks)
    assert [(f.code, f.status, f.because) for f in findings] == [
        ("power", "fail", ""),
        ("lamp", "skip", "power"),
        ("light", "skip", "power"),
        ("door", "pass", ""),
        ("room", "skip", "power"),
    ]
    assert findings[0].as_dict() == {
        "code": "power",
        "title": "power",
        "severity": "critical",
        "status": "fail",
        "seen": "broken",
        "meaning": "it is broken",
        "remedy": "mend it",
        "because": "",
    }


def test_a_warning_or_a_skip_of_its_own_hides_nothing() -> None:
    checks = [check("a", Outcome("warn", "hm")), check("b", Outcome("skip", "n/a")), check("c", FAIL, "a", "b")]
    assert of(run_checks(Path("/nowhere"), checks=checks)) == {"a": "warn", "b": "skip", "c": "fail"}


def test_only_some_with_what_explains_them() -> None:
    checks = [check("a", PASS), check("b", FAIL, "a"), check("c", PASS, "b"), check("d", FAIL)]
    findings = run_checks(Path("/nowhere"), only=["c"], checks=checks)
    assert of(findings) == {"b": "fail", "c": "skip"}
    with pytest.raises(UnknownCheckError, match="no such check: x"):
        run_checks(Path("/nowhere"), only=["x"], checks=checks)


def test_checks_run_side_by_side() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def meet(_: Site) -> Outcome:
        meeting.wait()
        return PASS

    assert set(of(run_checks(Path("/nowhere"), checks=[check(c, meet) for c in "abc"])).values()) == {"pass"}


def test_a_hanging_check_is_given_up() -> None:
    end = threading.Event()

    def hang(_: Site) -> Outcome:
        end.wait(60)
        return PASS

    findings = run_checks(Path("/nowhere"), checks=[check("a", hang, limit_s=0.1), check("b", PASS, "a")])
    end.set()
    assert of(findings) == {"a": "fail", "b": "skip"}
    assert findings[0].seen == "no answer within 0.1 s"


def test_the_whole_run_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "DEADLINE_S", 0.3)
    end = threading.Event()

    def hang(_: Site) -> Outcome:
        end.wait(60)
        return PASS

    started = time.monotonic()
    findings = run_checks(Path("/nowhere"), checks=[check(c, hang) for c in "abcdef"])
    end.set()
    assert set(of(findings).values()) == {"fail"}
    assert time.monotonic() - started < 5


def test_a_bug_in_a_check_is_a_warning() -> None:
    def broken(_: Site) -> Outcome:
        raise ZeroDivisionError("division by zero")

    (finding,) = run_checks(Path("/nowhere"), checks=[check("a", broken)])
    assert finding.status == "warn"
    assert "ZeroDivisionError" in finding.seen


def test_the_table_is_in_order() -> None:
    from agent.health.probes.table import CHECKS

    seen: set[str] = set()
    for entry in CHECKS:
        assert set(entry.depends_on) <= seen, entry.code
        assert entry.run.__doc__
        seen.add(entry.code)
    assert list(list_checks()) == [entry.code for entry in CHECKS]
    assert sum(sorted(entry.limit_s for entry in CHECKS)[-3:]) <= 10


def test_probes_import_the_standard_library_only() -> None:
    for file in Path(runner.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("agent.health.probes") or name.split(".")[0] in sys.stdlib_module_names, name


def test_defaults_are_those_of_the_settings() -> None:
    settings = Settings()
    assert settings.cloud.port == model.DEFAULT_PORT
    assert str(settings.cloud.ca_file) == model.DEFAULT_CA_FILE
    assert str(settings.paths.state_dir) == model.DEFAULT_STATE_DIR
    assert str(settings.paths.runtime_dir) == model.DEFAULT_RUNTIME_DIR
    empty = Path("/dev/null")
    site = Site(empty)
    assert (site.certificate_file, site.private_key_file) == (settings.certificate_file, settings.private_key_file)


# ---- certificates


@settings(max_examples=50, deadline=None)
@given(
    st.datetimes(FIRST, FIRST + timedelta(days=90 * 365)),
    st.timedeltas(timedelta(seconds=1), timedelta(days=200 * 365)),
)
def test_validity_is_what_was_written(begin: datetime, span: timedelta) -> None:
    begin = begin.replace(microsecond=0, tzinfo=UTC)
    end = (begin + span).replace(microsecond=0)
    if end == begin:
        end += timedelta(seconds=1)
    assert validity(certificate(begin, end)) == (begin.timestamp(), end.timestamp())


@given(st.binary(max_size=300))
def test_garbage_is_no_certificate(data: bytes) -> None:
    import base64

    with pytest.raises(ValueError):
        validity(f"-----BEGIN CERTIFICATE-----\n{base64.b64encode(data).decode()}\n-----END CERTIFICATE-----")


@given(st.integers(0, 400))
def test_a_truncated_certificate(length: int) -> None:
    with pytest.raises(ValueError):
        validity(certificate(NOW, NOW + timedelta(days=1))[:length])


# ---- each check, good and bad


def test_config(site: Site) -> None:
    assert local.check_config(site).status == "pass"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[cloud]", "[cloud", "not valid TOML"),
        ('endpoint = "localhost"', "endpoint = 5", "cloud.endpoint is not a text"),
        ('endpoint = "localhost"', 'endpoint = "localhost"\nport = "8883"', "cloud.port is not a whole number"),
        ("directory =", "folder =", "capture.sources.front.directory is missing"),
    ],
)
def test_bad_config(site: Site, old: str, new: str, words: str) -> None:
    edit(site, old, new)
    findings = run_checks(site.config_path, site=site)
    assert of(findings)["config"] == "fail"
    assert words in findings[0].seen
    assert findings[0].remedy == f"camera-agent check-config {site.config_path}"
    assert [f.code for f in findings if f.status == "fail"] == ["config"]


def test_missing_config(tmp_path: Path) -> None:
    (finding,) = run_checks(tmp_path / "agent.toml", only=["config"])
    assert finding.seen == f"{tmp_path}/agent.toml: no such file"


def test_no_endpoint_is_a_warning(site: Site) -> None:
    edit(site, "localhost", "")
    assert local.check_config(site).status == "warn"
    assert network.check_dns(site).status == network.check_tls(site).status == "skip"


def test_clock(site: Site) -> None:
    assert local.check_clock(site).status == "pass"
    assert local.check_clock(replace(site, clock_synchronised=lambda: None)).status == "pass"
    assert local.check_clock(replace(site, clock_synchronised=lambda: False)).status == "warn"
    assert local.check_clock(replace(site, now=lambda: 86400.0)).status == "fail"
    assert local.check_clock(replace(site, now=lambda: 4e9)).status == "fail"
    early = local.check_clock(replace(site, now=lambda: (NOW - timedelta(days=60)).timestamp()))
    assert early.status == "fail"
    assert "earlier than this camera's certificate" in early.seen


def test_a_wrong_clock_is_named_and_not_the_certificate(site: Site) -> None:
    findings = run_checks(site.config_path, ["certificate", "key"], site=replace(site, now=lambda: 0.0))
    assert [f.code for f in findings if f.status == "fail"] == ["clock"]


def test_the_kernel_says_whether_it_follows_ntp() -> None:
    from agent.host.clock import clock_synchronised

    assert local._kernel_clock_synchronised() == clock_synchronised()


def test_identity(site: Site) -> None:
    assert local.check_identity(site).status == "pass"
    site.private_key_file.chmod(0o640)
    assert local.check_identity(site).status == "warn"
    site.private_key_file.write_text("nothing")
    assert "no PEM private key" in local.check_identity(site).seen
    site.certificate_file.write_text("nothing")
    assert "no PEM certificate" in local.check_identity(site).seen
    site.certificate_file.unlink()
    outcome = local.check_identity(site)
    assert (outcome.status, outcome.remedy) == ("fail", f"sudo camera-agent provision --config {site.config_path}")


@pytest.mark.parametrize(
    ("days", "status"), [(0, "pass"), (269, "pass"), (271, "warn"), (299, "warn"), (301, "fail"), (-31, "fail")]
)
def test_certificate(site: Site, days: int, status: str) -> None:
    later = replace(site, now=lambda: (NOW + timedelta(days=days)).timestamp())
    assert local.check_certificate(later).status == status


def test_key(site: Site) -> None:
    assert local.check_key(site).status == "pass"
    site.private_key_file.write_text(private_key(ec.generate_private_key(ec.SECP256R1())))
    outcome = local.check_key(site)
    assert (outcome.status, outcome.seen) == ("fail", "the private key is not the certificate's")


def test_link(site: Site) -> None:
    assert network.check_link(site).status == "skip"
    edit(site, "localhost", "example.com")
    site = replace(site)
    assert network.check_link(site) == Outcome("pass", "eth0 is up with an address")
    (site.proc / "net/route").write_text("Iface Destination\n")
    (site.sys / "class/net/eth0").rename(site.sys / "class/net/camlink9")
    assert network.check_link(site).seen == "camlink9 has no address"
    (site.sys / "class/net/camlink9/operstate").write_text("down\n")
    outcome = network.check_link(site)
    assert (outcome.status, outcome.seen) == ("fail", "camlink9 is down")


def test_route(site: Site) -> None:
    assert network.check_route(site).status == "skip"
    edit(site, "localhost", "example.com")
    site = replace(site)
    assert network.check_route(site) == Outcome("pass", "by eth0")
    (site.proc / "net/route").write_text("Iface\neth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n")
    assert network.check_route(site).status == "fail"
    (site.proc / "net/ipv6_route").write_text(f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 1 1 0 00000003 wwan0\n")
    assert network.check_route(site) == Outcome("pass", "by wwan0 (IPv6)")


def test_dns(site: Site) -> None:
    assert network.check_dns(site).status == "pass"
    edit(site, "localhost", "camera.invalid")
    outcome = network.check_dns(replace(site))
    assert outcome.status == "fail"
    assert "camera.invalid" in outcome.seen
    edit(site, "camera.invalid", "192.0.2.7")
    assert network.check_dns(replace(site)).status == "pass"


def test_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(site.state_dir)

    def made(**changes: int) -> os.statvfs_result:
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_flag")
        values = {name: getattr(real, name) for name in names}
        block = 4096
        values |= {"f_frsize": block, "f_blocks": 10 * 2**30 // block, "f_bavail": 5 * 2**30 // block}
        values |= {"f_files": 100_000, "f_favail": 50_000, "f_flag": 0} | changes
        return os.statvfs_result([*(values[name] for name in names), 255])

    def status(**changes: int) -> str:
        monkeypatch.setattr(os, "statvfs", lambda _: made(**changes))
        return local.check_disk(site).status

    assert status() == "pass"
    assert status(f_bavail=2**30 // 4096 - 1) == "warn"
    assert status(f_bavail=1000) == "fail"
    assert status(f_favail=4000) == "warn"
    assert status(f_favail=10) == "fail"
    assert status(f_flag=os.ST_RDONLY) == "fail"


def test_capture(site: Site, tmp_path: Path) -> None:
    images = tmp_path / "images"
    assert "no *.jpg" in local.check_capture(site).seen
    day = images / "2026" / "06" / "01"
    day.mkdir(parents=True)
    for number, age in enumerate((3600, 5, 60)):
        image = day / f"{number}.jpg"
        image.write_bytes(b"")
        os.utime(image, (NOW.timestamp() - age,) * 2)
    other = day / "new.txt"
    other.write_bytes(b"")
    assert local.check_capture(site) == Outcome("pass", "front: newest image 5 s old")
    later = replace(site, now=lambda: NOW.timestamp() + 120)
    outcome = local.check_capture(later)
    assert (outcome.status, outcome.seen) == ("fail", "front: newest image 2 min old, expected every 1 s")
    edit(site, "/images", "/nowhere")
    assert "does not exist" in local.check_capture(replace(site)).seen


def test_a_big_archive_is_searched_from_its_newest_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        folder = tmp_path / "images" / f"day{number}"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"")
        stamp = NOW.timestamp() - 86400 * (5 - number)
        os.utime(folder / "a.jpg", (stamp, stamp))
        os.utime(folder, (stamp, stamp))
    first = next(iter(local._files(tmp_path / "images", time.monotonic() + 60)))
    assert "day4" in first.path


def test_a_camera_without_any_source(site: Site) -> None:
    edit(site, "[capture.sources.front]", "[other]")
    assert local.check_capture(site).status == "skip"


def test_the_daemon_is_down(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTCTL_SOCKET", raising=False)
    outcome = network.check_daemon(site)
    assert (outcome.status, outcome.meaning) == ("fail", "the daemon is not running")
    assert "systemctl" in outcome.remedy


@pytest.mark.parametrize(
    ("cloud", "status"),
    [
        ({"state": "connected", "endpoint": "x", "port": 8883}, "pass"),
        ({"state": "connecting", "code": "", "reason": ""}, "warn"),
        ({"state": "connecting", "code": "not_authorized", "reason": "the broker refused", "hint": "policy"}, "fail"),
        ({"state": "offline", "code": "timeout", "reason": "no answer"}, "fail"),
        (None, "skip"),
    ],
)
def test_mqtt(site: Site, cloud: dict[str, object] | None, status: str) -> None:
    site.agent_status = {"cloud": cloud}
    outcome = network.check_mqtt(site)
    assert outcome.status == status
    if status == "fail":
        assert outcome.remedy
