"""Commands that ask: list, show, log, summary, changes.

They open the ledger read-only and let the store answer; none loads it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any

import typer

from taskstore.cli import ledger, render
from taskstore.cli.ledger import AsJson, Token, Url, moment, url_of
from taskstore.errors import TaskNotFound
from taskstore.model.journal import EntryKind, JournalEntry
from taskstore.model.query import SESSION_KEY, TaskQuery
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.registry import history
from taskstore.store.interface import TaskRegistryStore

FOLLOW_S = 3600.0
"""How long one wait for changes lasts before the next one begins."""

_NOT_IN_A_LOG = ("task_id", "revision", "run_digest", "last_event_at")


@contextmanager
def reading(ctx: typer.Context, url: str | None) -> Iterator[TaskRegistryStore]:
    """The ledger, opened to be read; what it has to report is told at the end."""
    with ledger.open_reader(url_of(ctx, url)) as store:
        try:
            yield store
        finally:
            render.tell_report(store)


def list_tasks(
    ctx: typer.Context,
    *,
    status: Annotated[
        list[TaskStatus] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="Only of this runtime, such as cli.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only with this owner key.")] = None,
    session: Annotated[
        str | None, typer.Option(help="Only of this session: the child's or the requester's.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Only of this run id.")] = None,
    since: Annotated[
        int | None,
        typer.Option(
            parser=moment,
            metavar="TIME",
            help="Only created since then: 2h, 3d, 2026-01-31T14:00Z or Unix milliseconds.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Go on where the page before ended.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """List tasks, newest first.

    On a terminal a table; elsewhere one line per task with tabs in between:
    id, status, runtime, owner, run, created, ended, label, task, last word.
    Times are UTC. With --json one object: tasks, next_cursor, seq.
    """
    given: dict[str, Any] = {
        "status": status,
        "runtime": runtime,
        "owner_key": owner,
        SESSION_KEY: session,
        "run_id": run,
    }
    filters = {name: value for name, value in given.items() if value}
    query = TaskQuery(since=since, limit=limit, after=after, **filters)
    with reading(ctx, url) as store:
        page = ledger.ask(store, query)
    if as_json:
        records = [render.record_members(record) for record in page]
        members = {"tasks": records, "next_cursor": page.next_cursor, "seq": page.seq}
        render.print_json(members)
        return
    if not sys.stdout.isatty():
        render.print_lines(map(_list_line, page))
    elif page:
        columns = ("TASK", "STATUS", "AGE", "TOOK", "WHAT")
        render.print_table(columns, map(_table_row, page), stretch="WHAT")
    else:
        render.note("no tasks match")
    if page.next_cursor is not None:
        options = ctx.params | {"after": page.next_cursor, "since": since}
        render.note(f"there are more; next page: {_command_again(options)}")


def _table_row(record: TaskRecord) -> Sequence[str]:
    about = f"{render.what(record)}: {render.last_word(record)}"
    age, took = render.ago(record.created_at), render.took(record)
    return (record.task_id, record.status, age, took, about)


def _list_line(record: TaskRecord) -> Sequence[str]:
    return (
        record.task_id,
        record.status,
        record.runtime,
        record.owner_key or render.NOTHING,
        record.run_id or render.NOTHING,
        render.when(record.created_at),
        render.when(record.ended_at),
        record.label or render.NOTHING,
        record.task,
        render.last_word(record),
    )


def _command_again(given: dict[str, Any]) -> str:
    """The list command with these options; the URL is left out, it may hold a password."""
    words = ["taskstore", "list"]
    for name, value in given.items():
        if name not in ("url", "as_json"):
            values = value if isinstance(value, list | tuple) else (value,)
            words += [f"--{name}={item}" for item in values if item is not None]
    return shlex.join(words)


def show(ctx: typer.Context, token: Token, *, as_json: AsJson = False, url: Url = None) -> None:
    """Show everything about one task.

    Of a run's or session's tasks the newest active one, or the newest.
    """
    with reading(ctx, url) as store:
        found = ledger.find(store, token)
    if found.others:
        render.note(f"others match too: {found.listing(token)}")
    members = render.record_members(found.record)
    if as_json:
        render.print_json(members)
    else:
        render.print_fields((name, _shown(name, value)) for name, value in members.items() if value)


def _shown(name: str, value: Any) -> str:
    """A field's value as people read it."""
    if value is None or value == {}:
        return render.NOTHING
    if name.endswith("_at") or name in ("cleanup_after", "lease_until"):
        return render.when(value, precise=True)
    return render.to_json(value) if isinstance(value, dict) else str(value)


def log(ctx: typer.Context, token: Token, *, as_json: AsJson = False, url: Url = None) -> None:
    """Show a task's history: what changed at each revision, also of a deleted task by its id.

    One line per changed field: seq, time, revision, field, before, after.
    """
    with reading(ctx, url) as store:
        history.journal_of(store, "log")
        try:
            task_id = ledger.find(store, token).record.task_id
        except TaskNotFound:
            task_id = token
        entries = history.history(store, task_id)
    if not entries:
        raise TaskNotFound(token)
    if entries[0].revision > 1:
        render.note(f"what was before revision {entries[0].revision} has been compacted away")
    steps = [
        (entry, changed_fields(before, entry))
        for before, entry in zip([None, *entries], entries, strict=False)
    ]
    if as_json:
        told = [_entry_members(entry) | {"changed": changed} for entry, changed in steps]
        complete = entries[0].revision == 1
        render.print_json({"task_id": task_id, "complete": complete, "entries": told})
        return
    rows = (row for entry, changed in steps for row in _log_rows(entry, changed))
    if sys.stdout.isatty():
        _print_log(rows)
    else:
        render.print_lines(rows)


def _print_log(rows: Iterable[Sequence[str]]) -> None:
    """For people: a paragraph for each revision, nothing cut off."""
    shown = None
    for seq, at, revision, field, before, after in rows:
        if shown != seq:
            shown = seq
            render.print_line(f"revision {revision}  {at}  seq {seq}")
        arrow = "" if before == render.NOTHING else f"{before} \N{RIGHTWARDS ARROW} "
        render.print_line(f"    {render.visible(f'{field}: {arrow}{after}')}")


def changed_fields(before: JournalEntry | None, entry: JournalEntry) -> dict[str, list[Any]]:
    """What an entry changed: field to [before, after]; everything that is set, for the first."""
    if entry.record is None:
        return {}
    old = {} if before is None or before.record is None else render.record_members(before.record)
    new = render.record_members(entry.record)
    return {
        name: [old.get(name), value]
        for name, value in new.items()
        if name not in _NOT_IN_A_LOG and (old.get(name) or None) != (value or None)
    }


def _log_rows(entry: JournalEntry, changed: dict[str, list[Any]]) -> Iterator[list[str]]:
    """A row for each field that an entry changed; metadata member by member."""
    place = [str(entry.seq), render.when(entry.at, precise=True), str(entry.revision)]
    if entry.kind is EntryKind.DELETED:
        yield [*place, "deleted", render.NOTHING, render.NOTHING]
    elif entry.record is None:
        yield [*place, "set aside", render.NOTHING, render.NOTHING]
    for name, (old, new) in changed.items():
        if name != "metadata":
            yield [*place, name, _shown(name, old), _shown(name, new)]
            continue
        before: dict[str, Any] = old or {}
        for key in sorted({*before, *new}):
            values = (_member(before, key), _member(new, key))
            if values[0] != values[1]:
                yield [*place, f"metadata.{key}", *values]


def _member(members: dict[str, Any], key: str) -> str:
    return render.to_json(members[key]) if key in members else render.NOTHING


def summary(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> None:
    """Count the tasks by status and by runtime."""
    with reading(ctx, url) as store:
        counted = ledger.count(store)
        location = store.location
    by_runtime = dict(sorted(counted.by_runtime.items()))
    members = {
        "total": counted.total,
        "active": counted.active,
        "by_status": {str(status): counted.by_status.get(status, 0) for status in TaskStatus},
        "by_runtime": by_runtime,
        "seq": counted.seq,
    }
    rows = [["total", "-", str(counted.total)], ["active", "-", str(counted.active)]]
    rows += [["status", s, str(counted.by_status[s])] for s in TaskStatus if s in counted.by_status]
    rows += [["runtime", name, str(n)] for name, n in by_runtime.items()]
    render.answer(as_json, members, ("", "", "TASKS"), rows)
    if sys.stdout.isatty() and not as_json:
        render.print_line(f"{render.visible(location)}, seq {counted.seq}")


def changes(
    ctx: typer.Context,
    *,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ|CURSOR",
            help="Only what came after this seq or cursor, or after now: head. Default: all.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Print the journal: every change, in the order in which it was committed.

    A line each with tabs in between: seq, time, kind, id, revision, status,
    what. With --json one object per line.
    """
    with reading(ctx, url) as store:
        for entry in islice(_entries(store, after, follow=follow), limit):
            members = _entry_members(entry)
            render.print_line(render.to_json(members) if as_json else _change_line(entry))
            if follow:
                sys.stdout.flush()


def _entries(
    store: TaskRegistryStore, after: str | None, *, follow: bool
) -> Iterator[JournalEntry]:
    journal = history.journal_of(store, "changes")
    if after is None:
        cursor: int | str = journal.floor() - 1
    elif after == "head":
        cursor = journal.head()
    else:
        cursor = after
    while True:
        for entry in history.changes(store, cursor, FOLLOW_S if follow else None):
            yield entry
            cursor = entry.cursor
        if not follow:
            return


def _entry_members(entry: JournalEntry) -> dict[str, Any]:
    """A journal entry as a JSON object."""
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
    cells = [str(entry.seq), render.when(entry.at), entry.kind, entry.task_id, str(entry.revision)]
    if record is None:
        cells += [render.NOTHING] * 2
    else:
        last = render.last_word(record)
        cells += [record.status, render.what(record) if last == render.NOTHING else last]
    return "\t".join(map(render.visible, cells))
