"""The JSON store: a ledger in a directory of readable files.

``docs/formats.md`` specifies the files byte by byte, and which of them are live.
"""

from taskstore.stores.jsonfile.store import JSONStore, open_json

__all__ = ["JSONStore", "open_json"]
