"""The pytest plugin of taskstore: options and markers for the contract suite.

It is a module of its own, beside the package, because pytest imports it in
every project where taskstore is installed: it imports nothing of taskstore
until a contract suite is really run.
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
        help="the backend that taskstore.testing.suite runs against, in a namespace of its own",
    )
    group.addoption(
        "--taskstore-level",
        metavar="LEVEL",
        action="append",
        help="run the clauses of this level only (may be given several times)",
    )
    group.addoption(
        "--taskstore-report", metavar="FILE", help="write the verdict on each clause as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and keep a report if one was asked for."""
    config.addinivalue_line(
        "markers", f"{MARKER}(name): the level of the contract that a clause belongs to"
    )
    if config.getoption("taskstore_report"):
        config.pluginmanager.register(_Reporter(Path(config.getoption("taskstore_report"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the clauses of contract suites with their level, and select those asked for."""
    wanted = config.getoption("taskstore_level")
    left_out = []
    for item in items:
        level = _level_of(item)
        if level is not None:
            item.add_marker(pytest.mark.taskstore_level(level))
            if wanted and level not in wanted:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _level_of(item: pytest.Item) -> str | None:
    """The level that the class which defines a clause names."""
    cls = getattr(item, "cls", None)
    if cls is None or not getattr(cls, "is_taskstore_contract", False):
        return None
    name = getattr(item, "originalname", item.name)
    room = next((base for base in cls.__mro__ if name in vars(base)), cls)
    level: str = room.level
    return level


class _Reporter:
    """Notes what became of each clause, and writes it down at the end."""

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
            self._note(item, marker.args[0], report)
        return report

    def _note(self, item: pytest.Item, level: str, report: pytest.TestReport) -> None:
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
