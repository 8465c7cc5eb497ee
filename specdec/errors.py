"""Every error that specdec raises on purpose.

    SpecdecError
    ├── ConfigError(ValueError)        an option or a file of options is wrong
    ├── RequestError(ValueError)       one request is wrong; the others go on
    ├── UnsupportedError               a sound wish that this model or this mode cannot serve
    ├── LoadError(OSError)             a model, checkpoint, corpus or store cannot be read
    └── InternalError(AssertionError)  one of our own invariants is broken: please report it

Messages name the value and the rule: ``top_p must be in (0, 1], got 1.3``.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "InternalError",
    "LoadError",
    "RequestError",
    "SpecdecError",
    "UnsupportedError",
]


class SpecdecError(Exception):
    """The root of all errors that specdec raises on purpose."""


class ConfigError(SpecdecError, ValueError):
    """An option is outside its rule; the message names the value and the rule."""


class RequestError(SpecdecError, ValueError):
    """One request cannot be served as asked; nothing of it was kept."""


class UnsupportedError(SpecdecError):
    """A sound wish that this model, drafter or mode cannot serve."""


class LoadError(SpecdecError, OSError):
    """A model, checkpoint, corpus or store cannot be read; nothing was changed."""


class InternalError(SpecdecError, AssertionError):
    """One of specdec's own invariants is broken. This is a bug: please report it."""
