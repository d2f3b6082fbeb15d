"""The JSON store: a ledger in a directory of readable files.

``docs/formats.md`` specifies the bytes of each file, and which files are live.
"""

from taskstore.stores.jsonfile.store import JSONStore, open_json

__all__ = ["JSONStore", "open_json"]
