"""Each format against what really reads it: configparser, tomllib, three shells, systemd's own parser, python-dotenv."""

from __future__ import annotations

import configparser
import ctypes
import ctypes.util
import importlib.util
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.config import formats
from agent.errors import RefusedError

SHELLS = [shell for shell in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(shell[0])]
SYSTEMD = next(iter(sorted(Path("/usr/lib").glob("**/systemd/libsystemd-shared-2*.so"))), None)

words = st.text(st.characters(exclude_categories=["Cs"]))
tricky = st.text(st.sampled_from("ab \t\n\r\x00\x0b\x85\u2028\ufeff\ufffe\"'\\$`{}#;=:[]%!~&|<>()*?é😀-1"), max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | words | tricky
values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(words, below, max_size=4), max_leaves=15
)
documents = st.dictionaries(words | tricky, values, max_size=5)
names = st.sampled_from(["a", "A", "key", "Key", "two words", "DEFAULT", "default", "ключ", "export"]) | tricky | words
ini_documents = st.dictionaries(names, st.dictionaries(names, scalars, max_size=4), max_size=4)
variables = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True) | names
env_values = scalars | st.text(st.sampled_from("ab \t\"'\\{}#;=:[]%!~&|<>()*?é😀-1"), max_size=8)
env_documents = st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,3}", fullmatch=True), env_values, max_size=4)
env_documents |= st.dictionaries(variables, scalars, max_size=5)


def canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True)


def written(document: dict[str, Any], syntax: str) -> bytes | None:
    """The file, None where the document is refused."""
    try:
        return formats.render(document, syntax)
    except RefusedError as error:
        assert error.code == "target_format"
        assert error.message
        assert error.hint
        return None


def means(text: str, value: Any) -> bool:
    """Whether a program that reads `text` has `value`."""
    if isinstance(value, bool):
        return text == ("true" if value else "false")
    return text == value if isinstance(value, str) else type(value)(text) == value


# ---- JSON and TOML ------------------------------------------------------------------------------------------------


@given(documents)
@example({"a": {"b": {}}, "c": [{"d": {"e": 1}}], "": {"\x7f\n\"'\\": "\x00\u2028"}, "x": 1e300, "y": -0.0})
def test_a_document_survives_being_written_in_json_and_toml(document: dict[str, Any]) -> None:
    assert canonical(json.loads(formats.render(document, "json"))) == canonical(document)
    assert canonical(tomllib.loads(formats.render(document, "toml").decode())) == canonical(document)


def test_toml_is_readable() -> None:
    text = formats.render({"fps": 2, "lens": {"focus": 1.5}, "names": ["a", "b"]}, "toml").decode()
    assert text == 'fps = 2\nnames = [\n    "a",\n    "b",\n]\n\n[lens]\nfocus = 1.5\n'


@pytest.mark.parametrize(
    ("document", "syntax", "path"),
    [
        ({"a": {"b": [1, None]}}, "toml", ("a", "b", "1")),
        ({"a": 2**63}, "json", ("a",)),
        ({"a": [float("nan")]}, "toml", ("a", "0")),
        ({"a": float("inf")}, "json", ("a",)),
        ({"a": "\ud800"}, "json", ("a",)),
        ({"a": {"\udfff": 1}}, "json", ("a",)),
        ({"a": {1: 2}}, "json", ("a",)),
        ({"a": b"x"}, "json", ("a",)),
        ({"a": 1}, "ini", ("a",)),
        ({"a": {"b": {"c": 1}}}, "ini", ("a", "b")),
        ({"a": {"b": [1]}}, "ini", ("a", "b")),
        ({"a": {"b": None}}, "ini", ("a", "b")),
        ({"DEFAULT": {}}, "ini", ("DEFAULT",)),
        ({"": {}}, "ini", ("",)),
        ({"a]": {}}, "ini", ("a]",)),
        ({" a": {}}, "ini", (" a",)),
        ({"a": {}, "A": {}}, "ini", ("A",)),
        ({"a": {"key": 1, "KEY": 2}}, "ini", ("a", "KEY")),
        *(
            ({"a": {key: 1}}, "ini", ("a", key))
            for key in ("", "a=b", "a:b", "[a", "a]", "#a", ";a", "a\nb", "a ", "\x00")
        ),
        *(
            ({"a": {"b": value}}, "ini", ("a", "b"))
            for value in (" x", "x ", "x\ny", "x\ry", "\x00", "x\x85y", "x\u2028", "# x", "x ;y")
        ),
        *(({key: 1}, "env", (key,)) for key in ("", "1A", "A-B", "A B", "É", "A\n", "PPID", "UID", "BASH_ENV", "_")),
        *(
            ({"A": value}, "env", ("A",))
            for value in ("x\ny", "\x00", "\x1b", "${B}", "x\\", "it's $5", "\\$", "\ufffe", [1], {"a": 1}, None)
        ),
    ],
)  # fmt: skip
def test_what_a_format_can_not_hold_is_refused_with_the_key_in_question(
    document: dict[str, Any], syntax: str, path: tuple[str, ...]
) -> None:
    with pytest.raises(formats.FormatError) as caught:
        formats.render(document, syntax)
    assert (caught.value.code, caught.value.path) == ("target_format", path)
    assert ".".join(path) in caught.value.message
    assert caught.value.hint


def test_a_document_nested_without_end_and_an_unknown_format_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for syntax in ("json", "toml", "ini", "env"):
        with pytest.raises(RefusedError, match="nested too deep"):
            formats.render(deep, syntax)
    with pytest.raises(RefusedError, match="no format 'yaml'"):
        formats.render({}, "yaml")


# ---- INI ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(ini_documents)
@example({"a": {"b": "", "c": "x"}, "d": {}, "e": {"f": "= : % \\", "%(g)s": "[x]", "two words": -0.0}})
@example({})
def test_ini_is_read_as_what_was_wanted_or_refused(document: dict[str, dict[str, Any]]) -> None:
    content = written(document, "ini")
    if content is None:
        return
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(content.decode())
    assert parser.sections() == list(document)
    for section, table in document.items():
        assert list(parser[section]) == list(table)
        assert all(means(parser[section][key], value) for key, value in table.items())


def test_ini_for_readers_that_know_more_comments_and_fewer_cases() -> None:
    content = formats.render({"Lens": {"Focus": 1.0, "mode": "auto;fast#1", "on": True, "tiny": 1e-7}}, "ini")
    assert content == b"[Lens]\nFocus = 1\nmode = auto;fast#1\non = true\ntiny = 1e-7\n"
    strict = configparser.RawConfigParser(inline_comment_prefixes=("#", ";"))
    strict.read_string(content.decode())
    assert dict(strict["Lens"]) == {"focus": "1", "mode": "auto;fast#1", "on": "true", "tiny": "1e-7"}


# ---- env ----------------------------------------------------------------------------------------------------------


def as_shell(shell: list[str], file: Path) -> dict[str, str]:
    script = 'set -a; . "$1"; exec /usr/bin/env -0'
    done = subprocess.run([*shell, "-c", script, "sh", str(file)], env={}, capture_output=True, check=True, timeout=60)
    assert done.stderr == b""
    pairs = (line.decode().partition("=") for line in done.stdout.split(b"\0") if line)
    return {name: value for name, _, value in pairs}


def as_systemd(file: Path) -> dict[str, str]:
    """The parser behind EnvironmentFile=, and the check that a unit's environment has to pass."""
    library = ctypes.CDLL(str(SYSTEMD))
    found = ctypes.POINTER(ctypes.c_char_p)()
    assert library.load_env_file(None, os.fsencode(file), ctypes.byref(found)) == 0
    pairs = []
    for line in found or ():
        if line is None:
            break
        assert library.env_assignment_is_valid(line), line
        pairs.append(line.decode().partition("="))
    return {name: value for name, _, value in pairs}


def as_dotenv(file: Path) -> dict[str, str | None]:
    from dotenv import dotenv_values

    return dotenv_values(file, interpolate=True)


READERS = [
    *(pytest.param(lambda file, shell=shell: as_shell(shell, file), id=shell[0]) for shell in SHELLS),
    pytest.param(as_systemd, id="systemd", marks=pytest.mark.skipif(SYSTEMD is None, reason="needs libsystemd-shared")),
    pytest.param(
        as_dotenv,
        id="python-dotenv",
        marks=pytest.mark.skipif(not importlib.util.find_spec("dotenv"), reason="needs python-dotenv"),
    ),
]


@pytest.mark.parametrize("reader", READERS)
def test_env_is_read_as_what_was_wanted_or_refused(
    reader: Callable[[Path], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("env") / "pipeline.env"
    tried = 0

    @settings(max_examples=150)
    @given(env_documents)
    @example(
        {"A": "", "B": " x ", "C": '$HOME `id` "q"', "D": 'it\'s \\ "it"', "E": "é😀\t", "export": "#", "F": "\\n\\\\t"}
    )
    @example({"A": "x\\'y", "B": '"', "C": "~", "D": "a=b:~", "E": "!!", "F": "$A", "if": "1", "Z": 'C:\\new "x"'})
    def every_document(document: dict[str, Any]) -> None:
        nonlocal tried
        content = written(document, "env")
        if content is None:
            return
        file.write_bytes(content)
        found = reader(file)
        for name, value in document.items():
            assert means(found[name], value), content
            assert str(found[name]) == str(written_value(value))
        assert set(found) - set(document) <= {"_", "PWD", "OLDPWD", "SHLVL", "PATH"}
        tried += 1

    every_document()
    print(f"{tried} environment files tried")


def written_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else formats._scalar(value, (), "env")


@pytest.mark.parametrize("reader", READERS)
def test_every_pair_of_awkward_characters_is_read_the_same(
    reader: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    alphabet = " \t\"'\\$`{}#;=!~&|<>()*?%na-é"
    awkward = [
        "",
        *alphabet,
        *(a + b for a in alphabet for b in alphabet),
        *(a + "$" + b for a in alphabet for b in alphabet),
    ]
    document = {}
    for number, value in enumerate(awkward):
        if written({"A": value}, "env") is not None:
            document[f"V{number}"] = value
    assert len(document) > len(awkward) / 2
    file = tmp_path / "all.env"
    file.write_bytes(formats.render(document, "env"))
    found = reader(file)
    assert {name: found[name] for name in document} == document
    print(f"{len(document)} values tried")


def test_no_name_is_taken_that_a_shell_keeps_for_itself(tmp_path: Path) -> None:
    listed = subprocess.run(["bash", "-c", "compgen -v"], env={}, capture_output=True, check=True, text=True)
    known = {
        *listed.stdout.split(),
        "IFS",
        "LINENO",
        "OPTIND",
        "PPID",
        "UID",
        "EUID",
        "RANDOM",
        "SECONDS",
        "PS1",
        "HOME",
    }
    file = tmp_path / "name.env"
    tried = 0
    for name in sorted(known):
        content = written({name: "x"}, "env")
        if content is not None:
            file.write_bytes(content)
            assert [as_shell(shell, file)[name] for shell in SHELLS] == ["x"] * len(SHELLS), name
            tried += 1
    assert {"HOME", "PS1", "PATH"} & known
    print(f"{tried} of {len(known)} variables of shells tried")


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/run/systemd/private").exists() or not shutil.which("systemd-run"),
    reason="needs root and a running systemd",
)
def test_a_unit_of_systemd_gets_the_values(tmp_path: Path) -> None:
    document = {"A": "it's", "B": "$HOME %h", "C": 'say "x\\y"', "D": "", "E": " é ", "F": 1.5}
    file = tmp_path / "unit.env"
    file.write_bytes(formats.render(document, "env"))
    done = subprocess.run(
        ["systemd-run", "--pipe", "--wait", "--quiet", f"--property=EnvironmentFile={file}", "env", "-0"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.decode().split("\0")
    assert {"A=it's", "B=$HOME %h", 'C=say "x\\y"', "D=", "E= é ", "F=1.5"} <= set(lines)
