"""From records to what is printed: tables for people, lines for grep, JSON for programs.

Text out of the ledger was written by others.  It is never read as Rich
markup, and characters that a terminal would obey are shown as escapes.
"""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict

from taskstore.model.records import TaskRecord
from taskstore.store.interface import TaskRegistryStore

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

NOTHING = "-"
"""What stands in a column whose field is not set."""

STYLES = {
    "queued": "cyan",
    "running": "bold blue",
    "succeeded": "green",
    "failed": "red",
    "timed_out": "red",
    "cancelled": "yellow",
    "lost": "magenta",
}
_OBEYED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # part of Persian words and of emoji, and harmless
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_YEAR_10000_MS = 253_402_300_800_000


def visible(text: str) -> str:
    """The text with everything that a terminal would obey as an escape: one line, no colours."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _OBEYED and char not in _JOINERS
        else char
        for char in text
    )


def when(at: int | None, *, precise: bool = False) -> str:
    """A time as ISO 8601 in UTC, to the second or the millisecond."""
    if at is None:
        return NOTHING
    if at >= _YEAR_10000_MS:
        return f"{at} ms"
    text = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{at % 1000:03d}Z" if precise else f"{text}Z"


def ago(at: int) -> str:
    """How long ago a time is, roughly: 42s, 5m, 3h, 12d."""
    passed_s = max(0, time.time_ns() // 1_000_000 - at) / 1000
    for unit, length_s in (("d", _DAY_S), ("h", _HOUR_S), ("m", _MINUTE_S)):
        if passed_s >= 2 * length_s:
            return f"{passed_s // length_s:.0f}{unit}"
    return f"{passed_s:.0f}s"


def took(record: TaskRecord) -> str:
    """How long an ended task ran."""
    if record.started_at is None or record.ended_at is None:
        return NOTHING
    return duration((record.ended_at - record.started_at) / 1000)


def duration(length_s: float) -> str:
    """Seconds as a person says them: 4.2s, 3m05s, 7h30m, 12d04h."""
    if length_s < _MINUTE_S:
        return f"{length_s:.1f}s"
    if length_s < _HOUR_S:
        return "{}m{:02d}s".format(*divmod(round(length_s), _MINUTE_S))
    if length_s < 2 * _DAY_S:
        return "{}h{:02d}m".format(*divmod(round(length_s / _MINUTE_S), 60))
    return "{}d{:02d}h".format(*divmod(round(length_s / _HOUR_S), 24))


def what(record: TaskRecord) -> str:
    """What a task is about: its label, or the task itself."""
    return record.label or record.task


def last_word(record: TaskRecord) -> str:
    """The last thing that is known of a task."""
    return record.error or record.terminal_summary or record.progress_summary or NOTHING


def record_members(record: TaskRecord) -> dict[str, Any]:
    """A record as a JSON object: every field, ``null`` where not set, metadata decoded.

    Fields that a newer version wrote and this one does not know are in ``unknown``.
    """
    members = asdict(record)
    del members["metadata_json"], members["unknown_json"]
    if record.requester_origin is not None:
        members["requester_origin"] = asdict(record.requester_origin)
    members["metadata"] = record.metadata
    if record.unknown_json is not None:
        members["unknown"] = msgspec.json.decode(record.unknown_json)
    return members


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON that is safe to print: what a terminal would obey is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # Such characters can only stand inside strings, where \u escapes mean the same.
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_json(value: object) -> None:
    """Print one JSON value: over several lines for a person, on one for a program."""
    print_line(to_json(value, indent=2 if sys.stdout.isatty() else None))


def print_line(text: str = "") -> None:
    """Print one line to standard output, as it is."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Tell the operator something on standard error."""
    sys.stdout.flush()
    sys.stderr.write(f"taskstore: {visible(text)}\n")
    sys.stderr.flush()


def print_lines(rows: Iterable[Sequence[str]]) -> None:
    """Print a line per row, with tabs in between."""
    for row in rows:
        print_line("\t".join(map(visible, row)))


def answer(
    as_json: bool, members: object, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print an answer: one JSON value, a table on a terminal, or lines with tabs in between."""
    if as_json:
        print_json(members)
    elif sys.stdout.isatty():
        print_table(columns, rows)
    else:
        print_lines(rows)


def verdict(as_json: bool, members: dict[str, Any], text: str) -> int:
    """Print what a check found, its ``problems`` first; returns the exit status."""
    if as_json:
        print_json(members)
        return 0 if members["ok"] else 1
    for problem in members["problems"]:
        print_line(f"problem: {visible(problem)}")
    if text:
        print_line(text)
    return 0 if members["ok"] else 1


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, stretch: str = ""
) -> None:
    """Print a table on a terminal."""
    console().print(table(columns, rows, stretch=stretch))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, stretch: str = "") -> Table:
    """A table for Rich.

    The column named ``stretch`` gets what the others leave, and its text is
    cut to that; nothing else is.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", expand=bool(stretch))
    for column in columns:
        if column == stretch:
            made.add_column(column, no_wrap=True, overflow="ellipsis", ratio=1)
        else:
            made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(safe_text, row))
    return made


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values, a value's further lines indented below it."""
    for name, value in fields:
        first, *more = value.split("\n")
        print_line(f"{name}: {visible(first)}")
        for line in more:
            print_line(f"    {visible(line)}")


def safe_text(text: str) -> Text:
    """Ledger text for Rich: no markup, nothing to obey; a status in its colour."""
    from rich.text import Text

    return Text(visible(text), style=STYLES.get(text, ""))


def console() -> Console:
    """A Rich console on standard output that takes text as it is."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def tell_report(store: TaskRegistryStore) -> None:
    """Tell on standard error what the store has to say: set-aside records and notices."""
    report = store.report()
    for item in report.quarantined:
        name = item.task_id or "an unknown task"
        if item.superseded:
            name = f"an earlier image of {name}"
        note(f"set aside: {name} in {item.where}: {item.reason}; its bytes are kept")
    for notice in report.notices:
        note(f"note: {notice}")
