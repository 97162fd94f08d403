"""What every test gets: blocking calls on the event loop are errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster
from hypothesis import settings

from agent import logs
from tests import conformance


def pytest_addoption(parser: pytest.Parser) -> None:
    conformance.add_option(parser)
    parser.addoption("--exhaustive", action="store_true", help="enumerate every fault, not a sample; takes hours")


def pytest_configure(config: pytest.Config) -> None:
    conformance.register(config)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """BlockBuster around each asynchronous test: blocking I/O called from `agent` on the loop raises BlockingError."""
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    blocker = BlockBuster(scanned_modules=["agent"], excluded_modules=["agent.sandbox"])
    blocker.activate()
    try:
        yield
    finally:
        blocker.deactivate()


settings.register_profile("camera-agent", deadline=None, print_blob=True)
settings.load_profile("camera-agent")
logs.configure("json", "debug")


def pytest_terminal_summary(terminalreporter) -> None:
    """What the tests that enumerate faults printed: how many points each has tried."""
    lines = [
        f"{report.nodeid.split('::')[-1]}: {line}"
        for report in terminalreporter.stats.get("passed", [])
        for line in report.capstdout.splitlines()
        if line[:1].isdigit() or " tried" in line or line.startswith("killed at")
    ]
    if lines:
        terminalreporter.section("points tried")
        for line in lines:
            terminalreporter.line(line)
