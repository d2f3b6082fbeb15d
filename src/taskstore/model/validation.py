"""What may stand in a record: checked here and nowhere else, so that every backend
accepts and refuses exactly the same records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from taskstore.errors import ValidationError
from taskstore.model.records import (
    ENUM_FIELDS,
    FORMAT_VERSION,
    KEY_BYTES,
    MAX_INT,
    METADATA_BYTES,
    METADATA_DEPTH,
    NEVER_EMPTY,
    NO_METADATA,
    OPTIONAL_KEYS,
    OPTIONAL_TIMES,
    PAYLOAD_DEPTH,
    REQUIRED_KEYS,
    SUMMARY_BYTES,
    TEXT_LIMITS,
    DeliveryContext,
    ScopeKind,
    TaskRecord,
    TerminalOutcome,
)

_MEMBERS = {field.encode_name for field in msgspec.structs.fields(TaskRecord)} - {"_unknown"}
SAME_MAJOR = re.compile(rf"{FORMAT_VERSION.partition('.')[0]}\.[0-9]+\Z")
"""The format versions that this version reads."""
_RUNTIME = re.compile(r"[a-z][a-z0-9_.-]*\Z")
_NO_SIGNS = bytes(set(range(256)) - set(b'"{}[]'))
"""Every byte that says nothing of how deep JSON nests."""
_ARRAYS_AS_OBJECTS = bytes.maketrans(b"[]", b"{}")
_OptionalEnum = TypeVar("_OptionalEnum", bound=StrEnum)


def check_text(field: str, value: object, limit: int) -> str:
    """Return ``value`` if it is storable text of at most ``limit`` bytes of UTF-8.

    A subclass of ``str`` becomes ``str``: encoders and drivers do not know it.
    Raises :class:`ValidationError` for another type, NUL (which PostgreSQL
    cannot hold), lone surrogates (which are not UTF-8) and over-long text.
    """
    if type(value) is not str:
        if not isinstance(value, str):
            raise ValidationError(field, f"must be text, not {type(value).__name__}")
        value = str.__str__(value)
    if value.isascii():
        size = len(value)
    else:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValidationError(field, "holds a lone surrogate, which is not text") from None
    if size > limit:
        raise ValidationError(field, f"is {size} bytes of UTF-8 long, at most {limit} are allowed")
    if "\0" in value:
        raise ValidationError(field, "holds a NUL character")
    return value


def check_key(field: str, value: object) -> str:
    """Return ``value`` if it is a key: text of at most 255 bytes, not empty where it identifies."""
    if type(value) is str and 0 < len(value) <= KEY_BYTES and value.isascii() and "\0" not in value:
        text = value  # as nearly every key is
    else:
        text = check_text(field, value, KEY_BYTES)
    if not text and field in NEVER_EMPTY:
        raise ValidationError(field, "must not be empty")
    if field == "runtime" and not _RUNTIME.match(text):
        raise ValidationError(field, f"must be a lower-case token, not {text!r}")
    return text


def check_int(field: str, value: object, least: int = 0) -> int:
    """Return ``value`` if it is an integer from ``least`` to 2**53 - 1."""
    if type(value) is not int:
        raise ValidationError(field, f"must be an integer, not {type(value).__name__}")
    if not least <= value <= MAX_INT:
        raise ValidationError(field, f"must be from {least} to {MAX_INT}, not {value}")
    return value


def check_seconds(field: str, value: object, least: float, most: float) -> float:
    """Return ``value`` if it is a number of seconds from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValidationError(field, f"must be seconds, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValidationError(field, f"must be seconds from {least} to {most:.0f}, not {value}")
    return value


def check_enum(field: str, value: object, kind: type[_OptionalEnum]) -> _OptionalEnum:
    """Return the member of ``kind`` that ``value`` is or spells."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            return kind(value)
        found = repr(value)
    else:
        found = type(value).__name__
    raise ValidationError(field, f"must be one of {', '.join(kind)}, not {found}")


def check_origin(field: str, value: object) -> DeliveryContext | None:
    """Return ``value`` as a :class:`DeliveryContext`; a mapping of its fields is taken too."""
    if isinstance(value, Mapping):
        unknown = set(value) - set(DeliveryContext.__struct_fields__)
        if unknown:
            raise ValidationError(field, f"has no field {sorted(map(str, unknown))}")
        value = DeliveryContext(**value)
    if value is None:
        return None
    if not isinstance(value, DeliveryContext):
        raise ValidationError(field, f"must be a DeliveryContext, not {type(value).__name__}")
    coerced = {}
    for name in DeliveryContext.__struct_fields__:
        part = getattr(value, name)
        if part is not None:
            text = check_text(f"{field}.{name}", part, KEY_BYTES)
            if text is not part:
                coerced[name] = text
    return replace(value, **coerced) if coerced else value


def encode_metadata(value: object) -> Raw:
    """Turn a JSON object into canonical bytes: sorted keys, no white space.

    Only ``dict``, ``list``, ``tuple``, ``str``, ``int`` (64 bits), finite
    ``float``, ``bool`` and ``None`` are taken; anything else, NaN and
    infinities included, raises :class:`ValidationError`.
    """
    encoded = msgspec.json.encode(plain_metadata(value), order="deterministic")
    if len(encoded) > METADATA_BYTES:
        raise ValidationError(
            "metadata", f"is {len(encoded)} bytes of JSON, at most {METADATA_BYTES} are allowed"
        )
    return Raw(encoded) if encoded != b"{}" else NO_METADATA


def plain_metadata(value: object) -> dict[str, Any]:
    """Copy a JSON object into plain containers that nobody else holds; errors as above."""
    if not isinstance(value, Mapping):
        raise ValidationError("metadata", f"must be a mapping, not {type(value).__name__}")
    copied: Any = _plain_json(value, "metadata", METADATA_DEPTH)
    return copied  # type: ignore[no-any-return]  # a mapping is copied into a dict


def _plain_json(value: object, path: str, depth: int) -> object:
    """Copy a JSON value into plain containers, checking every leaf."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return check_text(path, value, METADATA_BYTES)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValidationError(path, "holds an integer beyond 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValidationError(path, f"holds {value}, which is not JSON")
        return float(value)
    if depth == 0:
        raise ValidationError("metadata", f"is nested more than {METADATA_DEPTH} deep")
    if isinstance(value, Mapping):
        members = {}
        for key, member in value.items():
            name = check_text(f"{path} key", key, METADATA_BYTES)
            members[name] = _plain_json(member, f"{path}.{name}", depth - 1)
        return members
    if isinstance(value, list | tuple):
        return [
            _plain_json(item, f"{path}[{position}]", depth - 1)
            for position, item in enumerate(value)
        ]
    raise ValidationError(path, f"holds a {type(value).__name__}, which is not JSON")


def _check_metadata_bytes(_field: str, encoded: object) -> object:
    """Return ``encoded`` if it is metadata that came from :func:`encode_metadata`."""
    if encoded is NO_METADATA:
        return encoded
    if isinstance(encoded, Raw) and len(bytes(encoded)) > METADATA_BYTES:
        raise ValidationError("metadata", f"is over {METADATA_BYTES} bytes of JSON")
    value = _decoded("metadata", encoded, METADATA_DEPTH)
    if encode_metadata(value) != encoded:
        raise ValidationError("metadata", "is not in canonical form")
    return encoded


def _check_unknown(field: str, encoded: object) -> object:
    """Return ``encoded`` if it holds unknown members of a payload that can be decoded."""
    members = _decoded(field, encoded, PAYLOAD_DEPTH)
    if not isinstance(members, dict):
        raise ValidationError(field, "must be a JSON object")
    known = _MEMBERS & set(members)
    if known:
        raise ValidationError(field, f"holds {sorted(known)}, which are known fields")
    version = members.get("v", FORMAT_VERSION)
    if not isinstance(version, str) or not SAME_MAJOR.match(version):
        raise ValidationError(field, f"is of another format: {version!r}")
    return encoded


def _decoded(field: str, encoded: object, depth: int) -> object:
    if not isinstance(encoded, Raw):
        raise ValidationError(field, f"must be encoded JSON, not {type(encoded).__name__}")
    if nests_deeper(bytes(encoded), depth):
        raise ValidationError(field, f"is nested more than {depth} deep")
    try:
        return msgspec.json.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValidationError(field, f"is not JSON: {error}") from None


def nests_deeper(encoded: bytes, depth: int) -> bool:
    """Whether JSON nests objects and arrays more than ``depth`` deep.

    The text is not decoded, so the answer is the same on every interpreter.
    Text that is not JSON is not looked at closely: the decoder refuses it.
    """
    if encoded.count(b"{") + encoded.count(b"[") <= depth:
        return False
    signs = encoded.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_SIGNS)
    outside = signs.replace(b'""', b"").split(b'"')[::2]
    brackets = b"".join(outside).translate(_ARRAYS_AS_OBJECTS)
    for _ in range(depth):
        brackets = brackets.replace(b"{}", b"")  # the innermost ones, everywhere
    return b"{}" in brackets or brackets.count(b"{") > depth


def check_summary(field: str, value: object) -> str | None:
    """Return ``value`` as a summary: white space folded, of at most 4,096 bytes of UTF-8."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValidationError(field, f"must be text, not {type(value).__name__}")
    folded = " ".join(value.split())
    if folded.isascii() and len(folded) <= SUMMARY_BYTES and "\0" not in folded:
        return folded
    return check_text(field, folded, SUMMARY_BYTES)


CHECKS: dict[str, Callable[[str, object], Any]] = {
    **dict.fromkeys((*REQUIRED_KEYS, *OPTIONAL_KEYS), check_key),
    **{field: partial(check_text, limit=limit) for field, limit in TEXT_LIMITS.items()},
    "revision": partial(check_int, least=1),
    **dict.fromkeys(("created_at", *OPTIONAL_TIMES), check_int),
    **{field: partial(check_enum, kind=kind) for field, kind in ENUM_FIELDS.items()},
    "terminal_outcome": partial(check_enum, kind=TerminalOutcome),
    "requester_origin": check_origin,
    "metadata_json": _check_metadata_bytes,
    "unknown_json": _check_unknown,
}
"""What each field of a stored record is checked with: it returns the value, or what becomes
of it, and raises :class:`ValidationError`."""

_NEVER_NONE = frozenset(
    {*REQUIRED_KEYS, "task", "revision", "created_at", *ENUM_FIELDS, "metadata_json"}
)


def validated(record: object) -> TaskRecord:
    """Return ``record`` if it may be stored, its enum fields made members.

    Raises :class:`ValidationError` naming the first field that may not.
    """
    if not isinstance(record, TaskRecord):
        raise ValidationError("record", f"must be a TaskRecord, not {type(record).__name__}")
    coerced = {}
    for field, check in CHECKS.items():
        value = getattr(record, field)
        if value is not None or field in _NEVER_NONE:
            checked = check(field, value)
            if checked is not value:
                coerced[field] = checked
    valid = replace(record, **coerced) if coerced else record
    if valid.scope_kind is ScopeKind.SESSION and valid.owner_key is None:
        raise ValidationError("owner_key", "is required unless scope_kind is system")
    return valid
