"""The validation of records and of their field values.

All checks are in this module, so that every backend accepts the same records.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
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
    MIN_UNIX_MS,
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
READABLE_VERSION = re.compile(rf"{FORMAT_VERSION.partition('.')[0]}\.[0-9]+\Z")
"""The pattern of the record format versions that can be decoded."""
_RUNTIME = re.compile(r"[a-z][a-z0-9_.-]*\Z")
_NOT_STRUCTURAL = bytes(set(range(256)) - set(b'"{}[]'))
"""All bytes except quotation marks and brackets: these characters alone determine the nesting of
JSON."""
_ARRAYS_AS_OBJECTS = bytes.maketrans(b"[]", b"{}")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""The pattern of NUL and lone surrogates."""
_Enum = TypeVar("_Enum", bound=StrEnum)


def check_text(field: str, value: object, limit: int) -> str:
    """Return ``value`` if it is storable text of at most ``limit`` bytes of UTF-8.

    An instance of a subclass of ``str`` is converted to ``str``, because encoders and drivers
    require ``str``.  Raises :class:`ValidationError` for a value of another type, and for text
    that contains NUL (which PostgreSQL cannot store), contains a lone surrogate (which UTF-8
    cannot encode), or is over the limit.
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
            raise ValidationError(
                field, "contains a lone surrogate, which UTF-8 cannot encode"
            ) from None
    if size > limit:
        raise ValidationError(field, f"is {size} bytes long in UTF-8; the limit is {limit} bytes")
    if "\0" in value:
        raise ValidationError(field, "contains a NUL character")
    return value


def clean_text(field: str, value: object, limit: int) -> str:
    """Return ``value`` as storable text of at most ``limit`` bytes of UTF-8.

    The function serves texts whose content a caller does not control, such as error messages.
    Each NUL and each lone surrogate becomes U+FFFD.  A text that is then over the limit keeps its
    head and its tail: a mark such as ``…[4,096 bytes cut]…`` replaces the middle.  The result
    depends only on the arguments, and a second call changes nothing.  Raises
    :class:`ValidationError` only for a value that is not text.
    """
    if type(value) is not str:
        if not isinstance(value, str):
            raise ValidationError(field, f"must be text, not {type(value).__name__}")
        value = str.__str__(value)
    if value.isascii() and len(value) <= limit and "\0" not in value:
        return value  # the common case
    return _cut_middle(_UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value), limit)


def _cut_middle(text: str, limit: int) -> str:
    encoded = text.encode()
    size = len(encoded)
    if size <= limit:
        return text
    room = limit - len(_cut_mark(size).encode())  # no mark is longer than the mark of the whole
    # ``ignore`` drops the part of a code point at the cut.
    head = encoded[: room - room // 2].decode(errors="ignore")
    tail = encoded[size - room // 2 :].decode(errors="ignore")
    return head + _cut_mark(size - len(head.encode()) - len(tail.encode())) + tail


def _cut_mark(size: int) -> str:
    return f"…[{size:,} bytes cut]…"


def check_key(field: str, value: object) -> str:
    """Return ``value`` if it is a key: text of at most 255 bytes; identifiers must not be empty."""
    if type(value) is str and 0 < len(value) <= KEY_BYTES and value.isascii() and "\0" not in value:
        text = value  # the common case
    else:
        text = check_text(field, value, KEY_BYTES)
    if not text and field in NEVER_EMPTY:
        raise ValidationError(field, "must not be empty")
    if field == "runtime" and not _RUNTIME.match(text):
        raise ValidationError(field, f"must be a lower-case token, not {text!r}")
    return text


def check_int(field: str, value: object, minimum: int = 0) -> int:
    """Return ``value`` if it is an integer from ``minimum`` to 2**53 - 1."""
    if type(value) is not int:
        raise ValidationError(field, f"must be an integer, not {type(value).__name__}")
    if not minimum <= value <= MAX_INT:
        raise ValidationError(field, f"must be from {minimum} to {MAX_INT}, not {value}")
    return value


def check_time(field: str, value: object) -> int:
    """Return ``value`` if it is a time that a caller can give: Unix ms from 10**11 on.

    The limit detects a time that was given in seconds by mistake.  The times of a stored record
    have no such limit.
    """
    if type(value) is not int:
        raise ValidationError(
            field, f"must be an integer (Unix milliseconds), not {type(value).__name__}"
        )
    if MIN_UNIX_MS <= value <= MAX_INT:
        return value
    reason = f"must be Unix milliseconds, from {MIN_UNIX_MS} to {MAX_INT}, not {value}"
    if MIN_UNIX_MS <= value * 1000 <= MAX_INT:
        reason += f"; if this is a time in seconds, pass {value * 1000}"
    raise ValidationError(field, reason)


def check_seconds(field: str, value: object, minimum: float, maximum: float) -> float:
    """Return ``value`` if it is a number of seconds from ``minimum`` to ``maximum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValidationError(field, f"must be a number of seconds, not {type(value).__name__}")
    if not minimum <= value <= maximum:
        allowed = f"from {minimum} to {maximum:.0f}"
        raise ValidationError(field, f"must be a number of seconds {allowed}, not {value}")
    return value


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question that proposes the known name most similar to ``name``.

    The function returns an empty text if no known name is similar.
    """
    similar = difflib.get_close_matches(str(name)[:KEY_BYTES], list(known), n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def check_enum(field: str, value: object, kind: type[_Enum]) -> _Enum:
    """Return ``value`` if it is a member of ``kind``, or the member whose text is ``value``."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            return kind(value)
        actual = repr(value)
    else:
        actual = f"of type {type(value).__name__}"
    raise ValidationError(field, f"must be one of {', '.join(kind)}; the given value is {actual}")


def check_origin(field: str, value: object) -> DeliveryContext | None:
    """Return a :class:`DeliveryContext` with the fields of ``value``; ``None`` for ``None``."""
    if isinstance(value, Mapping):
        unknown = set(value) - set(DeliveryContext.__struct_fields__)
        if unknown:
            names = sorted(map(str, unknown))
            question = did_you_mean(names[0], DeliveryContext.__struct_fields__)
            raise ValidationError(
                field, f"contains {names}, which are not fields of DeliveryContext{question}"
            )
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
    """Return a JSON object as canonical bytes, with sorted keys and without white space.

    The function accepts only ``dict``, ``list``, ``tuple``, ``str``, ``int`` (64 bits),
    finite ``float``, ``bool`` and ``None``.  All other values, including NaN and
    infinities, raise :class:`ValidationError`.
    """
    encoded = msgspec.json.encode(plain_metadata(value), order="deterministic")
    if len(encoded) > METADATA_BYTES:
        raise ValidationError(
            "metadata", f"is {len(encoded)} bytes long; the limit is {METADATA_BYTES} bytes"
        )
    return Raw(encoded) if encoded != b"{}" else NO_METADATA


def plain_metadata(value: object) -> dict[str, Any]:
    """Return a deep copy of a JSON object; raise the same errors as :func:`encode_metadata`."""
    if not isinstance(value, Mapping):
        raise ValidationError("metadata", f"must be a mapping, not {type(value).__name__}")
    copied: Any = _plain_json(value, "metadata", METADATA_DEPTH)
    return copied  # type: ignore[no-any-return]  # a mapping is copied into a dict


def _plain_json(value: object, path: str, depth: int) -> object:
    """Return a deep copy of a JSON value, made of ``dict`` and ``list``; check every value."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return check_text(path, value, METADATA_BYTES)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValidationError(path, "contains an integer of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValidationError(path, f"contains {value}, which JSON cannot represent")
        return float(value)
    if depth == 0:
        raise ValidationError("metadata", f"is nested more than {METADATA_DEPTH} levels deep")
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
    raise ValidationError(
        path, f"contains a value of type {type(value).__name__}, which JSON does not support"
    )


def _check_metadata_bytes(_field: str, encoded: object) -> object:
    """Return ``encoded`` if it equals the output of :func:`encode_metadata`."""
    if encoded is NO_METADATA:
        return encoded
    if isinstance(encoded, Raw) and len(bytes(encoded)) > METADATA_BYTES:
        raise ValidationError("metadata", f"is more than {METADATA_BYTES} bytes long")
    value = _decoded("metadata", encoded, METADATA_DEPTH)
    if encode_metadata(value) != encoded:
        raise ValidationError("metadata", "is not in canonical form")
    return encoded


def _check_unknown(field: str, encoded: object) -> object:
    """Return ``encoded`` if it is a JSON object that contains no record field except ``v``."""
    members = _decoded(field, encoded, PAYLOAD_DEPTH)
    if not isinstance(members, dict):
        raise ValidationError(field, "must be a JSON object")
    known = _MEMBERS & set(members)
    if known:
        raise ValidationError(
            field, f"must not contain {sorted(known)}: these are fields of a record"
        )
    version = members.get("v", FORMAT_VERSION)
    if not isinstance(version, str) or not READABLE_VERSION.match(version):
        raise ValidationError(field, f"has a format version that cannot be decoded: {version!r}")
    return encoded


def _decoded(field: str, encoded: object, depth: int) -> object:
    if not isinstance(encoded, Raw):
        raise ValidationError(field, f"must be encoded JSON, not {type(encoded).__name__}")
    if exceeds_depth(bytes(encoded), depth):
        raise ValidationError(field, f"is nested more than {depth} levels deep")
    try:
        return msgspec.json.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValidationError(field, f"is not JSON: {error}") from None


def exceeds_depth(encoded: bytes, depth: int) -> bool:
    """Return whether JSON nests objects and arrays more than ``depth`` levels deep.

    The function counts brackets and does not decode the JSON, because the depth that a
    decoder accepts differs between Python versions.  The result for invalid JSON can be
    wrong, but a decoder refuses invalid JSON anyway.
    """
    if encoded.count(b"{") + encoded.count(b"[") <= depth:
        return False
    structure = encoded.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURAL)
    outside_strings = structure.replace(b'""', b"").split(b'"')[::2]
    brackets = b"".join(outside_strings).translate(_ARRAYS_AS_OBJECTS)
    for _ in range(depth):
        brackets = brackets.replace(b"{}", b"")  # removes the innermost level
    return b"{}" in brackets or brackets.count(b"{") > depth


def check_summary(field: str, value: object) -> str:
    """Return the text with each run of white space as one space, at most 4,096 bytes."""
    folded = " ".join(value.split()) if isinstance(value, str) else value
    return check_text(field, folded, SUMMARY_BYTES)


def clean_summary(field: str, value: object) -> str:
    """Return the text with each run of white space as one space, cleaned by :func:`clean_text`."""
    if isinstance(value, str):
        value = " ".join(value.split())
        if value.isascii() and len(value) <= SUMMARY_BYTES and "\0" not in value:
            return value  # the common case
    return clean_text(field, value, SUMMARY_BYTES)


CHECKS: dict[str, Callable[[str, object], Any]] = {
    **dict.fromkeys((*REQUIRED_KEYS, *OPTIONAL_KEYS), check_key),
    **{field: partial(check_text, limit=limit) for field, limit in TEXT_LIMITS.items()},
    "revision": partial(check_int, minimum=1),
    **dict.fromkeys(("created_at", *OPTIONAL_TIMES), check_int),
    **{field: partial(check_enum, kind=kind) for field, kind in ENUM_FIELDS.items()},
    "terminal_outcome": partial(check_enum, kind=TerminalOutcome),
    "requester_origin": check_origin,
    "metadata_json": _check_metadata_bytes,
    "unknown_json": _check_unknown,
}
"""The check of each field of a stored record.  A check returns the value, converted if
necessary, or raises :class:`ValidationError`."""

_NEVER_NONE = frozenset(
    {*REQUIRED_KEYS, "task", "revision", "created_at", *ENUM_FIELDS, "metadata_json"}
)


def validated(record: object) -> TaskRecord:
    """Return ``record`` if it is valid, with the text of enum fields converted to enum members.

    Raises :class:`ValidationError` for the first invalid field.
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
