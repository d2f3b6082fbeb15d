"""Commands that change records: cancel, notify, delete."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Annotated, Any, TypeVar

import typer
from msgspec.structs import replace

from taskstore.cli import ledger, render
from taskstore.cli.ledger import TaskReference, Url, UsageError, url_of
from taskstore.errors import ConflictError
from taskstore.model import lifecycle
from taskstore.model.journal import Put, Remove
from taskstore.model.lifecycle import Mutation
from taskstore.model.query import TaskQuery
from taskstore.model.records import ACTIVE_STATUSES, NotifyPolicy, TaskRecord
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.common.retry import Backoff

_T = TypeVar("_T")

MAX_ATTEMPTS = 20
"""The maximum number of attempts of a change that conflicts with other writers."""


def open_for_change(
    ctx: typer.Context, url: str | None
) -> AbstractContextManager[TaskRegistryStore]:
    """Open the existing ledger for changes; its report is printed after the command."""
    return ledger.reporting(ledger.open_existing(url_of(ctx, url)))


def cancel(
    ctx: typer.Context,
    reference: TaskReference,
    *,
    reason: Annotated[
        str | None, typer.Option(help="The reason, which becomes the task's error.")
    ] = None,
    url: Url = None,
) -> None:
    """Record a task as cancelled. This stops no process: the runner must check the record."""
    with open_for_change(ctx, url) as store:
        task_id = find_one(ctx, store, reference, status=ACTIVE_STATUSES).task_id
        record = change(store, task_id, lifecycle.cancel(reason))
    render.print_line(f"cancelled {render.escape_controls(record.task_id)}")
    process = _process_hint(record)
    if process is not None:
        render.print_note(f"this command did not stop the task's process: {process}")


def notify(
    ctx: typer.Context,
    reference: TaskReference,
    policy: Annotated[
        NotifyPolicy, typer.Argument(help="The events that the owner is notified of.")
    ],
    *,
    url: Url = None,
) -> None:
    """Set the events that the owner of a task is notified of."""
    with open_for_change(ctx, url) as store:
        record = change(
            store, find_one(ctx, store, reference).task_id, lifecycle.set_notify_policy(policy)
        )
    task_id = render.escape_controls(record.task_id)
    render.print_line(f"the notify policy of {task_id} is {record.notify_policy}")


def delete(
    ctx: typer.Context,
    reference: TaskReference,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    url: Url = None,
) -> None:
    """Delete a task's record. The text stays in the journal until compaction trims the entries."""
    with open_for_change(ctx, url) as store:
        record = find_one(ctx, store, reference)
        if not yes:
            confirm(f"Delete {record.task_id} ({record.status}: {render.title_of(record)})?")
        remove(store, record.task_id)
    render.print_line(f"deleted {render.escape_controls(record.task_id)}")


def change(
    store: TaskRegistryStore,
    task_id: str,
    mutation: Mutation,
    *,
    known: TaskRecord | None = None,
) -> TaskRecord:
    """Apply ``mutation``, a pure function, to one record; store and return the new record.

    If ``known`` is given, the first attempt uses ``known`` as the current record and does not read
    the store.  After a conflict with another writer, ``mutation`` runs again on the current
    record.
    """

    def attempt() -> TaskRecord:
        nonlocal known
        record, known = known or ledger.get(store, task_id), None
        after = mutation(record, store.clock())
        if after is not record:
            # ``mutation`` can add several revisions; the store accepts only the next revision.
            after = replace(after, revision=record.revision + 1)
            store.apply([Put(after)])
        return after

    return _retry_conflicts(attempt)


def remove(store: TaskRegistryStore, task_id: str) -> None:
    """Delete the record of a task; retry after a conflict with another writer."""
    _retry_conflicts(
        lambda: store.apply([Remove(task_id, ledger.get(store, task_id).revision + 1)])
    )


def _retry_conflicts(attempt: Callable[[], _T]) -> _T:
    """Call ``attempt`` and return its result; after a ConflictError, wait and call it again."""
    backoff = Backoff(0.002, 0.05)
    for _ in range(1, MAX_ATTEMPTS):
        with suppress(ConflictError):
            return attempt()
        backoff.sleep()
    return attempt()


def find_one(
    ctx: typer.Context, store: TaskRegistryStore, reference: str, **preferred: Any
) -> TaskRecord:
    """Return the record of the task that a reference names.

    If a reference names several tasks, exactly one of these tasks must have the
    preferred field values; otherwise the function raises :class:`UsageError`.
    """
    match = ledger.find(store, reference)
    if not match.ambiguous:
        return match.record
    if preferred:
        preferred[match.field] = reference
        matching = ledger.run_query(store, TaskQuery(**preferred, limit=2))
        if len(matching) == 1:
            return matching[0]
    raise UsageError(
        f"{reference!r} names several tasks; give the id of one task",
        hint=ledger.suggested_command(ctx, *match.list_arguments(reference)),
    )


def confirm(question: str) -> None:
    """Ask the user to confirm; if there is no terminal, raise :class:`UsageError` (use
    ``--yes``)."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for confirmation", hint="confirm with --yes")
    typer.confirm(render.escape_controls(question), abort=True, err=True)


def _process_hint(record: TaskRecord) -> str | None:
    """Return a text about the ``taskstore run`` process of a task; ``None`` if no process runs."""
    metadata = record.metadata
    pid, host = metadata.get("pid"), metadata.get("host")
    if record.runtime != "cli" or type(pid) is not int or pid <= 1:
        return None
    if host != socket.gethostname():
        return f"pid {pid} on {host}"
    if not is_alive(pid):
        return None
    return f"kill {pid} stops this process and its command"


def is_alive(pid: object) -> bool:
    """Return whether a process with this pid exists on this machine."""
    if type(pid) is not int or pid <= 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
