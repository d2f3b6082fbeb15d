"""The fault results: every fault at every step of every scenario.

    python -m taskstore.testing.faults URL [--steps N] [--scenario NAME]

The command creates new, empty ledgers, as the contract suite does.  The command does not
change the data at the URL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, Self
from unittest import mock

from taskstore.errors import OutcomeUnknownError
from taskstore.model.journal import Snapshot
from taskstore.store import opening as backends
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import scheme_of
from taskstore.testing.faults import drivers, faulty_store
from taskstore.testing.faults.files import FAULTS as FILE_FAULTS
from taskstore.testing.faults.files import Files
from taskstore.testing.faults.harness import Harness, OpenRegistry, OpenStore, State, open_registry
from taskstore.testing.faults.injection import HOLD_S, Fault, InjectionPoint
from taskstore.testing.faults.scenarios import SCENARIOS, Operation, Scenario
from taskstore.testing.faults.verdict import Outcome, check_callers, check_failed_sync, write_again
from taskstore.testing.scratch import scratch

CALLER_TIMEOUT_S = 60.0
"""The time after which a call counts as hung, in seconds."""

REFUSES = " !"
"""Marks a cell if the store refuses writes after the fault, until the store is reopened."""


class Cell(NamedTuple):
    """The result of one fault at one step: the outcomes of the calls, and the problems."""

    scenario: str
    number: int
    step: str
    fault: str
    timing: str
    outcome: str
    problems: tuple[str, ...] = ()


class Layer(NamedTuple):
    """The faults for one kind of store, and the function that wraps each store under test.

    If ``caches_reads`` is true, a store instance caches data, so only a new
    instance is certain to return the stored state.
    """

    faults: Sequence[Fault]
    wrap: Callable[[TaskRegistryStore], TaskRegistryStore]
    caches_reads: bool


@contextmanager
def layer_of(url: str, injection: InjectionPoint) -> Iterator[Layer]:
    """Yield the layer for a URL; intercept driver or file calls while the ``with`` body runs."""
    scheme, rest = scheme_of(url), url.partition(":")[2]
    driver_class = _DRIVERS.get(scheme.partition("+")[0])
    if driver_class is not None:
        driver = driver_class(injection)
        with drivers.short_timeouts(), driver.installed():
            yield Layer(driver.faults, _unwrapped, caches_reads=False)
    elif rest.startswith("///") and "?" not in rest:
        root = next(parent for parent in Path(rest[3:]).absolute().parents if parent.is_dir())
        with Files(injection, str(root)).installed():
            yield Layer(FILE_FAULTS, _unwrapped, caches_reads=True)
    else:
        wrap = partial(faulty_store.FaultyStore, injection=injection)
        yield Layer(faulty_store.FAULTS, wrap, caches_reads=True)


def _unwrapped(store: TaskRegistryStore) -> TaskRegistryStore:
    return store


_DRIVERS: dict[str, Callable[[InjectionPoint], drivers.Driver]] = {
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
    """Inject every fault at every step of the scenarios; return a cell per fault and step.

    ``steps`` limits the number of steps per scenario at which each fault is injected;
    the first of these steps is different for each fault.  ``scenarios`` has the names of the
    scenarios to run (default: all).  ``wrap`` wraps each store under test, and
    ``make_registry`` creates the registry, so that a test can use a defective store or
    registry.
    """
    injection = InjectionPoint()
    cells: list[Cell] = []
    # Cache the entry points: this function opens thousands of stores, and a lookup is slow.
    declared = mock.patch.object(backends, "entry_points", cache(entry_points))
    with declared, layer_of(url, injection) as layer:

        def wrapped(store: TaskRegistryStore) -> TaskRegistryStore:
            return layer.wrap(store if wrap is None else wrap(store))

        def make_harness(open_store: OpenStore) -> Harness:
            return Harness(open_store, wrapped, make_registry, caches_reads=layer.caches_reads)

        for scenario in SCENARIOS:
            if not scenarios or scenario.name in scenarios:
                with _ScenarioRunner(url, scenario, injection, make_harness) as runner:
                    cells += runner.run(layer.faults, steps)
    return cells


class _ScenarioRunner:
    """Runs one scenario once per fault and step.

    If ``new_ledger`` of the scenario is true, each run starts on a new ledger.
    """

    def __init__(
        self,
        url: str,
        scenario: Scenario,
        injection: InjectionPoint,
        make_harness: Callable[[OpenStore], Harness],
    ) -> None:
        self._url = url
        self._scenario = scenario
        self._injection = injection
        self._make_harness = make_harness
        self._stack = ExitStack()
        self._last_fault = "none"

    def __enter__(self) -> Self:
        self._reset()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _reset(self) -> None:
        """Create a new ledger and a harness for this ledger."""
        self._stack.close()
        open_store = self._stack.enter_context(scratch(self._url))
        self._harness = self._make_harness(open_store)
        self._stack.callback(self._harness.close_all)
        if not self._scenario.new_ledger:
            # The first write to a ledger can have other steps than later writes, so make the
            # first write here, without a fault.
            self._harness.open().create(runtime="cli", task="First task")

    def run(self, faults: Sequence[Fault], steps: int | None) -> Iterator[Cell]:
        """Yield a cell for a run without a fault, then a cell for each fault and step."""
        if not self._scenario.new_ledger and not isinstance(
            self._harness.opened().store, self._scenario.needs
        ):
            return
        yield self._run_once(0, None)
        recorded = self._injection.steps
        for index, fault in enumerate(faults):
            numbers = [n for n, step in enumerate(recorded, 1) if fault.applies_to(step)]
            stride = 1 if steps is None else -(-len(numbers) // steps)
            for number in numbers[index % stride if numbers else 0 :: max(stride, 1)]:
                cell = self._run_once(number, fault)
                # The number of retries and file opens varies, so a run can lack this step.
                if cell.step or cell.problems:
                    yield cell

    def _run_once(self, number: int, fault: Fault | None) -> Cell:
        """Run the scenario with one fault or none, check the result, and return the cell."""
        scenario, harness = self._scenario, self._harness
        if scenario.new_ledger:
            self._reset()
            harness = self._harness
        try:
            operations = scenario.prepare(harness)
            before = EMPTY if scenario.new_ledger else harness.read_stored()
        except Exception as error:  # noqa: BLE001 - every error is a problem
            self._reset()
            problem = f"the preparation after {self._last_fault} raised {error!r}"
            return Cell(scenario.name, number, "", *_title(fault), "", (problem,))
        hold_s = HOLD_S if len(operations) > 1 else 0.0
        with self._injection.arm(number, fault, hold_s=hold_s):
            outcomes = _call_all(operations)
        faulted, later, refuses = self._injection.faulted, self._injection.steps[number:], False
        is_open = harness.registry is not None
        problems: list[str] = []
        try:
            if not is_open:
                harness.open()
            elif scenario.stale or any(isinstance(o.error, OutcomeUnknownError) for o in outcomes):
                harness.opened().refresh()
            after = harness.read_stored(verify=True)
            problems += check_callers(operations, outcomes, before, after)
            problems += harness.differences(after)
            problems += after.problems
            refuses, more = write_again(harness, operations, after)
            problems += more
            problems += harness.differences(harness.read_stored())
        except Exception as error:  # noqa: BLE001 - every error is a problem
            problems.append(f"the checks after the fault raised {error!r}")
        if fault is not None:
            problems += check_failed_sync(
                fault, faulted, later, outcomes, writable=is_open and not refuses
            )
        elif any(outcome.error is not None for outcome in outcomes):
            problems.append(
                f"no fault was injected, but calls raised {[outcome.error for outcome in outcomes]}"
            )
        if problems:
            self._reset()
        label = faulted.label if faulted is not None else ""
        names = _outcome_names(outcomes, refuses=refuses)
        self._last_fault = f"{' '.join(_title(fault))} {label}"
        return Cell(scenario.name, number, label, *_title(fault), names, tuple(problems))


EMPTY = State(Snapshot(0), {})


def _title(fault: Fault | None) -> tuple[str, str]:
    return (fault.name, fault.timing) if fault is not None else ("", "")


def _call_all(operations: Sequence[Operation]) -> list[Outcome]:
    """Call the operations and return the outcomes; several operations run in separate threads."""
    if len(operations) == 1:
        return [_call(operations[0])]
    outcomes = [Outcome(AssertionError("hung")) for _ in operations]

    def call(index: int) -> None:
        outcomes[index] = _call(operations[index])

    numbers = range(len(operations))
    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CALLER_TIMEOUT_S)
    return list(outcomes)  # a copy, so that a call that returns later counts as hung


def _call(operation: Operation) -> Outcome:
    try:
        operation.call()
    except Exception as error:  # noqa: BLE001 - the error is the outcome
        return Outcome(error)
    return Outcome(None)


def _outcome_names(outcomes: Sequence[Outcome], *, refuses: bool) -> str:
    names = sorted({outcome.name for outcome in outcomes}, key=lambda name: (name != "ok", name))
    return " + ".join(names) + (REFUSES if refuses else "")
