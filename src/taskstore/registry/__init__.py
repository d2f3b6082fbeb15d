"""The registry, its record cache, commits, events and indexes, on top of a store."""
