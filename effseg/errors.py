"""What can go wrong, in one tree.

```
EffsegError               exit code 4
├── GeometryError         2   grids that should agree and do not
├── DataError             2   a file, a case or a data set that cannot be used
├── PlanError             2   a plan, or a choice in it, that cannot work
├── CheckpointError       2   a run folder or weights that cannot be loaded
└── MemoryBudgetError     3   it does not fit; the message says what would
```

A message says what was found, where, what was expected, and the next step.
"""


class EffsegError(Exception):
    """The root: catch it to catch everything that effseg raises on purpose."""

    exit_code = 4


class GeometryError(EffsegError):
    """Two grids that should agree do not, or a grid is impossible."""

    exit_code = 2


class DataError(EffsegError):
    """A file, case or data set cannot be read or used as it is."""

    exit_code = 2


class PlanError(EffsegError):
    """A plan, or a choice in one, cannot work."""

    exit_code = 2


class CheckpointError(EffsegError):
    """A run folder or its weights cannot be loaded."""

    exit_code = 2


class MemoryBudgetError(EffsegError):
    """What was asked for does not fit the memory budget; the message says what would."""

    exit_code = 3
