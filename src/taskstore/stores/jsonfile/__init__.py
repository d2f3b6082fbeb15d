"""The JSON store: a ledger in a directory that people and other programs can read.

``docs/formats.md`` says what lies in the directory, byte by byte, and which
files count.
"""

from taskstore.stores.jsonfile.store import JSONStore, open_json

__all__ = ["JSONStore", "open_json"]
