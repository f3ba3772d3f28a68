"""The error tree. Everything a user can mend is an EdgekitError with an exit code.

    EdgekitError            exit 2
    ├── UsageError          the command's words do not fit together
    ├── ConfigError         a recipe, target or backbone name is not valid
    ├── DataError           the labelled data cannot be used as it is
    ├── ArtifactError       a run folder, model or bundle is missing, damaged or in the way
    ├── SetupError          this machine lacks something: a package, weights, disk, network
    ├── ParityError         exit 1: a converted model does not compute what its source computes
    └── Interrupted         exit 130: stopped by Ctrl-C with the work so far kept

A message says what was found, what was expected, and what to do.
"""

from __future__ import annotations


class EdgekitError(Exception):
    """Base of all errors that end a command with a message instead of a traceback."""

    exit_code = 2


class UsageError(EdgekitError):
    """The command's words do not fit together."""


class ConfigError(EdgekitError):
    """A recipe, target or backbone name is not valid."""


class DataError(EdgekitError):
    """The labelled data cannot be used as it is."""


class ArtifactError(EdgekitError):
    """A run folder, model file or bundle is missing, damaged or in the way."""


class SetupError(EdgekitError):
    """This machine lacks something that the command needs."""


class ParityError(EdgekitError):
    """A converted model does not compute what its source computes."""

    exit_code = 1


class Interrupted(EdgekitError):  # noqa: N818 (it is no fault)
    """Stopped by the user; what was reached is kept, and the message says how to go on."""

    exit_code = 130
