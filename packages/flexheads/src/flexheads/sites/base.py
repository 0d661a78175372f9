"""What every attached site has in common: an address, a host module, and named hooks."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from flexheads.sites.prepared import Step
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime

Hooks = frozenset[tuple[str, str]]
"""Hooks by the address of their site and their name at that site."""

CALL = "call"
"""Name of the one hook that notes what the backbone is called with, for all sites."""


class AttachedSite(ABC):
    """One place in a live model where adapters act.

    The hooks are bound methods of this object, and this object hangs in the model, so that copies
    and pickles of the model carry their own.

    Attributes:
        address: The logical address, such as ``layers.3.feed_forward``; adapters key their parts
            by it, and files in the library's own layout too.
        role: The last word of the address, as in `flexheads.specs.LayerSpec`.
        layer: The layer's number, counted through all stacks; None outside of the layers.
        host: The module that lends its dtype and device to what is built here.
        width: Size of the last dimension of the hidden states here.
    """

    kind: str
    """What is handed to an adapter here: ``residual``, ``linear``, ``attention``, ``hidden``,
    ``embedding``, ``norm`` or ``tokens``."""
    folded: bool = False
    """Whether the module may see the positions of all rows in one dimension."""

    def __init__(
        self,
        address: str,
        role: str,
        layer: int | None,
        host: nn.Module,
        width: int,
        runtime: Runtime,
    ) -> None:
        self.address, self.role, self.layer = address, role, layer
        self.host, self.width, self.runtime = host, width, runtime

    @abstractmethod
    def needed(self, part: Any) -> frozenset[str]:
        """The names of the hooks that `part`, an adapter's module at this site, relies on.

        Beside this site's own hooks that is `CALL` for a site that reads the call's inputs, or
        ``CALL.<side>`` for those of one side of an encoder-decoder.
        """

    @abstractmethod
    def register(self, hook: str) -> RemovableHandle:
        """Registers the hook of that name on the backbone."""

    @abstractmethod
    def op(self, chains: Sequence[Sequence[Any]], rows: RowMap | None) -> Any:
        """What this site does in a plan: the parts of each chain, in order."""

    def planned(self) -> Any:
        """This site's part in the plan that holds, or None."""
        runtime = self.runtime
        plan = runtime.thread.plan
        return (runtime.current() if plan is None else plan).ops.get(self.address)

    def step(self, key: str) -> Step | None:
        """What is prepared for the running call, see `sites.prepared`; None where nothing is.

        Args:
            key: The address, and what is changed.
        """
        return None if is_compiling() else self.runtime.thread.steps.get(key)

    @property
    def folding(self) -> tuple[str, ...]:
        """The hooks that `unfolded` relies on."""
        return (CALL,) if self.folded else ()

    def unfolded(self, tensor: Tensor) -> Tensor:
        """What the module sees as ``(batch, sequence, ...)``, if that is folded otherwise.

        All positions may lie in one dimension, or the windows of an image among the rows.
        """
        if not self.folded:
            return tensor
        call, names = self.runtime.peek(CALL), ("input_ids", "inputs_embeds", "pixel_values")
        batch = next(call[name] for name in names if call.get(name) is not None).shape[0]
        if tensor.dim() > 2 and tensor.shape[0] == batch:
            return tensor
        return tensor.reshape(batch, -1, tensor.shape[-1])

    def folded_as(self, given: Tensor, result: Tensor) -> Tensor:
        """The inverse of `unfolded`: a result in the shape that the module works in."""
        return result.reshape(given.shape) if self.folded else result

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"


class HostWeights:
    """Weight and bias of a module, for methods that can be folded into them.

    Args:
        host: The module.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host: Any = host

    @property
    def weight(self) -> Tensor:
        """The weight."""
        weight: Tensor = self.host.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        bias: Tensor | None = getattr(self.host, "bias", None)
        return bias

    def check_writable(self) -> None:
        """Raises where `write` cannot make the module compute with a new weight."""

    def kept(self) -> tuple[Tensor, Tensor | None]:
        """What `restore` needs to undo `write`."""
        bias = self.bias
        return self.weight.detach().clone(), None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces weight and bias."""
        self.weight.copy_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def restore(self, weight: Tensor, bias: Tensor | None) -> None:
        """Brings back what `kept` has given, bit for bit."""
        self.write(weight, bias)


def place(
    part: nn.Module, host: nn.Module, otherwise: nn.Module | None = None, which: int = 0
) -> nn.Module:
    """Moves a new module to the dtype and device in which another computes.

    Args:
        part: The new module.
        host: The other.
        otherwise: What tells where the host has no floating-point parameters: a dropout has none,
            and a quantised module may have none.
        which: The floating-point parameter that tells: 0 the first, -1 the last.
    """
    own = _floating(host)
    others = [] if own or otherwise is None else list(otherwise.parameters())
    weights = own or [p for p in others if p.is_floating_point()]
    tensors: list[Tensor] = [*own] or [*host.parameters(), *host.buffers(), *weights]
    if not weights:
        return part.to(tensors[0].device) if tensors else part
    device = (own[which] if own else tensors[0]).device
    if device.type == "meta":
        device = _execution_device(host) or device
    dtype = weights[which].dtype
    return part if _is_there(part, device, dtype) else part.to(device=device, dtype=dtype)


def _floating(module: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters of a module, in order; quick for one without children."""
    held = module.parameters() if module._modules else module._parameters.values()
    return [p for p in held if p is not None and p.is_floating_point()]


def _is_there(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all of a module is on a device, and in a dtype."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and (tensor.device != device or tensor.dtype != dtype):
            return False
    children = module._modules.values()
    return all(child is None or _is_there(child, device, dtype) for child in children)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere until they are needed."""
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def input_embeddings(module: Any) -> Any:
    """What a transformers model looks tokens up in; None where its class does not tell."""
    try:
        return module.get_input_embeddings()
    except NotImplementedError:
        return None


@functools.lru_cache(maxsize=1024)
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments in order, without ``self``."""
    return tuple(inspect.signature(forward).parameters)[1:]


def first_tensor(value: Any) -> Tensor:
    """The hidden states in what a module returned: the tensor itself or the first of a tuple."""
    tensor: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return tensor


def with_first(value: Any, tensor: Tensor) -> Any:
    """What a module returned, with other hidden states."""
    return (tensor, *value[1:]) if isinstance(value, (tuple, list)) else tensor


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states in what a module was called with, by position or by name."""
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


def run_chains(
    chains: Sequence[Sequence[Any]],
    rows: RowMap | None,
    run: Callable[..., Tensor],
    *tensors: Tensor,
) -> Tensor:
    """Runs each chain on its rows of `tensors` and puts the results together.

    Args:
        chains: The parts of each chain.
        rows: The rows of each chain; None where there is one chain for all.
        run: Takes the parts of one chain and its rows of each tensor.
        tensors: Each with the batch first.
    """
    if rows is None:
        return run(chains[0], *tensors)
    present = [chains[number] for number in rows.present(tensors[0].shape[0])]
    split = [rows.split(tensor) for tensor in tensors]
    return rows.merge([run(parts, *own) for parts, *own in zip(present, *split, strict=True)])


def compiled(module: nn.Module) -> bool:
    """Whether `module` itself has been compiled, so that new hooks below it stay unseen."""
    dynamo = torch._dynamo.OptimizedModule if hasattr(torch, "_dynamo") else ()
    return (
        isinstance(module, dynamo)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "get_compiler_config")
    )
