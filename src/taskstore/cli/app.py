"""The command-line application: its commands, error output and exit statuses."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from taskstore.cli import change, db, demo, maintain, read, run
from taskstore.cli.ledger import URL_VARIABLE, UsageError, ledger_url
from taskstore.cli.render import OutputError, output_errors, print_line, print_note
from taskstore.errors import (
    BackendNotFoundError,
    CursorExpiredError,
    InvalidTransition,
    SchemaMismatchError,
    StoreUnavailableError,
    TaskNotFound,
    TaskStoreError,
    UnsupportedError,
    ValidationError,
)
from taskstore.store.opening import redacted, without_password

OK, FAILED, USAGE, ERROR = 0, 1, 2, 3
"""The exit statuses for success, for a failed check or request, for wrong usage and for a store
error."""
INTERRUPTED = 130
BROKEN_PIPE = 141
DEBUG_VARIABLE = "TASKSTORE_DEBUG"
"""If this environment variable is set, an unexpected error prints its traceback."""

app = typer.Typer(
    name="taskstore",
    help="A durable ledger of background tasks: record, query and maintain it.",
    epilog="Exit status: 0 success, 1 a failed check or request, 2 wrong usage, 3 a store error. "
    "`run` exits with the status of its command.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RECORD, QUERY, CHANGE, MAINTAIN = "Record", "Query", "Change", "Maintain"
"""The headings of the command groups in the help text."""

app.command(
    "run",
    rich_help_panel=RECORD,
    options_metavar="[OPTIONS] --",
    context_settings={"allow_interspersed_args": False},
)(run.run)
app.command("demo", rich_help_panel=RECORD)(demo.demo)
app.command("list", rich_help_panel=QUERY)(read.list_tasks)
app.command("show", rich_help_panel=QUERY)(read.show)
app.command("log", rich_help_panel=QUERY)(read.log)
app.command("summary", rich_help_panel=QUERY)(read.summary)
app.command("changes", rich_help_panel=QUERY)(read.changes)
app.command("cancel", rich_help_panel=CHANGE)(change.cancel)
app.command("notify", rich_help_panel=CHANGE)(change.notify)
app.command("delete", rich_help_panel=CHANGE)(change.delete)
app.command("compact", rich_help_panel=MAINTAIN)(maintain.compact)
app.command("verify", rich_help_panel=MAINTAIN)(maintain.verify)
app.command("backends", rich_help_panel=MAINTAIN)(maintain.backends)
app.command("contract", rich_help_panel=MAINTAIN)(maintain.contract)
app.add_typer(db.app, name="db", rich_help_panel=MAINTAIN)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_line(f"taskstore {version('taskstore')}")
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
            help="The URL of the ledger; the option can also follow the command.",
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
    """Run the command line ``argv`` (default: ``sys.argv``); return the exit status."""
    _prepare_streams()
    # The commands print the notices of a store, so the log messages are not printed too.
    if not (logger := logging.getLogger("taskstore")).handlers:
        logger.addHandler(logging.NullHandler())
    try:
        status = _invoke(sys.argv[1:] if argv is None else list(argv))
        with output_errors():
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output closed the pipe.
        _discard_output(sys.stdout, sys.stderr)
        return BROKEN_PIPE
    except OutputError as error:
        _discard_output(sys.stdout)
        print_error(str(error))
        return ERROR
    return status


def _discard_output(*streams: TextIO) -> None:
    """Redirect the output streams to the null device.

    Without this redirection, Python would try to write the rest of the output at exit, and print
    an error.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(null, stream.fileno())
    os.close(null)


def _invoke(arguments: list[str]) -> int:
    """Run one command; print an error on one line; return the exit status."""
    ctx: Any = None  # the class of contexts depends on Typer's version
    try:
        command = typer.main.get_command(app)
        with command.make_context("taskstore", arguments) as ctx:
            status = command.invoke(ctx)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return FAILED
    except (BrokenPipeError, OutputError):
        raise
    except TaskStoreError as error:
        _name_default_ledger(ctx, error)
        print_error(str(error), url=_url_in_use(ctx))
        return exit_status_of(error)
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        print_error(f"{error.strerror or error}{where}", url=_url_in_use(ctx))
        return ERROR
    except Exception as error:
        # The class of usage errors depends on Typer's version, so the code checks for a method.
        if hasattr(error, "format_message"):
            if message := error.format_message():  # the message is empty if the help was printed
                context = getattr(error, "ctx", None)
                path = "taskstore" if context is None else context.command_path
                # Some versions of Typer validate with pydantic, which adds these words.
                reason = message.replace(": Value error, ", ": ").rstrip(".")
                print_error(f"{_redact_words(reason)} (see {path} --help)")
            return USAGE
        if DEBUG_VARIABLE in os.environ:
            raise
        report = f"please report this error; {DEBUG_VARIABLE}=1 prints the traceback"
        text = _redact_words(f"unexpected {type(error).__name__}: {error}")
        print_error(f"{text} ({report})", url=_url_in_use(ctx))
        return ERROR
    return status if isinstance(status, int) else OK


def _name_default_ledger(ctx: Any, error: TaskStoreError) -> None:
    """If the choice of the default ledger can be the cause of an error, say so in the error's
    hint.

    The command uses the default ledger if the user has named no ledger.
    """
    chosen = None if ctx is None else ledger_url(ctx)
    if chosen is None or chosen.given_by != "default":
        return
    if isinstance(error, StoreUnavailableError | SchemaMismatchError):
        text = f"this is the default ledger; name another ledger with --url or {URL_VARIABLE}"
        error.hint = f"{error.hint}; {text}" if error.hint else text


def exit_status_of(error: TaskStoreError) -> int:
    """Return the exit status for an error of the store."""
    if isinstance(error, TaskNotFound | InvalidTransition | CursorExpiredError):
        return FAILED
    if isinstance(error, UsageError | ValidationError | BackendNotFoundError | UnsupportedError):
        return USAGE
    return ERROR


def print_error(text: str, *, url: str = "") -> None:
    """Print an error and its hint on standard error, in one line, without the password of ``url``.

    All other text stays as it is: a run id or a session key can look like a URL with a password,
    and a suggested command must name exactly this run or session.
    """
    with contextlib.suppress(OSError):
        print_note(without_password(text, url))


def _url_in_use(ctx: Any) -> str:
    """Return the URL of the ledger that the command uses; an empty text if the command has not
    determined a ledger."""
    chosen = None if ctx is None else ledger_url(ctx)
    return "" if chosen is None else chosen.url


def _redact_words(text: str) -> str:
    """Return a text without the passwords of all words that look like a URL.

    The function serves messages that other libraries made, which can contain the URL of a ledger
    that the user gave in the wrong place.  Each word is redacted by itself, because
    :func:`redacted` treats all text from a colon to an ``@`` as a password.
    """
    return re.sub(r"\S+", lambda word: redacted(word[0]), text)


def _prepare_streams() -> None:
    """Open file descriptors 0, 1 and 2 if they are closed; let the output streams accept any text.

    If descriptor 1 or 2 stayed closed, the next opened file (for example the database)
    would get the number 1 or 2, and printed output would be written into this file.
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
