"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from taskstore.backends import default_url
from taskstore.errors import TaskStoreError
from taskstore.history import EARLIEST_TIME

URL_VARIABLE = "TASKSTORE_URL"
"""The environment variable that names the ledger when ``--url`` does not."""

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])?\Z")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help=f"The ledger, such as sqlite:///tasks.db; otherwise {URL_VARIABLE}, "
        "otherwise SQLite in your state directory.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Token = Annotated[
    str,
    typer.Argument(metavar="TOKEN", help="A task id, run id or session key.", show_default=False),
]


class Misuse(TaskStoreError):
    """The command cannot be meant like this; the message says why, ``hint`` what would do."""


def url_of(ctx: typer.Context, url: str | None) -> str:
    """The ledger's URL: after the command, before it, the environment, the default."""
    if url is None:
        url = ctx.find_root().params.get("url")
    return default_url() if url is None else url


def seconds(text: str) -> float:
    """Read a duration: ``90``, ``1.5s``, ``5m``, ``2h``, ``3d`` or ``1w``, as seconds."""
    match = _DURATION.match(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90, 1.5s, 5m, 2h or 3d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def positive_seconds(text: str) -> float:
    """Read a duration that is not nothing."""
    value = seconds(text)
    if not 0 < value < 10**9:
        raise typer.BadParameter(f"{text!r} is not a time that can be waited for")
    return value


def moment(text: str) -> int:
    """Read a time, as Unix milliseconds.

    ISO 8601 (UTC where it names no zone), Unix milliseconds, or so long ago: ``2h``.
    """
    text = text.strip()
    if text.isdecimal():
        if int(text) < EARLIEST_TIME:
            raise typer.BadParameter(
                f"{text!r} is not Unix milliseconds; for so long ago write a unit, as in {text}h"
            )
        return int(text)
    if _DURATION.match(text):
        return max(0, time.time_ns() // 1_000_000 - round(seconds(text) * 1000))
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a time: give 2026-01-31T14:00Z, 2h, 3d or Unix milliseconds"
        ) from None
    return int(when.replace(tzinfo=when.tzinfo or UTC).timestamp() * 1000)
