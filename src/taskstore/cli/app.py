"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from taskstore.cli import change, db, demo, maintain, read, run
from taskstore.cli.ledger import URL_VARIABLE, Misuse
from taskstore.cli.render import note
from taskstore.errors import (
    BackendNotFoundError,
    CursorExpiredError,
    InvalidTransition,
    TaskNotFound,
    TaskStoreError,
    UnsupportedError,
    ValidationError,
)
from taskstore.store.opening import redacted

OK, FAILED, USAGE, ERROR = 0, 1, 2, 3
"""Exit statuses: fine; what was asked for is not so; wrong usage; store trouble."""
INTERRUPTED = 130
BROKEN_PIPE = 141
DEBUG_VARIABLE = "TASKSTORE_DEBUG"
"""Set to anything, this environment variable lets unexpected errors show their traceback."""

app = typer.Typer(
    name="taskstore",
    help="The durable ledger of background work: record it, ask about it, look after it.",
    epilog="Exit status: 0 fine, 1 what was asked for is not so, 2 wrong usage, 3 store trouble. "
    "`run` exits with the status of its command.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RECORD, ASK, CHANGE, CARE = "Record work", "Ask", "Change records", "Look after the ledger"

app.command(
    "run",
    rich_help_panel=RECORD,
    options_metavar="[OPTIONS] --",
    context_settings={"allow_interspersed_args": False},
)(run.run)
app.command("demo", rich_help_panel=RECORD)(demo.demo)
app.command("list", rich_help_panel=ASK)(read.list_tasks)
app.command("show", rich_help_panel=ASK)(read.show)
app.command("log", rich_help_panel=ASK)(read.log)
app.command("summary", rich_help_panel=ASK)(read.summary)
app.command("changes", rich_help_panel=ASK)(read.changes)
app.command("cancel", rich_help_panel=CHANGE)(change.cancel)
app.command("notify", rich_help_panel=CHANGE)(change.notify)
app.command("delete", rich_help_panel=CHANGE)(change.delete)
app.command("compact", rich_help_panel=CARE)(maintain.compact)
app.command("verify", rich_help_panel=CARE)(maintain.verify)
app.command("backends", rich_help_panel=CARE)(maintain.backends)
app.command("contract", rich_help_panel=CARE)(maintain.contract)
app.add_typer(db.app, name="db", rich_help_panel=CARE)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"taskstore {version('taskstore')}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    *,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            envvar=URL_VARIABLE,
            help="The ledger; may also stand after the command.",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Show the help when no command is given."""
    del url, version
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's); returns the exit status."""
    _prepare_streams()
    # What a store logs for its host it also reports; here that is told once.
    if not (logger := logging.getLogger("taskstore")).handlers:
        logger.addHandler(logging.NullHandler())
    try:
        status = _invoke(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more; without this Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _invoke(arguments: list[str]) -> int:
    """Run one command; every error becomes a line and a status."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("taskstore", arguments) as ctx:
            status = command.invoke(ctx)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return FAILED
    except BrokenPipeError:
        raise
    except TaskStoreError as error:
        complain(str(error))
        return status_of(error)
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        complain(f"{error.strerror or error}{where}")
        return ERROR
    except Exception as error:
        # Which library the exceptions of usage come from depends on Typer's version.
        if hasattr(error, "format_message"):
            if message := error.format_message():  # otherwise the help was shown instead
                context = getattr(error, "ctx", None)
                path = "taskstore" if context is None else context.command_path
                complain(f"{message.rstrip('.')} (see {path} --help)")
            return USAGE
        if DEBUG_VARIABLE in os.environ:
            raise
        report = f"please report it; {DEBUG_VARIABLE}=1 shows where it comes from"
        complain(f"unexpected {type(error).__name__}: {error} ({report})")
        return ERROR
    return status if isinstance(status, int) else OK


def status_of(error: TaskStoreError) -> int:
    """The exit status that an error of the store stands for."""
    if isinstance(error, TaskNotFound | InvalidTransition | CursorExpiredError):
        return FAILED
    if isinstance(error, Misuse | ValidationError | BackendNotFoundError | UnsupportedError):
        return USAGE
    return ERROR


def complain(text: str) -> None:
    """Say on standard error, in one line, what is wrong and what to do."""
    with contextlib.suppress(OSError):
        note(redacted(text))


def _prepare_streams() -> None:
    """Make sure that 0, 1 and 2 are open and take any character.

    Were one of them closed, the next file opened (the database, say) would
    become it, and what is printed would be written there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
