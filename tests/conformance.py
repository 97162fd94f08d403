"""The statements of conformance.toml, the tests that name them with the marker `conformance`, and how these ended.

A run of the whole suite fails when a statement has no test and is not declared not to apply, or not yet; any run fails when a
marker names a statement that does not exist. With `--conformance` only the marked tests run, and the table is printed.
"""

from __future__ import annotations

import os
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STATEMENTS = Path(__file__).with_name("conformance.toml")
WIDTH = 140
INDENT = " " * 27
FAILINGS = "F-"
PROPERTY = "conformance"
BROKEN_OFF = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)


@dataclass(frozen=True)
class Statements:
    """Words by id, section by section; and why some do not apply, or are not kept yet, by id."""

    sections: dict[str, dict[str, str]]
    not_applicable: dict[str, str]
    not_yet: dict[str, str]

    @classmethod
    def read(cls, path: Path = STATEMENTS) -> Statements:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(data["statements"], data.get("not_applicable", {}), data.get("not_yet", {}))

    @property
    def words(self) -> dict[str, str]:
        return {key: words for section in self.sections.values() for key, words in section.items()}

    def exempt(self, key: str) -> tuple[str, str] | None:
        """Why no test is asked for: in a word or two, and the reason."""
        if key in self.not_applicable:
            return "does not apply", self.not_applicable[key]
        return ("not yet", self.not_yet[key]) if key in self.not_yet else None


@dataclass
class Function:
    """A test function with all its parameter sets: which have run, and what came out, by outcome."""

    cases: set[str] = field(default_factory=set)
    outcomes: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        for outcome in ("failed", "does not hold", "passed", "skipped"):
            if self.outcomes.get(outcome):
                return outcome
        return "not run"


class Conformance:
    """The pytest plugin: one for a run."""

    def __init__(self, config: pytest.Config, statements: Statements) -> None:
        self._config = config
        self._only = bool(config.getoption("conformance"))
        self._statements = statements
        self._shown_by: dict[str, list[str]] = {key: [] for key in statements.words}
        self._functions: dict[str, Function] = {}
        self._problems: list[str] = []
        self._whole = _whole_suite(config)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        marked, others = [], []
        for item in items:
            named = [key for mark in item.iter_markers("conformance") for key in mark.args]
            (marked if named else others).append(item)
            unknown = [key for key in named if key not in self._shown_by]
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: {', '.join(map(str, unknown))} is not in {STATEMENTS.name}")
            if named:  # goes with the reports, which may come from another process
                item.user_properties.append((PROPERTY, named))
        if self._only:
            items[:] = marked
            config.hook.pytest_deselected(items=others)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        named = next((value for name, value in report.user_properties if name == PROPERTY), [])
        name = _function(report.nodeid)
        for key in named:
            if name not in self._shown_by[key]:
                self._shown_by[key].append(name)
        if not named or (report.when != "call" and report.passed):
            return
        function = self._functions.setdefault(name, Function())
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "does not hold"
            function.reasons.append(report.wasxfail)
        elif report.skipped and isinstance(report.longrepr, tuple):
            function.reasons.append(report.longrepr[2].removeprefix("Skipped: "))
        function.outcomes[outcome] = function.outcomes.get(outcome, 0) + 1
        function.cases.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.option.collectonly or session.exitstatus in BROKEN_OFF or _is_worker(self._config):
            return
        applicable = [key for key in self._shown_by if not self._statements.exempt(key)]
        without = [key for key in applicable if not self._shown_by[key]]
        if without and (self._whole or self._only):
            self._problems.append(f"no test for {', '.join(without)}")
        if self._only:
            for key in applicable:
                if self._shown_by[key] and self._result(key) != "passed":
                    self._problems.append(f"{key}: {self._result(key)}")
        if self._problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.option.collectonly:
            return
        if self._only:
            terminalreporter.section("conformance")
            for line in self.table():
                terminalreporter.line(line)
        if self._only or self._whole:
            terminalreporter.line(self.summary())
        for problem in self._problems:
            terminalreporter.line(f"conformance: {problem}", red=True)

    def summary(self) -> str:
        """The run in one line."""
        words = self._statements.words
        failings = sum(key.startswith(FAILINGS) for key in words)
        shown = sum(bool(tests) for key, tests in self._shown_by.items() if not self._statements.exempt(key))
        return (
            f"conformance: {len(words) - failings} statements and {failings} failings of other agents, {shown} shown by "
            f"{len(self._functions)} tests, {len(self._statements.not_applicable)} do not apply, "
            f"{len(self._statements.not_yet)} not yet"
        )

    def table(self) -> Iterator[str]:
        """Each statement with its result and its tests, at most 140 columns wide."""
        for title, section in self._statements.sections.items():
            yield f"\n{title}\n"
            for key, words in sorted(section.items()):
                exempt = self._statements.exempt(key)
                first = f"{key:<10} {exempt[0] if exempt else self._result(key):<15} "
                yield from textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=INDENT)
                if exempt:
                    yield from textwrap.wrap(exempt[1], WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
                for name in self._shown_by[key]:
                    yield _shorten(f"{INDENT}{self._line(name)}")

    def _line(self, name: str) -> str:
        function = self._functions[name]
        times = f" ×{len(function.cases)}" if len(function.cases) > 1 else ""
        reasons = f": {function.reasons[0]}" if function.reasons else ""
        result = "" if function.result == "passed" and not reasons else f"  [{function.result}{reasons}]"
        return f"{name.rpartition('/')[2]}{times}{result}"

    def _result(self, key: str) -> str:
        results = {self._functions[name].result for name in self._shown_by[key]}
        for result in ("failed", "does not hold", "passed", "skipped", "not run"):
            if result in results:
                return result
        return "no test"


def add_option(parser: pytest.Parser) -> None:
    """The option `--conformance`."""
    parser.addoption(
        "--conformance",
        action="store_true",
        help="run only the tests that show a statement of docs/conformance.md, and print statement, tests and result",
    )


def register(config: pytest.Config) -> None:
    """Take part in this run."""
    config.pluginmanager.register(Conformance(config, Statements.read()), "conformance")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this process only runs tests for another one, which sums up."""
    return hasattr(config, "workerinput")


def _whole_suite(config: pytest.Config) -> bool:
    """Whether every test was collected: no file was named or left out, and not only the last failures are looked at."""
    options = config.option
    left_out = options.ignore or options.ignore_glob or getattr(options, "lf", False)
    named = {Path(os.path.normpath(config.invocation_params.dir / name)) for name in config.args}
    return not left_out and named == {config.rootpath / name for name in config.getini("testpaths")}


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def _shorten(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
