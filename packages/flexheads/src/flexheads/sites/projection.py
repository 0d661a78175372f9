"""What adapters may know of a projection, however a model stores it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.specs import FusedBlock


class Projection:
    """What adapters may know of a projection: its weight as ``(out, in)``, and its bias.

    Hides that transformers' ``Conv1D`` stores the transpose, that a fused module computes several
    projections at once, and that a quantised module stores other numbers than it computes with.

    Args:
        host: The module.
        block: The block of its output that is this projection; None is all of it.
        config: The model's configuration, for blocks whose sizes stand there.

    Raises:
        ConfigError: If the module's output cannot be cut as `block` says.
    """

    def __init__(
        self, host: nn.Module, block: FusedBlock | None = None, config: Any = None
    ) -> None:
        self.host: Any = host
        self.transposed = isinstance(host, Conv1D)
        self.in_features, self.out_features = _widths(host)
        self.columns, self.groups = None, 1
        if block is not None:
            self.columns, self.groups = _cut(block, self.out_features, config)
            self.out_features = self.groups * (self.columns.stop - self.columns.start)

    @property
    def weight(self) -> Tensor:
        """``(out_features, in_features)``; a view where that is possible.

        Raises:
            UnsupportedError: If the module does not say what numbers it computes with.
        """
        weight = readable(self.host)
        weight = weight.t() if self.transposed else weight
        return self._own(weight)

    @property
    def bias(self) -> Tensor | None:
        """``(out_features,)``, or None."""
        bias: Tensor | None = getattr(self.host, "bias", None)
        return None if bias is None else self._own(bias)

    def _own(self, stored: Tensor) -> Tensor:
        """This projection's rows of the module's weight or bias: ``(out, ...)`` both ways."""
        return stored if self.columns is None else self._rows(stored).flatten(0, 1)

    def _rows(self, stored: Tensor) -> Tensor:
        """The same as a view, ``(groups, rows in a group, ...)``."""
        return stored.view(self.groups, -1, *stored.shape[1:])[:, self.columns]

    def _store(self, stored: Tensor, own: Tensor) -> None:
        """Writes this projection's rows into the module's weight or bias."""
        if self.columns is None:
            stored.copy_(own)
        else:
            own = own.clone()  # it may be a view of the same numbers
            self._rows(stored).copy_(own.view(self.groups, -1, *own.shape[1:]))

    def of(self, output: Tensor) -> Tensor:
        """This projection's part of what the module computes."""
        if self.columns is None:
            return output
        return self._grouped(output)[..., self.columns].flatten(-2)

    def _grouped(self, output: Tensor) -> Tensor:
        """An output as ``(..., groups, columns in a group)``."""
        return output.view(*output.shape[:-1], self.groups, -1)

    def into(self, output: Tensor, own: Tensor) -> Tensor:
        """What the module computes, with this projection's part replaced."""
        if self.columns is None:
            return own
        whole, own = self._grouped(output), self._grouped(own)
        before, behind = whole[..., : self.columns.start], whole[..., self.columns.stop :]
        return torch.cat([before, own, behind], dim=-1).flatten(-2)

    def run(self, hidden: Tensor) -> Tensor:
        """Computes the projection again, without its hooks."""
        return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)

    # --- replacing weight and bias ---------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises where `write` cannot make the module compute with a new weight.

        Raises:
            UnsupportedError: If the module is quantised, and computes in a way of its own.
        """
        if not _is_plain(self.host.weight) and type(self.host).forward is not nn.Linear.forward:
            raise UnsupportedError(
                f"{type(self.host).__name__} is quantised, so no new weight can be written into "
                "it. Load the model without quantisation to merge an adapter."
            )

    def kept(self) -> tuple[Tensor, Tensor | None]:
        """What `restore` needs to undo `write`."""
        weight, bias = self.host.weight, self.bias
        own = None if bias is None else bias.detach().clone()
        return (self.weight.detach().clone() if _is_plain(weight) else weight), own

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces weight and bias; a quantised weight gives way to one that is not."""
        if not _is_plain(self.host.weight):
            plain = readable(self.host).clone()
            self.host.weight = nn.Parameter(plain, requires_grad=False)
        self._replace(weight, bias)

    @torch.no_grad()
    def restore(self, weight: Tensor, bias: Tensor | None) -> None:
        """Brings back what `kept` has given, bit for bit."""
        if _is_plain(weight):
            self._replace(weight, bias)
        else:
            self.host.weight = weight
            self._replace(None, bias)

    def _replace(self, weight: Tensor | None, bias: Tensor | None) -> None:
        own = self.host.weight
        if weight is not None:
            self._store(own.t() if self.transposed else own, weight)
        if bias is not None and self.bias is not None:
            self._store(self.host.bias, bias)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as the numbers that are computed with."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        return False
    return type(weight) in (Tensor, nn.Parameter) or not _dequantises(weight)


def _dequantises(weight: Tensor) -> bool:
    """Whether a weight has a ``dequantize`` of its own; every tensor has one."""
    return type(weight).dequantize is not Tensor.dequantize or "dequantize" in vars(weight)


def readable(host: Any) -> Tensor:
    """The weight of a module as the numbers that it computes with, quantised or not.

    Raises:
        UnsupportedError: If the module does not say what they are, or where they are.
    """
    weight = getattr(host, "weight", None)
    if isinstance(weight, Tensor):
        if weight.device.type == "meta":
            raise UnsupportedError(
                f"The weight of a {type(host).__name__} is not in memory, but this needs it. Load "
                "the model without offloading."
            )
        if _is_plain(weight):
            return weight
        state = getattr(weight, "quant_state", None)
        if state is not None:  # four bits, of bitsandbytes
            bitsandbytes: Any = importlib.import_module("bitsandbytes.functional")
            plain: Tensor = bitsandbytes.dequantize_4bit(weight.data, state)
            return plain
        scales = getattr(weight, "SCB", None)  # eight bits, of bitsandbytes
        scales = getattr(getattr(host, "state", None), "SCB", None) if scales is None else scales
        if isinstance(scales, Tensor) and weight.dtype == torch.int8:
            return weight.data * (scales.view(-1, 1) / 127)
        if _dequantises(weight) or weight.is_quantized:
            return weight.dequantize()
    if callable(getattr(host, "dequantize", None)):
        whole: Tensor = host.dequantize()
        return whole
    raise UnsupportedError(
        f"{type(host).__name__} does not say what numbers it computes with: its weight is "
        f"{'missing' if weight is None else getattr(weight, 'dtype', type(weight))}, and neither "
        "has a dequantize(). Methods that only add to its result work here; this one reads the "
        "weight."
    )


def _widths(host: Any) -> tuple[int, int]:
    if isinstance(host, Conv1D):
        return int(host.nx), int(host.nf)
    try:
        return int(host.in_features), int(host.out_features)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(host).__name__} stands in the place of a projection, but does not say its "
            "in_features and out_features."
        ) from error


def _cut(block: FusedBlock, width: int, config: Any) -> tuple[slice, int]:
    """Where a block is in each group of a fused output of `width` columns, and how many groups."""
    groups = 1 if block.groups is None else int(getattr(config, block.groups))
    shares = [int(getattr(config, name)) for name in block.shares] or [1] * block.of
    total = sum(shares)
    if len(shares) != block.of or width % (groups * total):
        raise ConfigError(
            f"{width} columns cannot be cut into {groups} x {shares}, as {block} says for this "
            "configuration."
        )
    unit = width // (groups * total)
    start = unit * sum(shares[: block.index])
    return slice(start, start + unit * shares[block.index]), groups
