"""The half in memory: the registry, and how it drives a store."""
