"""The JSON store: a ledger in a directory that people and other programs can read.

The format
----------

A directory (mode 0700 when we create it, files 0600) holds::

    journal-00000000000000000001.jsonl    segments: the number is their first seq
    journal-00000000000000000513.jsonl
    snapshot-00000000000000000512.json    every live record as of that seq
    lock                                  held by who writes; generation, and what is synced
    compact.lock                          held by the one who compacts or replaces
    journal-….jsonl.<offset>.torn         a torn line that was cut, as it was
    *.tmp                                 what a killed process had not finished

**Segments** are lines of JSON, each beginning with the CRC-32 (eight hex
digits) of what follows the comma after it, up to the newline.  The first line
is a header: the format, the ledger (32 hex digits), its timeline, the first
seq, and the time of the entry before it; ``base`` is true when the segment
continues a snapshot that replaced everything::

    {"crc":"…","format":"taskstore-journal/1","ledger":"…","timeline":1,"seq":1,"at":0,"base":false}

Each following line is one commit: its id (32 hex digits), the seq of its first
entry, its time (Unix milliseconds), its entries with contiguous seqs; a
``record`` is the payload as ``taskstore.codec`` encodes it::

    {"crc":"…","commit":"…","seq":7,"at":1700000000000,"entries":[
     {"kind":"upserted","task_id":"…","revision":1,"record":{…}},
     {"kind":"deleted","task_id":"…","revision":3}]}

(on one line).  Only the last line of the last segment may be damaged: it was
not completely written or damaged afterwards, counts as nothing, and is cut by the next writer.

**Snapshots** are JSON documents, one record a line in order of task_id, as
``taskstore.codec.write_snapshot`` writes them; the last line is the CRC-32 of
everything before it.  Their header also has ``ledger``, ``timeline``,
``floor`` (the first seq that counts) and ``deleted`` (task id to seq: the
deletions that the journal before it still holds).

**What counts**: the newest snapshot declares the floor.  Segments that begin
below it and snapshots older than floor - 1 are void.  A ``base`` segment
without the snapshot before it is void, too.  Current content is the newest
snapshot and the commits after it.  All files that count name one ledger and
timeline; :meth:`save_snapshot` over a ledger that is not empty begins the
next timeline.
"""

from taskstore.stores.jsonfile.store import JSONStore, open_json

__all__ = ["JSONStore", "open_json"]
