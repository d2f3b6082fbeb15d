"""Commands that query: list, show, log, summary, changes.

The commands open the ledger read-only.  Queries run in the store, so a command does not
load the whole ledger.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Annotated, Any

import typer

from taskstore.cli import ledger, render
from taskstore.cli.ledger import AsJson, TaskReference, Url, parse_time, url_of
from taskstore.errors import CursorExpiredError, TaskNotFound
from taskstore.model.journal import EntryKind, JournalEntry
from taskstore.model.query import SESSION_KEY, Page, TaskQuery
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.registry import history
from taskstore.store.interface import TaskRegistryStore

FOLLOW_WAIT_S = 3600.0
"""The timeout of one wait for changes, in seconds; ``--follow`` repeats the wait."""

_UNLOGGED_FIELDS = ("task_id", "revision", "run_digest", "last_event_at")


def open_for_reading(
    ctx: typer.Context, url: str | None
) -> AbstractContextManager[TaskRegistryStore]:
    """Open the ledger read-only; its report is printed after the command."""
    return ledger.reporting(ledger.open_reader(url_of(ctx, url)))


def list_tasks(
    ctx: typer.Context,
    *,
    status: Annotated[
        list[TaskStatus] | None, typer.Option(help="Only tasks with this status; repeatable.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="Only tasks with this runtime.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only tasks with this owner key.")] = None,
    session: Annotated[
        str | None, typer.Option(help="Only tasks with this child or requester session key.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Only tasks with this run id.")] = None,
    since: Annotated[
        int | None,
        typer.Option(
            parser=parse_time,
            metavar="TIME",
            help="Only tasks created since TIME: 2h, 3d, 2026-01-31T14:00Z or Unix milliseconds.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of tasks.")] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Continue after the page with this cursor.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """List tasks, newest first.

    On a terminal, the command prints a table. The table shows only the end of each task id; this
    end is enough to name the task in another command. If the output is not a terminal, the command
    prints one tab-separated line per task: id, status, runtime, owner, run, created, ended, label,
    task, latest message. Times are in UTC. --json prints one object with tasks, next_cursor and
    seq.
    """
    options: dict[str, Any] = {
        "status": status,
        "runtime": runtime,
        "owner_key": owner,
        SESSION_KEY: session,
        "run_id": run,
    }
    # An empty text is a filter too: in a script, it is often a variable that is not set.
    filters = {name: value for name, value in options.items() if value or value == ""}
    query = TaskQuery(since=since, limit=limit, after=after, **filters)
    with open_for_reading(ctx, url) as store:
        parts = _Parts(ledger.stream_query(store, query))
        if as_json:
            render.print_json_members(_list_members(parts))
            return
        if not sys.stdout.isatty():
            render.print_lines(map(_list_line, parts))
        else:
            _print_list(store, list(parts))
    if parts.next_cursor is not None:
        arguments = _next_page_arguments(ctx.params | {"after": parts.next_cursor, "since": since})
        render.print_note(
            f"more tasks match; next page: {ledger.suggested_command(ctx, *arguments)}"
        )


class _Parts:
    """An iterable of the records in all parts of a page.

    After the iteration, ``next_cursor`` and ``seq`` are those of the page.
    """

    def __init__(self, parts: Iterator[Page]) -> None:
        self._parts = parts
        self.next_cursor: str | None = None
        self.seq = 0

    def __iter__(self) -> Iterator[TaskRecord]:
        for part in self._parts:
            self.next_cursor, self.seq = part.next_cursor, part.seq
            yield from part


def _list_members(parts: _Parts) -> Iterator[tuple[str, object]]:
    yield "tasks", map(render.record_members, parts)
    yield "next_cursor", parts.next_cursor
    yield "seq", parts.seq


def _print_list(store: TaskRegistryStore, records: Sequence[TaskRecord]) -> None:
    """Print a table of tasks on a terminal."""
    if not records:
        render.print_note("no task matches the options")
        return
    short = ledger.short_ids(store, [record.task_id for record in records])
    columns = ("TASK", "STATUS", "AGE", "TOOK", "WHAT")
    rows = ((short[record.task_id], *_table_cells(record)) for record in records)
    render.print_table(columns, rows, stretch="WHAT")


def _table_cells(record: TaskRecord) -> Sequence[str]:
    text = f"{render.title_of(record)}: {render.latest_message(record)}"
    age, elapsed = render.age_of(record.created_at), render.elapsed_of(record)
    return (record.status, age, elapsed, text)


def _list_line(record: TaskRecord) -> Sequence[str]:
    return (
        record.task_id,
        record.status,
        record.runtime,
        record.owner_key or render.EMPTY,
        record.run_id or render.EMPTY,
        render.iso_time(record.created_at),
        render.iso_time(record.ended_at),
        record.label or render.EMPTY,
        record.task,
        render.latest_message(record),
    )


def _next_page_arguments(options: dict[str, Any]) -> list[str]:
    """Return the arguments of the command that lists the next page, without the URL."""
    arguments = ["list"]
    for name, value in options.items():
        if name not in ("url", "as_json"):
            values = value if isinstance(value, list | tuple) else (value,)
            arguments += [f"--{name}={item}" for item in values if item is not None]
    return arguments


def show(
    ctx: typer.Context, reference: TaskReference, *, as_json: AsJson = False, url: Url = None
) -> None:
    """Show all fields of one task.

    For a run or session, the command shows the newest active task, or the newest task if
    no task is active.
    """
    with open_for_reading(ctx, url) as store:
        match = ledger.find(store, reference)
    if match.ambiguous:
        render.print_note(
            "other tasks also match; to list all of them: "
            f"{ledger.suggested_command(ctx, *match.list_arguments(reference))}"
        )
    members = render.record_members(match.record)
    if as_json:
        render.print_json(members)
    else:
        fields = ((name, _field_text(name, value)) for name, value in members.items() if value)
        render.print_fields(fields)


def _field_text(name: str, value: Any) -> str:
    """Format a field's value as readable text."""
    if value is None or value == {}:
        return render.EMPTY
    if name.endswith("_at") or name in ("cleanup_after", "lease_until"):
        return render.iso_time(value, precise=True)
    return render.to_json(value) if isinstance(value, dict) else str(value)


def log(
    ctx: typer.Context, reference: TaskReference, *, as_json: AsJson = False, url: Url = None
) -> None:
    """Show a task's history: the changed fields of each revision.

    For a deleted task, TASK must be the task id or its last characters. The command
    prints one line per changed field: seq, time, revision, field, before, after. If no
    history of the task is kept, the command prints the fields of the record, without seq
    and time. --json prints one object with task_id, complete, kept_from (the seq from which
    history is kept), record (null for a deleted task) and entries.
    """
    with open_for_reading(ctx, url) as store:
        journal = history.require_journal(store, "log")
        task_id, record = _find_logged(store, reference)
        entries = history.history(store, task_id)
        kept_from = journal.floor()
    if not entries and record is None:
        raise TaskNotFound(reference)
    first = entries[0].revision if entries else None
    if first != 1:
        before = "of this task" if first is None else f"before revision {first}"
        render.print_note(
            f"compaction removed the history {before}; history is kept from seq {kept_from} on"
        )
    steps = (
        (entry, changed_fields(before, entry))
        for before, entry in zip([None, *entries], entries, strict=False)
    )
    if as_json:
        members: list[tuple[str, object]] = [
            ("task_id", task_id),
            ("complete", first == 1),
            ("kept_from", kept_from),
            ("record", None if record is None else render.record_members(record)),
            ("entries", (_entry_members(e) | {"changed": changed} for e, changed in steps)),
        ]
        render.print_json_members(members)
        return
    rows: Iterator[Sequence[str]]
    rows = (row for entry, changed in steps for row in _log_rows(entry, changed))
    if not entries and record is not None:
        prefix = [render.EMPTY, render.EMPTY, str(record.revision)]
        rows = _changed_rows(prefix, _changed_members({}, render.record_members(record)))
    if sys.stdout.isatty():
        _print_log(rows)
    else:
        render.print_lines(rows)


def _find_logged(store: TaskRegistryStore, reference: str) -> tuple[str, TaskRecord | None]:
    """Return the id of the task that a reference names, and its record (``None`` for a deleted
    task).

    A match of a whole id takes precedence over a match of the end of an id.  A stored task takes
    precedence over a deleted task.
    """
    match = ledger.find_exactly(store, reference)
    if match is None and history.history(store, reference):
        return reference, None
    try:
        record = (match or ledger.find(store, reference)).record
    except TaskNotFound as error:
        try:
            return ledger.find_by_ending(store, reference, deleted=True), None
        except TaskNotFound:
            raise error from None
    return record.task_id, record


def _print_log(rows: Iterable[Sequence[str]]) -> None:
    """Print the history of a task on a terminal: one paragraph per revision."""
    last_seq = None
    for seq, at, revision, field, before, after in rows:
        if last_seq != seq:
            last_seq = seq
            when = "" if seq == render.EMPTY else f"  {at}  seq {seq}"
            render.print_line(f"revision {revision}{when}")
        arrow = "" if before == render.EMPTY else f"{before} \N{RIGHTWARDS ARROW} "
        render.print_line(f"    {render.escape_controls(f'{field}: {arrow}{after}')}")


def changed_fields(before: JournalEntry | None, entry: JournalEntry) -> dict[str, list[Any]]:
    """Return [before, after] for each changed field.  If there is no earlier entry, each
    field that is set is a changed field."""
    if entry.record is None:
        return {}
    old = {} if before is None or before.record is None else render.record_members(before.record)
    return _changed_members(old, render.record_members(entry.record))


def _changed_members(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [old.get(name), value]
        for name, value in new.items()
        if name not in _UNLOGGED_FIELDS and (old.get(name) or None) != (value or None)
    }


def _log_rows(entry: JournalEntry, changed: dict[str, list[Any]]) -> Iterator[Sequence[str]]:
    """Yield an output row for each changed field and metadata member of an entry."""
    prefix = [str(entry.seq), render.iso_time(entry.at, precise=True), str(entry.revision)]
    if entry.kind is EntryKind.DELETED:
        yield [*prefix, "deleted", render.EMPTY, render.EMPTY]
    elif entry.record is None:
        yield [*prefix, "quarantined", render.EMPTY, render.EMPTY]
    yield from _changed_rows(prefix, changed)


def _changed_rows(prefix: list[str], changed: dict[str, list[Any]]) -> Iterator[Sequence[str]]:
    for name, (old, new) in changed.items():
        if name != "metadata":
            yield [*prefix, name, _field_text(name, old), _field_text(name, new)]
            continue
        before: dict[str, Any] = old or {}
        for key in sorted({*before, *new}):
            values = (_member(before, key), _member(new, key))
            if values[0] != values[1]:
                yield [*prefix, f"metadata.{key}", *values]


def _member(members: dict[str, Any], key: str) -> str:
    return render.to_json(members[key]) if key in members else render.EMPTY


def summary(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> None:
    """Count the tasks by status and by runtime."""
    with open_for_reading(ctx, url) as store:
        counts = ledger.count(store)
        location = store.location
    by_runtime = dict(sorted(counts.by_runtime.items()))
    members = {
        "total": counts.total,
        "active": counts.active,
        "by_status": {str(status): counts.by_status.get(status, 0) for status in TaskStatus},
        "by_runtime": by_runtime,
        "seq": counts.seq,
    }
    rows = [["total", "-", str(counts.total)], ["active", "-", str(counts.active)]]
    rows += [["status", s, str(counts.by_status[s])] for s in TaskStatus if s in counts.by_status]
    rows += [["runtime", name, str(n)] for name, n in by_runtime.items()]
    render.print_result(as_json, members, ("", "", "TASKS"), rows)
    if sys.stdout.isatty() and not as_json:
        render.print_line(f"{render.escape_controls(location)}, seq {counts.seq}")


def changes(
    ctx: typer.Context,
    *,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ|CURSOR",
            help="Print changes after this seq, cursor or head (new changes only). Default: all.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new changes.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The maximum number of changes.")] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Print the journal: every change in commit order.

    The command prints one tab-separated line per change: seq, time, kind, id, revision,
    status, message. --json prints one object per line.
    """
    with open_for_reading(ctx, url) as store, _expired_cursors(ctx):
        for entry in islice(_entries(store, after, follow=follow), limit):
            members = _entry_members(entry)
            render.print_line(render.to_json(members) if as_json else _change_line(entry))
            if follow:
                with render.output_errors():
                    sys.stdout.flush()


@contextmanager
def _expired_cursors(ctx: typer.Context) -> Iterator[None]:
    """Replace the hint of a :class:`CursorExpiredError`, which is for programs, by a command."""
    try:
        yield
    except CursorExpiredError as error:
        options = {"--follow": "follow", "--json": "as_json"}
        words = [option for option, name in options.items() if ctx.params[name]]
        if ctx.params["limit"] is not None:
            words.append(f"--limit={ctx.params['limit']}")
        command = ledger.suggested_command(ctx, "changes", *words)
        error.hint = f"to print all changes that the journal retains, run: {command}"
        raise


def _entries(
    store: TaskRegistryStore, after: str | None, *, follow: bool
) -> Iterator[JournalEntry]:
    journal = history.require_journal(store, "changes")
    if after is None:
        cursor: int | str = journal.floor() - 1
    elif after == "head":
        cursor = journal.head()
    else:
        cursor = after
    while True:
        for entry in history.changes(store, cursor, FOLLOW_WAIT_S if follow else None):
            yield entry
            cursor = entry.cursor
        if not follow:
            return


def _entry_members(entry: JournalEntry) -> dict[str, Any]:
    """Return a journal entry as a JSON object."""
    members: dict[str, Any] = {
        "seq": entry.seq,
        "cursor": entry.cursor,
        "at": entry.at,
        "kind": str(entry.kind),
        "task_id": entry.task_id,
        "revision": entry.revision,
        "record": None if entry.record is None else render.record_members(entry.record),
    }
    if entry.quarantined is not None:
        members["quarantined"] = {
            "where": entry.quarantined.where,
            "reason": entry.quarantined.reason,
        }
    return members


def _change_line(entry: JournalEntry) -> str:
    record = entry.record
    at = render.iso_time(entry.at)
    cells = [str(entry.seq), at, entry.kind, entry.task_id, str(entry.revision)]
    if record is None:
        cells += [render.EMPTY] * 2
    else:
        last = render.latest_message(record)
        cells += [record.status, render.title_of(record) if last == render.EMPTY else last]
    return "\t".join(map(render.escape_controls, cells))
