"""What is computed once more for its gradients, so that nothing inside of it is kept until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flexheads.sites.derived import is_plain, watched
from flexheads.sites.direct import quiet


def recomputed(
    run: Callable[[Tensor], Tensor], given: Tensor, called: nn.Module, unhooked: nn.Module
) -> Tensor | None:
    """What `run` gives, of which autograd keeps `given` alone; None where that cannot be.

    It cannot where running again would be noticed, by hooks or by what watches the computation.
    Gradients are the same to the last bit, and can be differentiated again.

    Args:
        run: Computes something of the same numbers each time.
        given: What it is given, ``(...)``.
        called: A module that it calls.
        unhooked: One of which it runs the ``forward`` alone. Nothing else in it has gradients.
    """
    if watched() or forward_ad._current_level >= 0 or type(given) is not Tensor:
        return None
    if not all(map(quiet, called.modules())):
        return None
    own = [*called.parameters(), *unhooked.parameters()]
    trained = [parameter for parameter in own if parameter.requires_grad]
    if not all(map(is_plain, own)):
        return None
    result: Tensor = _Recomputed.apply(run, given, *trained)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], given: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(given, *trained)
        return run(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        given, *trained = ctx.saved_tensors
        again = torch.is_grad_enabled()  # these gradients are to be differentiated themselves
        if not again:
            given = given.detach().requires_grad_(given.requires_grad)
        with torch.enable_grad():
            result = ctx.run(given)
        inputs = [given] * bool(given.requires_grad) + trained
        # `run` may do without some of what its modules have.
        how = {"create_graph": again, "allow_unused": True}
        found = iter(torch.autograd.grad(result, inputs, gradients, **how))
        return None, next(found) if given.requires_grad else None, *found
