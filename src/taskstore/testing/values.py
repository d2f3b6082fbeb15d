# ruff: noqa: RUF001 - the nasty values contain ambiguous characters
"""The nasty values: every backend stores them exactly or refuses them [11].

Each value has revealed a real defect, for example a collation that folds case,
a driver that expands ``%s``, a C string that ends at NUL, a JSON reader that
rounds integers above 2**53, an index that covers only the start of a text, or an
empty string that is read as null.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import Raw

from taskstore.model.records import (
    ERROR_BYTES,
    MAX_INT,
    METADATA_BYTES,
    METADATA_DEPTH,
    OPTIONAL_KEYS,
    SUMMARY_BYTES,
    TASK_BYTES,
    DeliveryContext,
    TaskStatus,
)


class Nasty(NamedTuple):
    """One nasty value.

    ``fields`` are the record fields with the nasty value.  ``refused`` is the field that the
    :class:`~taskstore.ValidationError` names, or ``None`` when the value must be stored
    and read back unchanged.  ``twin`` has the fields of a second record, which a
    defective backend confuses with the first record.
    """

    name: str
    fields: dict[str, Any]
    twin: dict[str, Any] | None = None
    refused: str | None = None


class _StrSubclass(str):
    """A subclass of ``str``; an encoder can reject its instances."""

    __slots__ = ()


def _distinct(name: str, value: str | None, twin: str | None) -> list[Nasty]:
    """Return a nasty label, and if ``value`` and ``twin`` are not empty, also a nasty task id."""
    rows = [Nasty(name, {"label": value}, {"label": twin})]
    if value and twin:
        rows.append(Nasty(f"{name}_id", {"task_id": value}, {"task_id": twin}))
    return rows


def _nested(depth: int) -> dict[str, Any]:
    """Return metadata that is nested ``depth`` levels deep."""
    value: Any = "leaf"
    for _ in range(depth - 1):
        value = [value]
    return {"deep": value}


def _sized(size: int) -> dict[str, Any]:
    """Return metadata that has ``size`` bytes in canonical JSON."""
    return {"m": "x" * (size - len('{"m":""}'))}


_DISTINCT = [
    *_distinct("case", "Inbox", "inbox"),
    *_distinct("trailing_space", "inbox ", "inbox"),
    *_distinct("leading_space", " inbox", "inbox"),
    *_distinct("trailing_newline", "inbox\n", "inbox"),
    *_distinct("line_ends", "in\r\nbox", "in\nbox"),
    *_distinct("tab", "in\tbox", "in box"),
    *_distinct("accents", "résumé", "resume"),
    *_distinct("combining", "e\u0301te\u0301", "été"),
    *_distinct("sharp_s", "straße", "strasse"),
    *_distinct("turkish_i", "Kadıköy", "Kadiköy"),
    *_distinct("ligature", "ﬁle", "file"),
    *_distinct("width", "ａｂ", "ab"),
    *_distinct("kana", "ひらがな", "ヒラガナ"),
    *_distinct("zero_width", "a\u200bb", "ab"),
    *_distinct("bom", "\ufeffa", "a"),
    *_distinct("emoji_joiner", "👩\u200d👩\u200d👧", "👩👩👧"),
    *_distinct("emoji_variant", "❤\ufe0f", "❤"),
    *_distinct("four_bytes", "𝔘𝔫𝔦🎉", "𝔘𝔫𝔦🎊"),
    *_distinct("leading_zeros", "007", "7"),
    *_distinct("exponent", "1e3", "1000"),
    *_distinct("minus_zero", "-0", "0"),
    *_distinct("wildcards", "a_b%", "axb1"),
    *_distinct("bracket_wildcards", "[ab]*?", "a*?"),
    *_distinct("empty_key", "", None),
    *_distinct("null_word", "null", None),
    *_distinct("None_word", "None", "none"),
    *_distinct("true_word", "true", "1"),
    *_distinct("path", "../../etc/passwd", "/etc/passwd"),
    *_distinct("backslashes", "C:\\new\\\\table", "C:\\new\\table"),
    *_distinct("url_escape", "%41%00", "A%00"),
    *_distinct("late_difference", "k" * 254 + "1", "k" * 254 + "2"),
    Nasty("empty_error", {"error": ""}, {"error": None}),
    Nasty("empty_summary", {"terminal_summary": ""}, {"terminal_summary": None}),
    Nasty("zero_time", {"started_at": 0}, {"started_at": None}),
    Nasty(
        "empty_origin",
        {"requester_origin": DeliveryContext()},
        {"requester_origin": None},
    ),
    Nasty(
        "empty_origin_parts",
        {"requester_origin": DeliveryContext(channel="", to=" ", thread_id="007")},
        {"requester_origin": DeliveryContext(to=" ", thread_id="7")},
    ),
]

_TEXT = [
    Nasty("empty_task", {"task": ""}),
    Nasty("spaces_only", {"task": "  \n\t "}, {"task": ""}),
    Nasty("right_to_left", {"task": "\u202eمرحبا بالعالم\u202c abc", "label": "שלום"}),
    Nasty("control_characters", {"task": "".join(map(chr, range(1, 32))) + "\x7f\x80\x85\x9f"}),
    Nasty("terminal_escapes", {"error": "\x1b[31mred\x1b[0m\x07\x08"}),
    Nasty("line_separators", {"task": "a\u2028b\u2029c\x0bd\x0ce\x85f"}),
    Nasty("noncharacters", {"task": "\ufffe\uffff\ufdd0\U0001ffff\U0010ffff"}),
    Nasty("private_use", {"label": "\ue000\U000f0000"}),
    Nasty("replacement", {"label": "\ufffd"}),
    Nasty("stacked_accents", {"task": "Z" + "\u0351\u036b\u0343" * 200}),
    Nasty("quotes", {"task": "'\"`''\"\"``", "label": "'; DROP TABLE tasks; --"}),
    Nasty("percent_signs", {"task": "100% %s %d %(task)s %% %", "label": "%s"}),
    Nasty(
        "bind_names", {"task": ":name :1 ::text \\:x ? ?1 $1 $$x$$ @p {0} {name}", "label": ":x"}
    ),
    Nasty("copy_escapes", {"task": "\\N \\. \\n \\x00 \\u0000 \\"}),
    Nasty("sql_words", {"label": "SELECT", "task_kind": "NULL", "source_id": "DEFAULT"}),
    Nasty("json_alike", {"task": '{"v":"9.9"}', "label": "[1]", "error": '"', "source_id": "{"}),
    Nasty("shell_and_markup", {"task": "$(rm -rf /) `x` <b>&amp;</b> [red]x[/red] */ /* --"}),
    Nasty("csv", {"task": '=1+1,"a";\tb\r\n', "error": "\r"}),
    Nasty("longest_key", {"label": "k" * 255, "task_id": "i" * 255, "owner_key": "o" * 255}),
    Nasty("longest_key_of_two_bytes", {"task_id": "é" * 127 + "x"}),
    Nasty("longest_key_of_four_bytes", {"label": "🎉" * 63 + "abc", "task_id": "🎉" * 63 + "abc"}),
    Nasty("longest_run", {"run_id": "r" * 255}),
    Nasty("every_key_at_its_longest", dict.fromkeys(OPTIONAL_KEYS, "é" * 127 + "x")),
    Nasty("longest_task", {"task": "t" * TASK_BYTES}),
    Nasty("longest_task_of_four_bytes", {"task": "🎉" * (TASK_BYTES // 4)}),
    Nasty("longest_task_of_escapes", {"task": '"\\\x01' * (TASK_BYTES // 3)}),
    Nasty("longest_error", {"error": "e" * ERROR_BYTES}),
    Nasty(
        "longest_summaries",
        dict.fromkeys(("progress_summary", "terminal_summary"), "é" * (SUMMARY_BYTES // 2)),
    ),
    Nasty(
        "another_type_of_text",
        {"label": _StrSubclass("sub"), "task": _StrSubclass("class"), "task_kind": TaskStatus.LOST},
    ),
    Nasty("status_as_text", {"status": "timed_out", "notify_policy": "silent"}),
    Nasty(
        "origin",
        {
            "requester_origin": DeliveryContext(
                channel="c" * 255, to="é" * 127, account_id="'%s\\", thread_id="🎉\n"
            )
        },
    ),
    Nasty("origin_as_mapping", {"requester_origin": {"channel": "mail", "to": "Ann"}}),
]

_NUMBERS = [
    Nasty("times_at_zero", {"created_at": 0, "started_at": 0, "ended_at": 0, "cleanup_after": 0}),
    Nasty(
        "times_at_most",
        {"created_at": MAX_INT, "ended_at": MAX_INT, "last_event_at": MAX_INT},
        {"created_at": MAX_INT - 1, "ended_at": MAX_INT - 1},
    ),
    Nasty("times_of_32_bits", {"created_at": 2**31, "started_at": 2**32, "ended_at": 2**32 + 1}),
    Nasty("time_of_2_to_53", {"created_at": 2**53}, refused="created_at"),
    Nasty("time_beyond_2_to_53", {"ended_at": 2**53 + 1}, refused="ended_at"),
    Nasty("time_beyond_64_bits", {"created_at": 2**64}, refused="created_at"),
    Nasty("time_below_zero", {"started_at": -1}, refused="started_at"),
    Nasty("time_as_float", {"created_at": 1.0}, refused="created_at"),
    Nasty("time_as_bool", {"created_at": True}, refused="created_at"),
    Nasty("time_as_text", {"cleanup_after": "0"}, refused="cleanup_after"),
    Nasty("no_time", {"created_at": None}, refused="created_at"),
    Nasty("revision_zero", {"revision": 0}, refused="revision"),
    Nasty("revision_of_2_to_53", {"revision": 2**53}, refused="revision"),
    Nasty("revision_as_bool", {"revision": True}, refused="revision"),
]

_METADATA = [
    Nasty("metadata_empty", {"metadata": {}}),
    Nasty(
        "metadata_ints",
        {"metadata": {"n": [2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 0, -1]}},
        {"metadata": {"n": [2**53, 2**63, -(2**63) + 1, 2**64 - 1, 0, -1]}},
    ),
    Nasty(
        "metadata_floats",
        {"metadata": {"n": [0.1, 1e308, 5e-324, -0.0, 1e22, 1.0, 1e16]}},
        {"metadata": {"n": [0.1, 1e308, 5e-324, 0.0, 1e22, 1, 1e16]}},
    ),
    Nasty(
        "metadata_bools",
        {"metadata": {"n": [True, False, None]}},
        {"metadata": {"n": [1, 0, None]}},
    ),
    Nasty(
        "metadata_keys",
        {
            "metadata": {
                "": 1,
                "a": 2,
                "A": 3,
                "a ": 4,
                "é": 5,
                "e\u0301": 6,
                "🎉": 7,
                "$.a[0]": 8,
                "\n": 9,
                '"': 10,
            }
        },
    ),
    Nasty("metadata_containers", {"metadata": {"l": [], "o": {}, "n": None, "ll": [[], [{}]]}}),
    Nasty("metadata_text", {"metadata": {"t": "\u2028\x01\x7f'%s:x\\\"/</script>\ufeff🎉"}}),
    Nasty("metadata_own_words", {"metadata": {"v": "9.9", "task_id": "x", "metadata": {"v": 1}}}),
    Nasty("metadata_deepest", {"metadata": _nested(METADATA_DEPTH)}),
    Nasty("metadata_longest", {"metadata": _sized(METADATA_BYTES)}),
    Nasty("metadata_too_deep", {"metadata": _nested(METADATA_DEPTH + 1)}, refused="metadata"),
    Nasty("metadata_far_too_deep", {"metadata": _nested(500)}, refused="metadata"),
    Nasty("metadata_too_long", {"metadata": _sized(METADATA_BYTES + 1)}, refused="metadata"),
    Nasty("metadata_nan", {"metadata": {"n": float("nan")}}, refused="metadata"),
    Nasty("metadata_infinity", {"metadata": {"n": [float("-inf")]}}, refused="metadata"),
    Nasty("metadata_int_beyond", {"metadata": {"n": 2**64}}, refused="metadata"),
    Nasty("metadata_int_below", {"metadata": {"n": -(2**63) - 1}}, refused="metadata"),
    Nasty("metadata_nul", {"metadata": {"n": ["a\0b"]}}, refused="metadata"),
    Nasty("metadata_nul_key", {"metadata": {"a\0b": 1}}, refused="metadata"),
    Nasty("metadata_surrogate", {"metadata": {"n": "\ud83c"}}, refused="metadata"),
    Nasty("metadata_bytes", {"metadata": {"n": b"x"}}, refused="metadata"),
    Nasty("metadata_set", {"metadata": {"n": {1}}}, refused="metadata"),
    Nasty("metadata_int_key", {"metadata": {1: 1}}, refused="metadata"),
    Nasty("metadata_list", {"metadata": [1]}, refused="metadata"),
    Nasty("metadata_not_canonical", {"metadata": Raw(b'{"a": 1}')}, refused="metadata"),
    Nasty("metadata_not_json", {"metadata": Raw(b'{"a":')}, refused="metadata"),
    Nasty(
        "metadata_abyss",
        {"metadata": Raw(b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}")},
        refused="metadata",
    ),
]

_REFUSED = [
    Nasty("nul_in_key", {"label": "a\0b"}, refused="label"),
    Nasty("nul_in_id", {"task_id": "a\0"}, refused="task_id"),
    Nasty("nul_in_task", {"task": "\0"}, refused="task"),
    Nasty(
        "nul_in_origin", {"requester_origin": DeliveryContext(to="\0")}, None, "requester_origin"
    ),
    Nasty("lone_surrogate", {"label": "\ud800"}, refused="label"),
    Nasty("lone_surrogate_in_task", {"task": "a\udfffb"}, refused="task"),
    Nasty("surrogate_pair", {"error": "\ud83c\udf89"}, refused="error"),
    Nasty("key_too_long", {"label": "k" * 256}, refused="label"),
    Nasty("key_too_long_in_bytes", {"child_session_key": "é" * 128}, refused="child_session_key"),
    Nasty("id_too_long", {"task_id": "🎉" * 64}, refused="task_id"),
    Nasty(
        "origin_too_long",
        {"requester_origin": DeliveryContext(channel="c" * 256)},
        None,
        "requester_origin",
    ),
    Nasty(
        "origin_of_another_shape", {"requester_origin": {"colour": "red"}}, None, "requester_origin"
    ),
    Nasty("origin_as_text", {"requester_origin": "mail"}, refused="requester_origin"),
    Nasty("task_too_long", {"task": "t" * (TASK_BYTES + 1)}, refused="task"),
    Nasty("task_too_long_in_bytes", {"task": "é" * (TASK_BYTES // 2) + "x"}, refused="task"),
    Nasty("error_too_long", {"error": "e" * (ERROR_BYTES + 1)}, refused="error"),
    Nasty("summary_too_long", {"progress_summary": "é" * 2049}, refused="progress_summary"),
    Nasty("empty_id", {"task_id": ""}, refused="task_id"),
    Nasty("empty_owner", {"owner_key": ""}, refused="owner_key"),
    Nasty("empty_run", {"run_id": "", "run_digest": None}, refused="run_id"),
    Nasty("empty_runtime", {"runtime": ""}, refused="runtime"),
    Nasty("no_id", {"task_id": None}, refused="task_id"),
    Nasty("no_task", {"task": None}, refused="task"),
    Nasty("no_status", {"status": None}, refused="status"),
    Nasty("bytes_as_text", {"task": b"bytes"}, refused="task"),
    Nasty("number_as_text", {"label": 5}, refused="label"),
    Nasty("runtime_in_capitals", {"runtime": "CLI"}, refused="runtime"),
    Nasty("runtime_with_newline", {"runtime": "cli\n"}, refused="runtime"),
    Nasty("runtime_of_wide_letters", {"runtime": "ａ"}, refused="runtime"),
    Nasty("unknown_status", {"status": "paused"}, refused="status"),
    Nasty("status_in_capitals", {"status": "QUEUED"}, refused="status"),
    Nasty("unknown_delivery", {"delivery_status": "lost"}, refused="delivery_status"),
    Nasty("unknown_policy", {"notify_policy": ""}, refused="notify_policy"),
    Nasty("unknown_outcome", {"terminal_outcome": "failed"}, refused="terminal_outcome"),
    Nasty("session_without_owner", {"scope_kind": "session"}, refused="owner_key"),
    Nasty("unknown_fields_not_json", {"unknown_json": Raw(b"{")}, refused="unknown_json"),
    Nasty("unknown_fields_known", {"unknown_json": Raw(b'{"task":"x"}')}, refused="unknown_json"),
]

NASTY: tuple[Nasty, ...] = (*_DISTINCT, *_TEXT, *_NUMBERS, *_METADATA, *_REFUSED)
"""All nasty values."""
STORED = tuple(row for row in NASTY if row.refused is None)
"""The nasty values that every backend stores and returns exactly."""
REFUSED = tuple(row for row in NASTY if row.refused is not None)
"""The nasty values that every backend refuses with a ValidationError that names the field."""
