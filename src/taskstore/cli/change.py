"""Commands that change records: cancel, notify, delete."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import typer
from msgspec.structs import replace

from taskstore.cli import ledger, render
from taskstore.cli.ledger import Misuse, Token, Url, url_of
from taskstore.errors import ConflictError
from taskstore.model import lifecycle
from taskstore.model.journal import Put, Remove
from taskstore.model.lifecycle import Mutation
from taskstore.model.query import TaskQuery
from taskstore.model.records import ACTIVE_STATUSES, NotifyPolicy, TaskRecord
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.common.retry import Backoff

_T = TypeVar("_T")

ATTEMPTS = 20
"""How often a change is tried while other writers are faster."""


def cancel(
    ctx: typer.Context,
    token: Token,
    *,
    reason: Annotated[str | None, typer.Option(help="Kept as the task's error.")] = None,
    url: Url = None,
) -> None:
    """Record a task as cancelled. That stops nothing by itself: who runs it has to look."""
    with ledger.open_existing(url_of(ctx, url)) as store:
        task_id = only(store, token, status=ACTIVE_STATUSES).task_id
        record = change(store, task_id, lifecycle.cancel(reason))
    render.print_line(f"cancelled {render.visible(record.task_id)}")
    process = _process_of(record)
    if process is not None:
        render.note(f"its process was not stopped by this: {process}")


def notify(
    ctx: typer.Context,
    token: Token,
    policy: Annotated[NotifyPolicy, typer.Argument(help="What the owner wants to hear of.")],
    *,
    url: Url = None,
) -> None:
    """Set what a task's owner wants to hear of."""
    with ledger.open_existing(url_of(ctx, url)) as store:
        task_id = only(store, token).task_id
        record = change(store, task_id, lifecycle.notify(policy))
    render.print_line(f"{render.visible(record.task_id)} notifies {record.notify_policy}")


def delete(
    ctx: typer.Context,
    token: Token,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
) -> None:
    """Delete a task's record. Its text stays in the journal until compaction passes it."""
    with ledger.open_existing(url_of(ctx, url)) as store:
        record = only(store, token)
        if not yes:
            confirm(f"Delete {record.task_id} ({record.status}: {render.what(record)})?")
        remove(store, record.task_id)
    render.print_line(f"deleted {render.visible(record.task_id)}")


def change(
    store: TaskRegistryStore,
    task_id: str,
    mutation: Mutation,
    *,
    known: TaskRecord | None = None,
) -> TaskRecord:
    """Run a pure function over one record and store what comes out.

    ``known`` is the record as last seen: with it nothing is read first.
    When another writer was faster the function runs again on the fresh record.
    """

    def attempt() -> TaskRecord:
        nonlocal known
        record, known = known or ledger.get(store, task_id), None
        after = mutation(record, store.clock())
        if after is not record:
            # One revision, however many steps of the lifecycle the function takes.
            after = replace(after, revision=record.revision + 1)
            store.apply([Put(after)])
        return after

    return _until_no_conflict(attempt)


def remove(store: TaskRegistryStore, task_id: str) -> None:
    """Delete the record of a task, whatever revision it has come to."""
    _until_no_conflict(
        lambda: store.apply([Remove(task_id, ledger.get(store, task_id).revision + 1)])
    )


def _until_no_conflict(attempt: Callable[[], _T]) -> _T:
    """Do it again while other writers are faster, after a few milliseconds."""
    backoff = Backoff(0.002, 0.05)
    for _ in range(1, ATTEMPTS):
        with suppress(ConflictError):
            return attempt()
        backoff.sleep()
    return attempt()


def only(store: TaskRegistryStore, token: str, **preferred: Any) -> TaskRecord:
    """The one task that a token names; of several, the only one with the preferred fields.

    A change must not hit whichever task happens to be newest, so a token that
    names several is refused.
    """
    found = ledger.find(store, token)
    if not found.others:
        return found.record
    if preferred:
        preferred[found.field] = token
        matching = ledger.ask(store, TaskQuery(**preferred, limit=2))
        if len(matching) == 1:
            return matching[0]
    raise Misuse(f"{token!r} names several tasks; give the id of one", hint=found.listing(token))


def confirm(question: str) -> None:
    """Ask on the terminal; where there is none, ``--yes`` has to be given."""
    if not sys.stdin.isatty():
        raise Misuse("there is no terminal to ask on", hint="--yes goes on without")
    typer.confirm(render.visible(question), abort=True, err=True)


def _process_of(record: TaskRecord) -> str | None:
    """The process that ``taskstore run`` noted in a record, for a person."""
    metadata = record.metadata
    pid, host = metadata.get("pid"), metadata.get("host")
    if record.runtime != "cli" or type(pid) is not int or pid <= 1:
        return None
    if host != socket.gethostname():
        return f"pid {pid} on {host}"
    if not is_alive(pid):
        return None
    return f"kill {pid} ends it and its command"


def is_alive(pid: object) -> bool:
    """Whether a process of this machine has this number."""
    if type(pid) is not int or pid <= 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
