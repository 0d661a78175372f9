"""Running small modules without the ceremony of a call, where nobody would notice.

A call of a module looks for hooks and goes through three functions; beside a matrix product of a
few microseconds that counts.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

_forward_hooks = torch_module._global_forward_hooks
_forward_pre_hooks = torch_module._global_forward_pre_hooks
_backward_hooks = torch_module._global_backward_hooks
_backward_pre_hooks = torch_module._global_backward_pre_hooks


def quiet(*modules: nn.Module) -> bool:
    """Whether calling a module is no more than calling its class's ``forward``, for each of some.

    It is not where hooks are on it or on every module, and where it is offloaded or compiled.
    """
    if _forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks:
        return False
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or "_compiled_call_impl" in own
        ):
            return False
    return True


def are_plain(*layers: nn.Module) -> bool:
    """Whether layers are linear ones as torch has them, whose parameters are weight and bias.

    They are not where their class computes in a way of its own, as those of quantised layers do,
    and where something else computes a weight.
    """
    for layer in layers:
        if type(layer) is not nn.Linear or len(layer._parameters) != 2:
            return False
    return True
