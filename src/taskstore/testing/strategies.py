"""Hypothesis strategies for valid records and their fields.

``taskstore.testing.values`` lists invalid values.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from taskstore.model.records import (
    KEY_BYTES,
    MAX_INT,
    OPTIONAL_KEYS,
    OPTIONAL_TIMES,
    DeliveryContext,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.testing.factories import make_record

_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def texts(max_size: int = 80) -> st.SearchStrategy[str]:
    """Return a strategy for valid texts of up to ``max_size`` characters."""
    return st.text(_CHARACTERS, max_size=max_size)


def keys(min_size: int = 0) -> st.SearchStrategy[str]:
    """Return a strategy for keys: texts of at most 255 bytes of UTF-8."""
    return st.text(_CHARACTERS, min_size=min_size, max_size=KEY_BYTES // 4)


def times() -> st.SearchStrategy[int]:
    """Return a strategy for valid times in Unix milliseconds; many times are recent."""
    return st.integers(1_600_000_000_000, 1_800_000_000_000) | st.integers(0, MAX_INT)


def metadata() -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for valid metadata, as JSON objects."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts(20)
    )
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(10), inner, max_size=4),
        max_leaves=8,
    )
    return st.dictionaries(texts(10), values, max_size=4)


def origins() -> st.SearchStrategy[DeliveryContext]:
    """Return a strategy for delivery contexts of requesters."""
    part = st.none() | keys()
    return st.builds(DeliveryContext, channel=part, to=part, account_id=part, thread_id=part)


@st.composite
def records(draw: st.DrawFn, /, **fixed: Any) -> TaskRecord:
    """Return a strategy for valid records whose ``fixed`` fields have the given values."""
    fields: dict[str, Any] = {
        "task_id": draw(keys(1)),
        "revision": draw(st.integers(1, MAX_INT)),
        "runtime": draw(st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True)),
        "task": draw(texts()),
        "status": draw(st.sampled_from(TaskStatus)),
        "created_at": draw(times()),
    }
    optional: dict[str, st.SearchStrategy[Any]] = {
        **{field: keys(1) for field in OPTIONAL_KEYS},
        **{field: times() for field in OPTIONAL_TIMES},
        **{field: texts() for field in ("error", "progress_summary", "terminal_summary")},
        "scope_kind": st.sampled_from(ScopeKind),
        "delivery_status": st.sampled_from(DeliveryStatus),
        "notify_policy": st.sampled_from(NotifyPolicy),
        "terminal_outcome": st.sampled_from(TerminalOutcome),
        "requester_origin": origins(),
        "metadata": metadata(),
    }
    for field in draw(st.sets(st.sampled_from(sorted(optional)), max_size=8)):
        fields[field] = draw(optional[field])
    fields.setdefault("owner_key", "agent:main")
    return make_record(**{**fields, **fixed})
