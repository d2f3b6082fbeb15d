"""The survey: run a life, build what power losses leave of it, and open all of that."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from msgspec import Struct, field

from taskstore.testing.powerloss.life import Life
from taskstore.testing.powerloss.lives import LIVES
from taskstore.testing.powerloss.model import Model, State
from taskstore.testing.powerloss.recorder import Omits, Omitted, Recorder, Removed, Said, Synced
from taskstore.testing.powerloss.survival import Known, OpenOn, check

MOST = 32
"""How many states of one moment are opened at most, unless told otherwise."""

_STEPS = (
    *("open", "close", "pwrite", "truncate", "rename", "unlink", "mkdir"),
    *("sync_data", "sync_file", "sync_directory"),
)
_SHOWN = 5


class Survey(Struct, kw_only=True):
    """What was done, and what was found wrong.

    ``moments`` are those at which the power is lost, ``exhaustive`` those of
    them of which every state was opened; ``allowed`` counts all the states
    that the model allows, ``built`` those that were built, ``opened`` those
    of them that differ.  ``steps`` counts the file operations of the life, and
    ``sites`` from which places in the code they came.
    """

    steps: Counter[str] = field(default_factory=Counter)
    sites: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    moments: int = 0
    exhaustive: int = 0
    allowed: int = 0
    built: int = 0
    opened: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """Steps of the disk that the life never took."""
        return [step for step in _STEPS if not self.steps[step]]

    def __str__(self) -> str:
        steps = ", ".join(f"{self.steps[step]} {step}" for step in _STEPS)
        return "\n".join(
            [
                f"file operations      {self.steps.total()} ({steps})",
                f"moments              {self.moments}, every state of {self.exhaustive} of them",
                f"states allowed       {_figure(self.allowed)}",
                f"states built         {self.built}",
                f"states opened        {self.opened} that differ, in {self.seconds:.1f} s",
                f"problems             {len(self.problems) or 'none'}",
                *(f"  {problem}" for problem in self.problems[:_SHOWN]),
            ]
        )


def survey(
    open_on: OpenOn,
    *,
    lives: Sequence[Callable[[Life], object]] = LIVES,
    omits: Omits | None = None,
    most: int = MOST,
    seed: int = 20261122,
    stop: bool = False,
) -> Survey:
    """Prove a store that keeps files against power loss.

    ``open_on`` opens it; each of ``lives`` happens to a new ledger.  Of each
    moment at most ``most`` states are opened, drawn with ``seed`` where there
    are more.  ``stop`` ends with the first problem.  ``omits`` leaves syncs out, to see
    that it is noticed (:meth:`Recorder.disk`).
    """
    started = time.monotonic()
    found = Survey()
    with fast_directory() as scratch:
        for number, live in enumerate(lives):
            (root := scratch / f"life-{number}").mkdir()
            recorder = Recorder(root)
            live(life := Life(recorder, open_on, omits))
            model = Model(most=most, seed=seed)
            found.steps += recorder.steps
            found.sites += recorder.sites
            where = scratch / "state" / life.directory.relative_to(root)
            for moment, state, allowed in _states(recorder, found, model, broken=omits is not None):
                found.opened += 1
                build(state, scratch / "state")
                problem = check(open_on, where, allowed)
                if problem is not None:
                    operation = f"{recorder.log[moment - 1]!r:.80}"
                    found.problems.append(
                        f"{live.__name__}, after {moment} operations, the last {operation}, "
                        f"missing {state.missing}: {problem}"
                    )
                shutil.rmtree(scratch / "state")
                if stop and found.problems:
                    break
            if stop and found.problems:
                break
    found.seconds = time.monotonic() - started
    return found


def _states(
    recorder: Recorder, found: Survey, model: Model, *, broken: bool
) -> Iterator[tuple[int, State, Sequence[Known]]]:
    """The states that differ, in files or in what has to hold."""
    known: Sequence[Known] = ()
    # A sync that was left out makes a difference until the same file is synced or removed.
    unsynced: set[int] = set()
    done = 0
    seen: set[tuple[bytes, tuple[int, ...]]] = set()
    for moment in model.moments(recorder.log):
        for operation in recorder.log[done : moment.number]:
            if isinstance(operation, Omitted):
                unsynced.add(operation.node)
            elif isinstance(operation, Synced | Removed):
                unsynced.discard(operation.node)
        done = moment.number
        before, known = known, cast("Sequence[Known]", moment.said)
        if isinstance(recorder.log[moment.number - 1], Said) and set(before) <= set(known):
            continue  # what was allowed a moment ago still is
        if broken and not unsynced:
            continue
        found.moments += 1
        found.exhaustive += moment.exhaustive
        found.allowed += moment.allowed
        for state in moment.states:
            found.built += 1
            key = state.digest, tuple(map(id, known))
            if key not in seen:
                seen.add(key)
                yield moment.number, state, known


def build(state: State, place: Path) -> None:
    """Make the files of a state in a new directory."""
    place.mkdir()
    for path, data in state.tree.items():
        if data is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(data)


@contextlib.contextmanager
def fast_directory() -> Iterator[Path]:
    """A temporary directory, in memory where there is one: what is lost is ours to say."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="taskstore-power-", dir=place) as directory:
        yield Path(directory)


def _figure(number: int) -> str:
    return str(number) if number < 10**9 else f"{float(number):.1e}" if number < 10**300 else "…"
