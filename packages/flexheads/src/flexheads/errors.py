"""The one tree of errors: every message says what is wrong, where, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexheadsError(Exception):
    """Base class of everything that flexheads raises on purpose."""


class ConfigError(FlexheadsError, ValueError):
    """An adapter or head configuration that cannot be built."""


class CompositionError(FlexheadsError, ValueError):
    """A composition block that has no meaning, or does not fit the batch it is applied to."""


class UnsupportedError(FlexheadsError, NotImplementedError):
    """Something that this model, architecture or method cannot do; the message says who can."""


class CheckpointError(FlexheadsError, ValueError):
    """A file that cannot be read, is incomplete, or does not fit the model it is loaded into."""


class LabelError(FlexheadsError, ValueError):
    """Labels, or label names, that do not fit the head they are meant for."""


class PluginError(FlexheadsError):
    """A plugin that cannot be used: it fails to import, to register or to validate."""


class ConflictError(PluginError):
    """Two installed plugins claim one name."""


class UnknownNameError(FlexheadsError, ValueError):
    """A name that nothing installed, or nothing in this model, answers to.

    Args:
        kind: What the name should have named, for example ``"adapter"``.
        name: The unknown name.
        known: The names that exist, in the order to print them.
        hint: The way out, where there is more to say than the known names.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known, self.hint = kind, name, tuple(known), hint
        listed = ", ".join(repr(k) for k in self.known) or "none"
        message = f"There is no {kind} named {name!r}. Known: {listed}."
        close = difflib.get_close_matches(str(name), self.known, n=1)
        if close:
            message += f" Did you mean {close[0]!r}?"
        super().__init__(f"{message} {hint}".rstrip())

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.kind, self.name, self.known, self.hint)


class PluginWarning(UserWarning):
    """A plugin was skipped; the message names it, its distribution, its version and the cause."""


class ConversionWarning(UserWarning):
    """A saved head was left out because it does not fit the class it is loaded into."""
