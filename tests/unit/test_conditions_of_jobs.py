"""Conditions of job documents: what holds, what does not and why, what can't be judged, and the facts they are about."""

import itertools
import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.host.facts import host_facts
from agent.jobs.conditions import TYPES, check, facts, unmet
from agent.jobs.document import parse
from agent.versions import compare_versions

HOST = {
    "os.id": "debian",
    "os.version": "12",
    "os.codename": "bookworm",
    "os.kernel": "6.1.0-18-arm64",
    "host.arch": "aarch64",
    "host.name": "cam-0412",
    "host.model": "Raspberry Pi 4 Model B Rev 1.4",
}
FACTS = facts(
    HOST,
    agent_version="0.2.0",
    thing_name="cam-0412",
    targets={"pipeline": "2.0~rc1", "never": None},
    labels={"lane": "2"},
    own={"site": "Graz", "deviceType": ""},
)


def condition(key, value, kind="stringEqual"):
    return {"key": key, "value": value if isinstance(value, list) else [value], "type": kind}


@pytest.mark.parametrize(
    ("key", "kind", "value", "holds"),
    [
        ("os.id", "stringEqual", "debian", True),
        ("label.lane", "stringEqual", "2", True),
        ("os.id", "stringEqual", ["ubuntu", "debian"], True),
        ("os.id", "stringEqual", "Debian", False),
        ("os.id", "stringEqual", "deb*", False),
        ("operatingSystem", "stringEqual", "debian", True),
        ("os.id", "stringNotEqual", "ubuntu", True),
        ("os.id", "stringNotEqual", ["ubuntu", "debian"], False),
        ("host.model", "stringLike", "Raspberry Pi 4*", True),
        ("host.model", "stringLike", ["Raspberry Pi 5*", "*Rev 1.[0-4]"], True),
        ("host.model", "stringLike", "raspberry*", False),
        ("host.model", "stringLike", "Raspberry", False),
        ("thing.name", "stringLike", "cam-04??", True),
        ("site", "stringEqual", "Graz", True),
        ("agent.version", "versionAtLeast", "0.2", True),
        ("agent.version", "versionAtLeast", "0.2.0", True),
        ("agent.version", "versionAtLeast", "0.10", False),
        ("agent.version", "versionAtLeast", ["1.0", "0.1"], True),
        ("agent.version", "versionBelow", "0.2.0", False),
        ("agent.version", "versionBelow", "0.10", True),
        ("os.version", "versionAtLeast", "11", True),
        ("os.kernel", "versionAtLeast", "5.10", True),
        ("os.kernel", "versionBelow", "6.1.0-20", True),
        ("target.pipeline.version", "versionBelow", "2.0", True),
        ("target.pipeline.version", "versionAtLeast", "1.9", True),
        ("os.codename", "versionAtLeast", "1", False),
        ("os.codename", "versionBelow", "1", False),
        # Without a value no condition holds, except that there is none.
        ("target.never.version", "stringEqual", "", True),
        ("target.never.version", "stringEqual", "1.0", False),
        ("target.never.version", "stringNotEqual", "1.0", False),
        ("target.never.version", "stringLike", "*", False),
        ("target.never.version", "versionBelow", "1.0", False),
        ("deviceType", "stringNotEqual", "x", False),
    ],
)
def test_what_holds(key, kind, value, holds):
    assert (unmet([condition(key, value, kind)], FACTS) == []) is holds


def test_none_and_all():
    check([], FACTS)
    check([], {})
    check([condition("os.id", "debian"), condition("site", "Graz")], FACTS)


@pytest.mark.conformance("F-07")
def test_what_is_not_met_is_told_with_what_is_wanted_and_found():
    conditions = [
        condition("os.id", ["ubuntu", "redhat"]),
        condition("site", "Graz"),
        condition("target.pipeline.version", "2.0", "versionAtLeast"),
        condition("target.never.version", "3", "versionBelow"),
    ]
    with pytest.raises(RefusedError) as caught:
        check(conditions, FACTS)
    assert caught.value.code == "condition_not_met"
    assert caught.value.message == (
        "conditions: os.id must be 'ubuntu' or 'redhat', but is 'debian'; target.pipeline.version must be '2.0' or later,"
        " but is '2.0~rc1'; target.never.version must be before '3', but has no value on this camera"
    )
    assert caught.value.hint


@pytest.mark.conformance("C-DOC-10")
@pytest.mark.parametrize(
    ("bad", "said", "known"),
    [
        (condition("OS", "16.0"), "key 'OS' is not known here", "os.version"),
        (condition("target.other.version", "1"), "'target.other.version'", "target.pipeline.version"),
        (condition("os.id", "debian", "numericEquals"), "type 'numericEquals'", "versionAtLeast"),
        (condition("os.id", "debian", ""), "type ''", "stringEqual"),
        (condition("agent.version", "newest", "versionAtLeast"), "'newest' is not a version", "1.2.0"),
        (condition("agent.version", ["0.1", "1" * 200], "versionBelow"), "is not a version", "1.2.0"),
        (condition("agent.version", "²", "versionBelow"), "is not a version", "1.2.0"),
    ],
)
def test_what_can_not_be_judged_is_refused_whatever_the_others_say(bad, said, known):
    for others in ([], [condition("os.id", "debian")], [condition("os.id", "ubuntu")]):
        for conditions in ([bad, *others], [*others, bad]):
            with pytest.raises(RefusedError) as caught:
                check(conditions, FACTS)
            assert caught.value.code == "condition_unknown"
            assert said in caught.value.message
            assert known in caught.value.hint


def test_many_and_long_ones_stay_readable():
    many = {f"fact-{n:03}": "x" * 300 for n in range(200)}
    with pytest.raises(RefusedError) as caught:
        check([condition("a\x1b]0;x\x07" + "k" * 500, "v")], many)
    assert len(caught.value.message) + len(caught.value.hint) < 1000
    assert caught.value.message.isprintable()
    with pytest.raises(RefusedError) as caught:
        check([condition(key, ["\n" * 200] * 60) for key in many], many)
    assert len(caught.value.message) + len(caught.value.hint) < 4000
    assert caught.value.message.isprintable()
    assert "and 196 more" in caught.value.message


def test_the_operators_facts_add_and_never_replace():
    own = {"site": "Graz", "os.id": "ubuntu", "operatingSystem": "ubuntu", "target.x.version": "9", "host.gpu": "yes"}
    found = facts(HOST, agent_version="0.2.0", thing_name="c", targets={}, labels={}, own=own)
    assert found == {
        **HOST,
        "agent.version": "0.2.0",
        "thing.name": "c",
        "operatingSystem": "debian",
        "site": "Graz",
    }


def test_what_parse_gives_can_be_checked():
    conditions = [
        {"key": "site", "value": "Graz"},
        {"key": "agent.version", "value": ["0.1"], "type": "versionAtLeast"},
    ]
    document = parse({"version": "1.0", "operation": "reboot", "conditions": conditions})[1]
    check(document["conditions"], FACTS)


IN_ORDER = [
    "0.9", "1.0~~", "1.0~rc1", "1.0~rc1+b1", "1.0~rc2", "1.0", "1.0-1", "1.0-1+deb12u1", "1.0-2", "1.0-10", "1.0a",
    "1.0rc1", "1.0+b1", "1.0.0", "1.0.1", "1.2", "1.10", "v2", "2.0", "10", "1:0.1", "2:0",
]  # fmt: skip


def test_versions_are_in_debians_order():
    pairs = list(itertools.product(enumerate(IN_ORDER), repeat=2))
    for (i, one), (j, other) in pairs:
        assert compare_versions(one, other) == (i > j) - (i < j), (one, other)
    print(f"{len(pairs)} pairs of versions tried")


@pytest.mark.skipif(not shutil.which("dpkg"), reason="needs dpkg")
def test_dpkg_says_the_same():
    words = [version.removeprefix("v") for version in IN_ORDER]
    tried = 0
    for one, other in itertools.pairwise(words):
        for left, right in ((one, other), (other, one)):
            less = subprocess.run(["dpkg", "--compare-versions", left, "lt", right]).returncode == 0
            assert (compare_versions(left, right) < 0) is less, (left, right)
            tried += 1
    print(f"{tried} comparisons by dpkg tried")


versions = st.from_regex(r"(?:[0-9]:)?[0-9][0-9a-z.+~-]{0,8}", fullmatch=True)


@given(versions, versions, versions)
def test_versions_have_an_order(a, b, c):
    assert compare_versions(a, a) == 0
    assert compare_versions(a, b) == -compare_versions(b, a)
    if compare_versions(a, b) <= 0 and compare_versions(b, c) <= 0:
        assert compare_versions(a, c) <= 0


texts = st.text(max_size=20)


@given(
    st.lists(st.builds(condition, st.sampled_from(sorted(FACTS)) | texts, st.lists(texts, min_size=1, max_size=4),
                       st.sampled_from(sorted(TYPES)) | texts), max_size=5),
    st.dictionaries(st.sampled_from(sorted(FACTS)), texts),
)  # fmt: skip
def test_any_conditions_are_judged_or_refused(conditions, found):
    try:
        failed = unmet(conditions, {**FACTS, **found})
    except RefusedError as error:
        assert error.code == "condition_unknown"
        assert error.message.isprintable()
    else:
        assert len(failed) <= len(conditions)
        assert all(sentence.isprintable() for sentence in failed)


# ---- the machine -------------------------------------------------------------------------------------------------------


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_a_board_with_a_device_tree(tmp_path):
    put(
        tmp_path / "usr/lib/os-release",
        '# comment\nNAME="Debian GNU/Linux"\nID=debian\n\nVERSION_ID="12"\nVERSION_CODENAME=\'bookworm\'\nBROKEN="\nnonsense\n',
    )
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").symlink_to("../usr/lib/os-release")
    put(tmp_path / "proc/device-tree/model", b"Raspberry Pi 4 Model B Rev 1.4\0")
    found = host_facts(tmp_path)
    assert {key: found[key] for key in ("os.id", "os.version", "os.codename", "host.model")} == {
        "os.id": "debian",
        "os.version": "12",
        "os.codename": "bookworm",
        "host.model": "Raspberry Pi 4 Model B Rev 1.4",
    }
    machine = os.uname()
    assert (found["os.kernel"], found["host.arch"], found["host.name"]) == (
        machine.release,
        machine.machine,
        machine.nodename,
    )


@pytest.mark.parametrize(
    ("vendor", "product", "model"),
    [
        ("Intel\n", "NUC8i5BEH\n", "Intel NUC8i5BEH"),
        ("To Be Filled By O.E.M.\n", "System Product Name\n", ""),
        ("QEMU\n", None, "QEMU"),
        (None, None, ""),
    ],
)
def test_a_pc_has_its_model_in_the_dmi_tables(tmp_path, vendor, product, model):
    for name, text in (("sys_vendor", vendor), ("product_name", product)):
        if text is not None:
            put(tmp_path / "sys/class/dmi/id" / name, text)
    assert host_facts(tmp_path)["host.model"] == model


def test_etc_goes_before_usr(tmp_path):
    put(tmp_path / "usr/lib/os-release", "ID=debian\n")
    put(tmp_path / "etc/os-release", "ID=yocto\n")
    assert host_facts(tmp_path)["os.id"] == "yocto"


def test_a_machine_that_says_nothing_has_every_fact_and_no_value(tmp_path):
    found = host_facts(tmp_path)
    assert found.keys() == HOST.keys()
    assert (found["os.id"], found["os.version"], found["os.codename"], found["host.model"]) == ("", "", "", "")


@given(st.binary(max_size=200))
def test_whatever_the_files_hold(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    for place in ("etc/os-release", "proc/device-tree/model", "sys/class/dmi/id/sys_vendor"):
        put(root / place, data)
    assert all(value.isprintable() for value in host_facts(root).values())


def test_this_machine():
    found = host_facts()
    assert found["os.kernel"]
    assert found["host.arch"]
