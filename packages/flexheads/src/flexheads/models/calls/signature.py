"""Forward methods whose signature says what they take; trainers and generation read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def signed(
    forward: Callable[..., Any], like: Callable[..., Any], names: Sequence[str]
) -> Callable[..., Any]:
    """A function that calls `forward` and shows the signature of `like` with further arguments.

    Args:
        forward: What is called, with ``self`` and everything that is given.
        like: The forward of a transformers class.
        names: Further keyword arguments, which default to None.
    """

    def signed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    given = list(inspect.signature(like).parameters.values())
    given = [parameter for parameter in given if parameter.name not in names]
    further = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    catch_all = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
    fixed = [p for p in given if p not in catch_all]
    signed_forward.__name__ = "forward"
    signed_forward.__doc__ = like.__doc__ if forward.__doc__ is None else forward.__doc__
    signature = inspect.Signature([*fixed, *further, *catch_all])
    signed_forward.__signature__ = signature  # type: ignore[attr-defined]
    return signed_forward
