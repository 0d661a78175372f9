"""Running small modules without the ceremony of a call, where nobody would notice.

A call of a module looks for hooks and goes through three functions; beside a matrix product of a
few microseconds that counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

_forward_hooks = torch_module._global_forward_hooks
_forward_pre_hooks = torch_module._global_forward_pre_hooks
_backward_hooks = torch_module._global_backward_hooks
_backward_pre_hooks = torch_module._global_backward_pre_hooks


def quiet(module: nn.Module) -> bool:
    """Whether calling a module is no more than calling its class's ``forward``.

    It is not where hooks are on it or on every module, and where it is offloaded or compiled.
    """
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _forward_hooks
        or _forward_pre_hooks
        or _backward_hooks
        or _backward_pre_hooks
        or "forward" in own
        or "_compiled_call_impl" in own
    )


def linear(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What a layer gives; a plain linear one is not called, if that goes unnoticed.

    Args:
        layer: The layer, of any class.
        hidden: Its input.
    """
    if type(layer) is nn.Linear and quiet(layer):
        own: Any = layer._parameters  # not there where something else computes them
        if "weight" in own and "bias" in own:
            return functional.linear(hidden, own["weight"], own["bias"])
    result: Tensor = layer(hidden)
    return result
