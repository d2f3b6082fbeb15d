"""Values and pure functions: no I/O, no threads, no clock of their own."""
