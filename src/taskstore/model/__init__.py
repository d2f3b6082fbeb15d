"""The data model: immutable values and pure functions, without I/O or threads."""
