"""The matrix: every fault at every step of every scenario, and what the caller got.

    python -m taskstore.testing.faults URL [--steps N] [--scenario NAME]

A new, empty ledger is made for it as for the contract suite; what is at the
URL stays untouched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, Self
from unittest import mock

from taskstore.errors import OutcomeUnknownError
from taskstore.model.journal import Snapshot
from taskstore.store import opening as backends
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import scheme_of
from taskstore.testing.faults import drivers, seam
from taskstore.testing.faults.door import HOLD_S, Door, Fault
from taskstore.testing.faults.files import FAULTS as FILE_FAULTS
from taskstore.testing.faults.files import Files
from taskstore.testing.faults.scenarios import SCENARIOS, Part, Scenario
from taskstore.testing.faults.stage import OpenRegistry, OpenStore, Seen, Stage, open_registry
from taskstore.testing.faults.verdict import Outcome, go_on, judge_callers, judge_sync
from taskstore.testing.scratch import scratch

PATIENCE_S = 60.0
"""How long a caller may take before it is given up for hung, in seconds."""


REFUSES = " !"
"""Marks a cell after which the instance takes no more writes until it is reopened."""


class Cell(NamedTuple):
    """One fault at one step: what the callers got, and what is wrong with that."""

    scenario: str
    number: int
    step: str
    fault: str
    side: str
    got: str
    problems: tuple[str, ...] = ()


class Layer(NamedTuple):
    """Where faults come in on one kind of store: which, and what is put around the store.

    ``remembers`` tells that an instance keeps something of what it read, so
    that only a new one shows what is stored.
    """

    faults: Sequence[Fault]
    wrap: Callable[[TaskRegistryStore], TaskRegistryStore]
    remembers: bool


@contextmanager
def layer_of(url: str, door: Door) -> Iterator[Layer]:
    """Intercept what the store behind a URL does; a wrapper where nothing lower is known."""
    scheme, rest = scheme_of(url), url.partition(":")[2]
    driver = _DRIVERS.get(scheme.partition("+")[0])
    if driver is not None:
        found = driver(door)
        with drivers.impatient(), found.entered():
            yield Layer(found.faults, _as_it_is, remembers=False)
    elif rest.startswith("///") and "?" not in rest:
        root = next(place for place in Path(rest[3:]).absolute().parents if place.is_dir())
        with Files(door, str(root)).entered():
            yield Layer(FILE_FAULTS, _as_it_is, remembers=True)
    else:
        yield Layer(seam.FAULTS, lambda store: seam.FaultyStore(store, door), remembers=True)


def _as_it_is(store: TaskRegistryStore) -> TaskRegistryStore:
    return store


_DRIVERS: dict[str, Callable[[Door], drivers.Driver]] = {
    "sqlite": drivers.SQLite,
    "postgresql": drivers.PostgreSQL,
    "mysql": drivers.MariaDB,
    "mariadb": drivers.MariaDB,
}


def run_matrix(
    url: str,
    *,
    steps: int | None = None,
    scenarios: Sequence[str] = (),
    wrap: Callable[[TaskRegistryStore], TaskRegistryStore] | None = None,
    make_registry: OpenRegistry = open_registry,
) -> list[Cell]:
    """Let every fault strike at every step, and judge what comes of it.

    ``steps`` limits how many steps of a scenario each fault strikes at: every
    fault then begins at another one.  ``scenarios`` are names, all by default.
    ``wrap`` puts something around each store that is played with, and
    ``make_registry`` makes the registry: broken ones show what is noticed.
    """
    door = Door()
    cells: list[Cell] = []
    # Looking for the backend takes longer than opening a ledger, and this opens thousands.
    declared = mock.patch.object(backends, "entry_points", cache(entry_points))
    with declared, layer_of(url, door) as layer:

        def wrapped(store: TaskRegistryStore) -> TaskRegistryStore:
            return layer.wrap(store if wrap is None else wrap(store))

        def make_stage(open_store: OpenStore) -> Stage:
            return Stage(open_store, wrapped, make_registry, remembers=layer.remembers)

        for scenario in SCENARIOS:
            if not scenarios or scenario.name in scenarios:
                player = _Player(url, scenario, door, make_stage)
                with player:
                    cells += player.play(layer.faults, steps)
    return cells


class _Player:
    """Plays one scenario, again and again, on one ledger or on new ones."""

    def __init__(
        self,
        url: str,
        scenario: Scenario,
        door: Door,
        make_stage: Callable[[OpenStore], Stage],
    ) -> None:
        self._url = url
        self._scenario = scenario
        self._door = door
        self._make_stage = make_stage
        self._stack = ExitStack()
        self._last = "nothing"

    def __enter__(self) -> Self:
        self._set()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set(self) -> None:
        """Have a stage: a new one with a new ledger, or the same as before."""
        self._stack.close()
        open_store = self._stack.enter_context(scratch(self._url))
        self._stage = self._make_stage(open_store)
        self._stack.callback(self._stage.leave)
        if not self._scenario.anew:
            # Written to once, so that the first time is no other than the next.
            self._stage.open().create(runtime="cli", task="There from the beginning")

    def play(self, faults: Sequence[Fault], steps: int | None) -> Iterator[Cell]:
        """Yield a cell for each fault and step."""
        if not self._scenario.anew and not isinstance(
            self._stage.playing().store, self._scenario.needs
        ):
            return
        yield self._once(0, None)
        found = self._door.steps
        for place, fault in enumerate(faults):
            fitting = [n for n, step in enumerate(found, 1) if fault.fits(step)]
            stride = 1 if steps is None else -(-len(fitting) // steps)
            for number in fitting[place % stride if fitting else 0 :: max(stride, 1)]:
                cell = self._once(number, fault)
                # What opens files or retries is not at the same step each time.
                if cell.step or cell.problems:
                    yield cell

    def _once(self, number: int, fault: Fault | None) -> Cell:
        """Play with one fault, and judge."""
        scenario, stage = self._scenario, self._stage
        if scenario.anew:
            self._set()
            stage = self._stage
        try:
            parts = scenario.prepare(stage)
            before = NOTHING if scenario.anew else stage.look()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            self._set()
            problem = f"before, in peace after {self._last}: {error!r}"
            return Cell(scenario.name, number, "", *_title(fault), "", (problem,))
        hold_s = HOLD_S if len(parts) > 1 else 0.0
        with self._door.opened(number, fault, hold_s=hold_s):
            outcomes = _act(parts)
        struck, later, refuses = self._door.struck, self._door.steps[number:], False
        is_open = stage.registry is not None
        problems: list[str] = []
        try:
            if not is_open:
                stage.open()
            elif scenario.lags or any(isinstance(o.error, OutcomeUnknownError) for o in outcomes):
                stage.playing().refresh()
            after = stage.look(verify=True)
            problems += judge_callers(parts, outcomes, before, after)
            problems += stage.differences(after)
            problems += after.problems
            refuses, more = go_on(stage, parts, after)
            problems += more
            problems += stage.differences(stage.look())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            problems.append(f"afterwards, in peace: {error!r}")
        if fault is not None:
            problems += judge_sync(fault, struck, later, outcomes, goes_on=is_open and not refuses)
        elif any(outcome.error is not None for outcome in outcomes):
            problems.append(f"without any fault: {[outcome.error for outcome in outcomes]}")
        if problems:
            self._set()
        label = struck.label if struck is not None else ""
        told = _told(outcomes, refuses=refuses)
        self._last = f"{' '.join(_title(fault))} {label}"
        return Cell(scenario.name, number, label, *_title(fault), told, tuple(problems))


NOTHING = Seen(Snapshot(0), {})


def _title(fault: Fault | None) -> tuple[str, str]:
    return (fault.name, fault.side) if fault is not None else ("", "")


def _act(parts: Sequence[Part]) -> list[Outcome]:
    """Make the calls, each in a thread of its own if they are several."""
    if len(parts) == 1:
        return [_call(parts[0])]
    outcomes = [Outcome(AssertionError("hung")) for _ in parts]

    def call(place: int) -> None:
        outcomes[place] = _call(parts[place])

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return list(outcomes)  # who is late has hung, whatever comes of it


def _call(part: Part) -> Outcome:
    try:
        part.act()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
        return Outcome(error)
    return Outcome(None)


def _told(outcomes: Sequence[Outcome], *, refuses: bool) -> str:
    names = sorted({outcome.name for outcome in outcomes}, key=lambda name: (name != "ok", name))
    return " + ".join(names) + (REFUSES if refuses else "")
