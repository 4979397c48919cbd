"""The command line: one verb for each thing the library does.

Exit codes: 0 done, 1 usage, 2 bad input, 3 out of resources, 4 internal.
"""

from effseg.cli.application import app, main

__all__ = ["app", "main"]
