"""Hooks that take keyword arguments, and come and go while other threads call their modules.

A module notes beside a hook whether it takes keyword arguments. Torch writes that note behind the
hook and takes it away with the hook, so a call in another thread can find the hook without the note
and run it with fewer arguments. Here the note is there first, and stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_NOTES_KEPT = 1000
"""Notes at one module before those of hooks that are long gone are taken away."""


def hook_before(
    module: nn.Module, hook: Callable[..., Any], first: bool = False
) -> RemovableHandle:
    """Registers what runs before a module, with its arguments by position and by name.

    Args:
        module: The module.
        hook: Takes the module, the arguments by position, and those by name.
        first: Whether it runs before the hooks that are there already.
    """
    return _add(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook, first)


def hook_behind(
    module: nn.Module, hook: Callable[..., Any], first: bool = False
) -> RemovableHandle:
    """Registers what runs behind a module; the hook takes the output as its last argument.

    Args:
        module: The module.
        hook: Takes the module, the arguments by position, those by name, and the output.
        first: Whether it runs before the hooks that are there already.
    """
    return _add(module._forward_hooks, module._forward_hooks_with_kwargs, hook, first)


def run_first(handle: RemovableHandle) -> None:
    """Lets a hook run before all others of its module and kind, without a moment of its absence."""
    hooks: OrderedDict[int, Any] | None = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks:
        hooks.move_to_end(handle.id, last=False)


def _add(
    hooks: dict[int, Any], notes: dict[int, bool], hook: Callable[..., Any], first: bool
) -> RemovableHandle:
    if len(notes) > _NOTES_KEPT:
        for gone in [number for number in list(notes) if number not in hooks]:
            del notes[gone]
    handle = RemovableHandle(hooks)
    notes[handle.id] = True
    hooks[handle.id] = hook
    if first:
        run_first(handle)
    return handle
