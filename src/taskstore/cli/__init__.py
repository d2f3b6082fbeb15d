"""The command line: ``taskstore``, one file per group of commands."""

from taskstore.cli.app import main

__all__ = ["main"]
