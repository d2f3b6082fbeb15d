"""The last line of what a command printed, fit to be a progress summary."""

from __future__ import annotations

import re
import unicodedata

from taskstore.records import SUMMARY_BYTES
from taskstore.validation import fold_whitespace

KEPT_BYTES = 4 * SUMMARY_BYTES
"""How much of a line is looked at: enough for a summary after colours are removed."""

# CSI, OSC and the other string sequences, and the two-character ones (ECMA-48).
_TERMINAL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)|\x1b[ -/]*[0-~]", re.DOTALL
)


def summary_of(line: bytes) -> str:
    """A line of output as a summary: text without colours and controls, not too long."""
    text = _TERMINAL.sub("", line.decode(errors="replace"))
    text = "".join(
        char for char in fold_whitespace(text) if unicodedata.category(char) not in ("Cc", "Cs")
    )
    return fold_whitespace(text.encode()[:SUMMARY_BYTES].decode(errors="ignore"))


class LastLine:
    """Follows one stream of bytes; a carriage return ends a line too, as in progress bars.

    Memory is bounded however long a line gets.
    """

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> str | None:
        """Take what was printed; returns the last line that it completed, if it says anything."""
        lines, _, begun = (self._begun + chunk).replace(b"\r", b"\n").rpartition(b"\n")
        self._begun = begun[:KEPT_BYTES]
        while lines := lines.rstrip():
            lines, _, line = lines.rpartition(b"\n")
            if summary := summary_of(line[:KEPT_BYTES]):
                return summary
        return None

    def close(self) -> str | None:
        """The stream has ended: returns its last line if that was not completed."""
        return summary_of(self._begun) or None
