"""Journal entries that do not decode, kept when the journal is trimmed [12].

Such an entry was superseded: its task has gone on without it.  What is kept
of it is set aside without a ``task_id``, so that it stands in nobody's way;
of which task it was is said in its ``where``.
"""

from __future__ import annotations

import json
import re

from taskstore.journal import SetAside

_IMAGE_OF = re.compile(r' \(once an image of task ("(?:[^"\\]|\\.)*") at revision -?\d+\)$')


def keepsake(raw: bytes, where: str, reason: str, task_id: str, revision: int) -> SetAside:
    """What is set aside of an entry that is trimmed."""
    return SetAside(
        raw, f"{where} (once an image of task {json.dumps(task_id)} at revision {revision})", reason
    )


def kept_of(item: SetAside) -> str | None:
    """The task of which something is kept; ``None`` for what was set aside for itself."""
    found = _IMAGE_OF.search(item.where) if item.task_id is None else None
    return str(json.loads(found[1])) if found is not None else None
