"""The table of statements, from real runs of pytest over small suites."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONFTEST = """
from pathlib import Path
from tests import conformance

def pytest_addoption(parser):
    conformance.add_option(parser)

def pytest_configure(config):
    config.addinivalue_line("markers", "conformance(*statements): shown")
    statements = conformance.Statements.read(Path(__file__).with_name("conformance.toml"))
    config.pluginmanager.register(conformance.Conformance(config, statements))
"""
STATEMENTS = """
[statements.Words]
C-1 = "One."
C-2 = "Two."
F-01 = "Three."
F-02 = "Four."
[not_applicable]
C-2 = "there is no two"
[not_yet]
F-02 = "next week"
"""
COMPLETE = """
import pytest

@pytest.mark.conformance("C-1", "F-01")
@pytest.mark.parametrize("number", [1, 2])
def test_shown(number):
    assert number

def test_unmarked():
    assert True
"""


@pytest.fixture
def suite(tmp_path):
    """Runs pytest over a suite made of the files given by name: its exit status and output."""

    def run(*options, **files):
        folder = tmp_path / "tests"
        folder.mkdir(exist_ok=True)
        (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "conformance.toml").write_text(STATEMENTS)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:asyncio", *options]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        return ran.returncode, ran.stdout + ran.stderr

    return run


SUMMARY = "conformance: 2 statements and 2 failings of other agents, 2 shown by 1 tests, 1 do not apply, 1 not yet"


def test_a_plain_run_of_everything_ends_with_one_line(suite):
    status, output = suite(test_a=COMPLETE)
    assert (status, SUMMARY in output) == (0, True), output
    assert "One." not in output


def test_the_option_runs_the_marked_tests_and_prints_the_table(suite):
    status, output = suite("--conformance", test_a=COMPLETE)
    assert status == 0, output
    assert "2 passed, 1 deselected" in output
    assert "C-1        passed          One.\n                           test_a.py::test_shown ×2\n" in output
    assert "C-2        does not apply  Two.\n                           there is no two\n" in output
    assert "F-02       not yet         Four.\n                           next week\n" in output
    assert SUMMARY in output


def test_a_statement_without_a_test_fails_a_run_of_everything_only(suite):
    partly = COMPLETE.replace(', "F-01"', "")
    status, output = suite(test_a=partly)
    assert (status, "conformance: no test for F-01\n" in output) == (1, True), output
    status, output = suite("tests/test_a.py")
    assert (status, "conformance" in output) == (0, False), output
    status, output = suite("--conformance", "tests/test_a.py")
    assert (status, "conformance: no test for F-01\n" in output) == (1, True), output


def test_a_marker_of_an_unknown_statement_fails_every_run(suite):
    status, output = suite("tests/test_a.py", test_a=COMPLETE.replace("C-1", "C-7"))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "C-7 is not in conformance.toml" in output


@pytest.mark.parametrize(
    ("body", "result", "line"),
    [
        ("assert number == 1", "failed", "[failed]"),
        ("pytest.skip('needs root')", "skipped", "[skipped: needs root]"),
        ("pytest.xfail('it is not so')", "does not hold", "[does not hold: it is not so]"),
    ],
)
def test_a_statement_that_no_test_has_shown_fails_the_run_with_the_option(suite, body, result, line):
    status, output = suite("--conformance", test_a=COMPLETE.replace("assert number", body))
    assert status == 1, output
    assert f"C-1        {result:<15} One.\n" in output
    assert f"test_a.py::test_shown ×2  {line}\n" in output
    assert f"conformance: C-1: {result}\n" in output


def test_where_one_test_was_skipped_another_may_show_it(suite):
    skipped = "import pytest\n@pytest.mark.conformance('C-1')\ndef test_b():\n    pytest.skip('no dbus')\n"
    status, output = suite("--conformance", test_a=COMPLETE, test_b=skipped)
    assert status == 0, output
    assert "C-1        passed " in output
    assert "test_b.py::test_b  [skipped: no dbus]\n" in output


def test_the_table_fits_140_columns(suite):
    status, output = suite("--conformance", test_a=COMPLETE.replace("test_shown", f"test_{'very_' * 40}long"))
    assert status == 0
    table = output.partition("= conformance =")[2].splitlines()[1:]
    assert max(map(len, table)) == 140, output
