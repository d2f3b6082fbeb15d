"""Output formats: tables for terminals, tab-separated lines, and JSON.

Text in a ledger is untrusted.  Rich does not interpret this text as markup, and
control characters are printed as escape sequences.

JSON is UTF-8 (RFC 8259), whatever the locale is.  If standard output has another encoding,
JSON is printed in ASCII, with escape sequences for all other characters.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from msgspec.structs import asdict

from taskstore.model.records import TaskRecord
from taskstore.store.interface import TaskRegistryStore

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

EMPTY = "-"
"""The text that a table shows for a field that is not set."""

STYLES = {
    "queued": "cyan",
    "running": "bold blue",
    "succeeded": "green",
    "failed": "red",
    "timed_out": "red",
    "cancelled": "yellow",
    "lost": "magenta",
}
HELD_CHARACTERS = 1 << 20
"""The size from which :func:`held_output` keeps its output in a temporary file."""

_CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # harmless characters, which occur in Persian words and emoji
_UNSAFE_IN_JSON = re.compile(
    "[\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_NOT_ASCII = re.compile("[^\x00-\x7e]")
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_YEAR_10000_MS = 253_402_300_800_000


def escape_controls(text: str) -> str:
    """Return ``text`` as one line, in which control characters are escape sequences."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _CONTROL_CATEGORIES and char not in _JOINERS
        else char
        for char in text
    )


def iso_time(at: int | None, *, precise: bool = False) -> str:
    """Return a time as ISO 8601 text in UTC, with seconds or milliseconds."""
    if at is None:
        return EMPTY
    if at >= _YEAR_10000_MS:
        return f"{at} ms"
    text = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{at % 1000:03d}Z" if precise else f"{text}Z"


def age_of(at: int) -> str:
    """Return the rounded age of a time as text: 42s, 5m, 3h, 12d."""
    passed_s = max(0, time.time_ns() // 1_000_000 - at) / 1000
    for unit, length_s in (("d", _DAY_S), ("h", _HOUR_S), ("m", _MINUTE_S)):
        if passed_s >= 2 * length_s:
            return f"{passed_s // length_s:.0f}{unit}"
    return f"{passed_s:.0f}s"


def elapsed_of(record: TaskRecord) -> str:
    """Return how long an ended task ran, as text; ``EMPTY`` if the record does not show the
    time."""
    if record.started_at is None or record.ended_at is None:
        return EMPTY
    if record.ended_at < record.started_at:  # possible only for a record of another program
        return EMPTY
    return duration((record.ended_at - record.started_at) / 1000)


def duration(length_s: float) -> str:
    """Return a number of seconds as text: 4.2s, 3m05s, 7h30m, 12d04h."""
    if length_s < _MINUTE_S:
        return f"{length_s:.1f}s"
    if length_s < _HOUR_S:
        return "{}m{:02d}s".format(*divmod(round(length_s), _MINUTE_S))
    if length_s < 2 * _DAY_S:
        return "{}h{:02d}m".format(*divmod(round(length_s / _MINUTE_S), 60))
    return "{}d{:02d}h".format(*divmod(round(length_s / _HOUR_S), 24))


def title_of(record: TaskRecord) -> str:
    """Return the label of a task, or the task text if the label is not set."""
    return record.label or record.task


def latest_message(record: TaskRecord) -> str:
    """Return a task's error, else the terminal summary, else the progress summary."""
    return record.error or record.terminal_summary or record.progress_summary or EMPTY


def record_members(record: TaskRecord) -> dict[str, Any]:
    """Return a record as a JSON object with all fields (``null`` if not set).

    ``metadata`` is a decoded object.  ``unknown`` has the fields that this version of
    taskstore does not know.
    """
    members = asdict(record)
    del members["metadata_json"], members["unknown_json"]
    if record.requester_origin is not None:
        members["requester_origin"] = asdict(record.requester_origin)
    members["metadata"] = record.metadata
    if record.unknown_json is not None:
        members["unknown"] = msgspec.json.decode(record.unknown_json)
    return members


class OutputError(Exception):
    """Standard output cannot be written, for example because its disk is full."""


def prepare_json(wanted: bool) -> bool:
    """Prepare standard output for JSON if the option ``--json`` is given.

    If the encoding of standard output is not UTF-8, :func:`to_json` uses only ASCII characters.
    The stream must then encode these characters as ASCII, because an encoding such as UTF-16 would
    write other bytes.
    """
    stream = sys.stdout
    if wanted and isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
        stream.reconfigure(encoding="ascii")
    return wanted


def _is_utf8(stream: TextIO) -> bool:
    """Return whether a stream accepts all text and writes it as UTF-8 without a byte order mark."""
    return stream.encoding is None or codecs.lookup(stream.encoding).name == "utf-8"


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return JSON that is safe to print: control characters are escaped.

    A lone surrogate, as in the name of a file that is not UTF-8, becomes U+FFFD, because many
    JSON readers refuse lone surrogates.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # These characters occur only in JSON strings, where an escape sequence is equivalent.
    return (_UNSAFE_IN_JSON if _is_utf8(sys.stdout) else _NOT_ASCII).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    return "\\ufffd" if "\ud800" <= char <= "\udfff" else json.dumps(char)[1:-1]


def print_json(value: object) -> None:
    """Print one JSON value: with indentation on a terminal, otherwise on one line."""
    print_line(to_json(value, indent=2 if sys.stdout.isatty() else None))


def print_json_members(members: Iterable[tuple[str, object]]) -> None:
    """Print a JSON object like :func:`print_json`, but keep only one value in memory.

    ``members`` yields names and values.  A value that is an iterator becomes an array, whose items
    are encoded one by one.  The iteration over ``members`` can read the store, because the output
    is complete before the first byte is printed.
    """
    with held_output() as write:
        for chunk in _json_chunks(members, 2 if sys.stdout.isatty() else None):
            write(chunk)


def _json_chunks(members: Iterable[tuple[str, object]], indent: int | None) -> Iterator[str]:
    """Yield the text that ``json.dumps`` returns for an object with these members; end with a
    newline."""
    outer, inner = ("\n  ", "\n    ") if indent else ("", "")
    separator = "{" + outer
    for name, value in members:
        yield f"{separator}{to_json(name)}: "
        separator = f",{outer or ' '}"
        if not isinstance(value, Iterator):
            yield to_json(value, indent=indent).replace("\n", "\n  ")
            continue
        before = f"[{inner}"
        for item in value:
            yield before + to_json(item, indent=indent).replace("\n", "\n    ")
            before = f",{inner or ' '}"
        yield "[]" if before.startswith("[") else f"{outer}]"
    yield "\n}\n" if indent else "}\n"


@contextmanager
def held_output() -> Iterator[Callable[[str], object]]:
    """Yield a function that collects output; print the output at the end of the ``with`` block.

    If the block raises an error, nothing is printed, so a printed document is always complete.  A
    slow reader of the output does not delay the block, so a read transaction in the block is
    short.  Large output is kept in a temporary file without a name.
    """
    with tempfile.SpooledTemporaryFile(
        HELD_CHARACTERS, "w+", encoding="utf-8", errors="surrogatepass", newline=""
    ) as held:
        yield held.write
        held.seek(0)
        with output_errors():
            shutil.copyfileobj(held, sys.stdout, 1 << 16)


def print_line(text: str = "") -> None:
    """Print one line to standard output without changing the line."""
    with output_errors():
        sys.stdout.write(text + "\n")


@contextmanager
def output_errors() -> Iterator[None]:
    """Raise :class:`OutputError` if standard output cannot be written.

    If the reader of a pipe has ended, the error stays a ``BrokenPipeError``.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror or error}") from error


def print_note(text: str) -> None:
    """Print a note for the operator on standard error."""
    with output_errors():
        sys.stdout.flush()
    sys.stderr.write(f"taskstore: {escape_controls(text)}\n")
    sys.stderr.flush()


def print_lines(rows: Iterable[Sequence[str]]) -> None:
    """Print one line per row; tabs separate the columns.  The iteration over ``rows`` can read the
    store."""
    with held_output() as write:
        for row in rows:
            write("\t".join(map(escape_controls, row)) + "\n")


def print_result(
    as_json: bool, members: object, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print a result: one JSON value, a table on a terminal, or tab-separated lines."""
    if as_json:
        print_json(members)
    elif sys.stdout.isatty():
        print_table(columns, rows)
    else:
        print_lines(rows)


def print_check(as_json: bool, members: dict[str, Any], text: str) -> int:
    """Print the ``problems`` of a check, then ``text``; return the exit status."""
    if as_json:
        print_json(members)
        return 0 if members["ok"] else 1
    for problem in members["problems"]:
        print_line(f"problem: {escape_controls(problem)}")
    if text:
        print_line(text)
    return 0 if members["ok"] else 1


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, stretch: str = ""
) -> None:
    """Print a table on a terminal."""
    console().print(table(columns, rows, stretch=stretch))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, stretch: str = "") -> Table:
    """Build a Rich table.

    The column named ``stretch`` gets the width that the other columns leave, and text in
    this column is truncated to the width.  No other column is truncated.
    """
    from rich.table import Table

    rich_table = Table(box=None, pad_edge=False, header_style="bold", expand=bool(stretch))
    for column in columns:
        if column == stretch:
            rich_table.add_column(column, no_wrap=True, overflow="ellipsis", ratio=1)
        else:
            rich_table.add_column(column, overflow="fold")
    for row in rows:
        rich_table.add_row(*map(safe_text, row))
    return rich_table


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print field names and values; the second and later lines of a value are indented."""
    for name, value in fields:
        first, *more = value.split("\n")
        print_line(f"{name}: {escape_controls(first)}")
        for line in more:
            print_line(f"    {escape_controls(line)}")


def safe_text(text: str) -> Text:
    """Return Rich text without markup and control characters; a status gets its colour."""
    from rich.text import Text

    return Text(escape_controls(text), style=STYLES.get(text, ""))


def console() -> Console:
    """Return a Rich console on standard output that interprets no markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def print_report(store: TaskRegistryStore) -> None:
    """Print quarantined records and notices of a store on standard error."""
    report = store.report()
    for item in report.quarantined:
        name = item.task_id or "an unknown task"
        if item.superseded:
            name = f"an earlier revision of {name}"
        print_note(f"quarantined: {name} in {item.where}: {item.reason}; the stored bytes are kept")
    print_notices(report.notices)


def print_notices(notices: Iterable[str]) -> None:
    """Print notices of a store or a database on standard error."""
    for notice in notices:
        print_note(f"note: {notice}")
