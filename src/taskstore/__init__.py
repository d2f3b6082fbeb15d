"""taskstore: the durable ledger of background work for Python programs."""
