"""The pytest plugin of taskstore: options and markers for the contract suite.

The plugin is a module outside the package, because pytest imports it in every
project where taskstore is installed.  The plugin imports taskstore only
when a contract suite runs.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MARKER = "taskstore_level"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--taskstore-url``, ``--taskstore-level`` and ``--taskstore-report``."""
    group = parser.getgroup("taskstore", "the contract suite of taskstore")
    group.addoption(
        "--taskstore-url",
        metavar="URL",
        help="the URL of the backend to test; the suite uses a separate namespace",
    )
    group.addoption(
        "--taskstore-level",
        metavar="LEVEL",
        action="append",
        help="run only the clauses of this level (can be repeated)",
    )
    group.addoption(
        "--taskstore-report", metavar="FILE", help="write each clause's outcome to FILE as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and register the reporter if a report was requested."""
    config.addinivalue_line(
        "markers", f"{MARKER}(name): the level of the contract that a clause belongs to"
    )
    if config.getoption("taskstore_report"):
        config.pluginmanager.register(_Reporter(Path(config.getoption("taskstore_report"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the clauses of contract suites with their level, and select the requested levels."""
    requested = config.getoption("taskstore_level")
    deselected = []
    for item in items:
        level = _level_of(item)
        if level is not None:
            item.add_marker(pytest.mark.taskstore_level(level))
            if requested and level not in requested:
                deselected.append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def _level_of(item: pytest.Item) -> str | None:
    """Return the level of the class that defines a clause; ``None`` outside contract suites."""
    cls = getattr(item, "cls", None)
    if cls is None or not getattr(cls, "is_taskstore_contract", False):
        return None
    name = getattr(item, "originalname", item.name)
    defining_class = next((base for base in cls.__mro__ if name in vars(base)), cls)
    level: str = defining_class.level
    return level


class _Reporter:
    """Collects the outcome of each clause, and writes the report when the session ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clauses: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        marker = item.get_closest_marker(MARKER)
        if marker is not None:
            self._add_outcome(item, marker.args[0], report)
        return report

    def _add_outcome(self, item: pytest.Item, level: str, report: pytest.TestReport) -> None:
        clause = self._clauses.setdefault(
            item.nodeid,
            {
                "level": level,
                "clause": item.name.removeprefix("test_"),
                "promise": " ".join((getattr(item, "obj", item).__doc__ or "").split()),
                "outcome": "passed",
                "reason": None,
                "seconds": 0.0,
            },
        )
        clause["seconds"] = round(clause["seconds"] + report.duration, 3)
        if report.failed:
            clause.update(outcome="failed", reason=report.longreprtext)
        elif report.skipped and clause["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            clause.update(outcome="skipped", reason=reason.removeprefix("Skipped: "))

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(list(self._clauses.values())), encoding="utf-8")
