"""The JSON store: a ledger in a directory of readable files.

``docs/formats.md`` specifies the bytes of each file, and how to tell the live files from obsolete
files.
"""

from taskstore.stores.jsonfile.store import JSONStore, open_json

__all__ = ["JSONStore", "open_json"]
