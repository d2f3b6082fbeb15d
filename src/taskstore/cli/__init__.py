"""The command line ``taskstore``, with one file for each group of commands."""

from taskstore.cli.app import main

__all__ = ["main"]
