"""A pytest plugin that fails the run at any unexpected skip.

Use it with ``python -m pytest -p tests.unexpected_skips``.  A contract clause may skip
if the store lacks an ability or a guarantee, or if the test of a backend in ``examples/``
gives no way to damage its data.  Outside of CI, a test may skip if no MariaDB or Redis
server is there, or if it needs root.  A test of a full disk may skip if it cannot mount a
file system; tests with file size limits cover the same errors.  No other test may skip.
"""

import os
import re
from collections.abc import Iterator

import pytest

ALLOWED = re.compile(
    r"the store (has no Supports\w+(, Supports\w+)*|does not guarantee [a-z-]+: .+)$"
    r"|the store has no fixture damage$"
    r"|no file system can be mounted here: "
)

if not os.environ.get("CI"):
    missing = (
        r"tests on MariaDB need a server: |no Redis server: |only root can become another user$"
    )
    ALLOWED = re.compile(f"{ALLOWED.pattern}|{missing}")


class SkipCheck:
    """Collects the skips with an unexpected reason."""

    def __init__(self) -> None:
        self.unexpected: list[str] = []

    def check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            where = report.nodeid
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            if not ALLOWED.match(reason.removeprefix("Skipped: ")):
                self.unexpected.append(f"{where}: {reason}")

    pytest_runtest_logreport = check
    pytest_collectreport = check

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("unexpected skips", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipCheck(), "skip-check")
