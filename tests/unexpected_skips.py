"""A pytest plugin: every skip has to name an ability that a backend does not have.

``python -m pytest -p tests.unexpected_skips`` fails the run for any other
reason, so that a suite that skipped its way to green is not green.  The
contract suite skips like that by itself.  Tests on servers that no wheel brings
skip, outside of CI, where the server is missing, and those on a full disk where
nothing may be mounted (limits on the size of files stand in); nothing else may
skip at all.
"""

import os
import re
from collections.abc import Iterator

import pytest

ALLOWED = re.compile(
    r"the store (has no Supports\w+(, Supports\w+)*|does not guarantee [a-z-]+: .+)$"
    r"|no file system can be mounted here: "
)

if not os.environ.get("CI"):
    missing_server = r"tests on MariaDB need a server: |no Redis server: "
    ALLOWED = re.compile(f"{ALLOWED.pattern}|{missing_server}")


class SkipPolice:
    """Collects what was skipped for another reason than a missing ability."""

    def __init__(self) -> None:
        self.unexpected: list[str] = []

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            where = report.nodeid
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            if not ALLOWED.match(reason.removeprefix("Skipped: ")):
                self.unexpected.append(f"{where}: {reason}")

    pytest_runtest_logreport = note
    pytest_collectreport = note

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skips that name no missing ability", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolice(), "skip-police")
