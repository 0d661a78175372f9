"""Heads of one shape as one product: which they are, and their layers stacked."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from itertools import repeat
from operator import contains, is_, itemgetter
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from flexheads.heads.base import FeedForwardHead, PredictionHead
from flexheads.heads.layers import Stacked
from flexheads.sites.derived import Snapshot, is_hooked

READS_ALIKE = (
    "activation_function",
    "bias",
    "dropout_prob",
    "embedding_size",
    "label2id",
    "layer_norm",
    "layers",
    "loss",
    "mean",
    "multilabel",
    "normalise",
    "num_choices",
    "num_labels",
    "problem_type",
    "std",
    "threshold",
    "unanswerable",
)
"""Fields of a configuration that do not decide what a head reads; any other may."""

_CHUNKS = 4
_FEW = 8
"""Up to so many rows, a weight by the rows is faster than the rows by a weight, by a quarter."""


def stack_key(head: PredictionHead) -> Hashable | None:
    """What two heads have in common if they can run as one product; None where `head` cannot.

    They read the same tensor and have layers of the same kinds, sizes, dtype and device. Only the
    number of scores may differ, by less than a factor of two. A head that computes otherwise than
    `FeedForwardHead` does, reads with parameters of its own, or is hooked into, runs by itself.
    """
    if not isinstance(head, FeedForwardHead) or not _is_plain(head):
        return None
    modules = _layers(head)
    if not modules or not all(type(m) in (nn.Linear, nn.LayerNorm) for m in modules):
        return None
    parameters = [p for m in modules for p in m._parameters.values()]
    if not all(p is None or type(p) is nn.Parameter for p in parameters):
        return None
    given = [p for p in parameters if p is not None]
    if not given:
        return None
    if any(p.is_inference() or not p.is_floating_point() for p in given):
        return None  # changes of these cannot be noticed
    config = head.config.to_dict()
    reads = {name: value for name, value in config.items() if name not in READS_ALIKE}
    return (
        type(head).read,
        head.width,
        json.dumps(reads, sort_keys=True, default=repr),
        str(head.config.activation_function).lower(),
        tuple(_shape(m) for m in modules[:-1]),
        _shape(modules[-1])[:-1],
        (modules[-1].out_features - 1).bit_length(),
        {p.dtype for p in given} == {given[0].dtype} and given[0].dtype,
        {p.device for p in given} == {given[0].device} and given[0].device,
    )


class Structure:
    """What a stack takes for granted of its heads, cheap to check in every call.

    Args:
        heads: The heads.
        holder: The children of the module that holds them.
    """

    def __init__(self, heads: Sequence[FeedForwardHead], holder: dict[str, Any]) -> None:
        self.heads, self._holder = heads, holder
        keys = {id(module): key for key, module in holder.items()}
        places: list[tuple[dict[str, Any], str]] = [(holder, keys[id(head)]) for head in heads]
        places += [(head._modules, "layers") for head in heads]
        for head in heads:
            places += [(head.layers._modules, key) for key in _names(head.layers)]
            places += [(m._parameters, key) for m in _layers(head) for key in m._parameters]
        self._owners, self._keys = zip(*places, strict=True)
        self._held = [owner[key] for owner, key in places]
        self._attributes = [module.__dict__ for head in heads for module in (head, head.layers)]
        self._dropouts = [head.layers.dropout for head in heads]
        self._flags = [dropout.__dict__ for dropout in self._dropouts]
        self.parameters: Sequence[nn.Parameter] = _parameters(heads)
        self._hooks = RemovableHandle.next_id

    def holds(self, holder: dict[str, Any]) -> bool:
        """Whether they are still the same modules and parameters, with nothing hooked into them.

        Args:
            holder: The children of the module that holds them now; replicas of a model share what
                is kept of it.
        """
        if holder is not self._holder:
            return False
        if self._hooks != RemovableHandle.next_id:  # somewhere a hook was registered since
            self._hooks = RemovableHandle.next_id
            if any(map(_is_hooked, self.heads)):
                return False
        same = all(map(is_, map(dict.get, self._owners, self._keys), self._held))
        return same and not any(map(contains, self._attributes, repeat("forward")))

    def dropping(self) -> bool:
        """Whether dropout is active in one of them."""
        training = any(map(itemgetter("training"), self._flags))
        return training and any(one.training and one.p > 0 for one in self._dropouts)


class HeadStack:
    """Copies of the layers of several heads, stacked; see `stack_key`.

    The first product of all heads has one input, so it is one matrix, cut into chunks of columns
    that threads share; the others are one matrix for each head.

    Args:
        heads: Heads with one `stack_key`.
    """

    def __init__(self, heads: Sequence[FeedForwardHead]) -> None:
        self._snapshot = Snapshot(_parameters(heads))
        columns = list(zip(*(_layers(head) for head in heads), strict=True))
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.scores = [linear.out_features for linear in columns[-1]]
            self._first = _wide(columns[0], max(self.scores) if len(columns) == 1 else None)
            self._others = [
                _deep(column, max(self.scores) if column is columns[-1] else None)
                for column in columns[1:]
            ]
        self.activation = heads[0].layers.activation

    def current(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it is the stack of these, and none has changed since.

        Writing to the ``.data`` of one in place is not noticed.
        """
        return self._snapshot.holds(parameters)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The scores of all heads, ``(heads, ..., most scores)``, of ``(..., features)``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).t()
        weight, bias = self._first
        hidden = _product(weight, rows.expand(len(weight), *rows.shape), bias)
        count = len(self.scores)
        hidden = _by_head(hidden, count)
        previous: type[nn.Module] = nn.Linear
        for kind, parameters, eps in self._others:
            if previous is nn.Linear and self.activation is not None:
                hidden = self.activation(hidden)
            if kind is nn.Linear:
                weight, bias = parameters
                hidden = _product(weight, hidden, bias)
            else:
                gain, offset = parameters
                hidden = hidden.transpose(1, 2)
                normed = functional.layer_norm(hidden, hidden.shape[-1:], None, None, eps)
                hidden = torch.addcmul(offset, normed, gain).transpose(1, 2)
            previous = kind
        return hidden.transpose(1, 2).reshape(count, *inputs.shape[:-1], -1).contiguous()


def scores_by_row(heads: Sequence[FeedForwardHead], index: Tensor, inputs: Tensor) -> Tensor:
    """The scores of each row by its own head, ``(batch, ..., scores)``.

    Nothing is kept, and gradients reach the heads.

    Args:
        heads: Heads with one `stack_key`, and as many scores.
        index: The head of each row, ``(batch,)``.
        inputs: What they read, ``(batch, ..., features)``.
    """
    first = heads[0].layers
    hidden = inputs.reshape(len(index), -1, inputs.shape[-1])
    for number in range(first.depth):
        weight, bias = _picked(heads, str(number), index)
        hidden = _plus(bias, hidden, weight.transpose(1, 2))
        if number < first.depth - 1:
            hidden = hidden if first.activation is None else first.activation(hidden)
            if first.normed:
                norm: Any = first.get_submodule(f"norm_{number}")
                gain, offset = _picked(heads, f"norm_{number}", index)
                normed = functional.layer_norm(hidden, hidden.shape[-1:], None, None, norm.eps)
                hidden = normed * gain.unsqueeze(1)
                hidden = hidden if offset is None else hidden + offset
    return hidden.reshape(*inputs.shape[:-1], -1)


def _picked(
    heads: Sequence[FeedForwardHead], name: str, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer, for each row those of its head: ``(batch, 1, size)``."""
    layers: list[Any] = [head.layers.get_submodule(name) for head in heads]
    weight = torch.stack([layer.weight for layer in layers])[index]
    if layers[0].bias is None:
        return weight, None
    return weight, torch.stack([layer.bias for layer in layers])[index].unsqueeze(1)


def split(scores: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The scores of each head, ``(..., scores)``, of those of a stack and how many each has."""
    return [
        s if s.shape[-1] == n else s[..., :n].contiguous()
        for s, n in zip(scores.unbind(0), sizes, strict=True)
    ]


def _product(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """``weight @ inputs + bias``: ``(n, out, in)``, ``(n, in, rows)`` and ``(n, out, 1)``."""
    if inputs.shape[-1] > _FEW:
        weight, inputs = inputs.transpose(1, 2), weight.transpose(1, 2)
        bias = None if bias is None else bias.transpose(1, 2)
        return _plus(bias, weight, inputs).transpose(1, 2)
    return _plus(bias, weight, inputs)


def _plus(bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)


def _by_head(hidden: Tensor, count: int) -> Tensor:
    """Chunks ``(n, out, rows)`` as ``(heads, out, rows)``: heads follow one another in them."""
    rows = hidden.shape[-1]
    if rows > _FEW:  # rows come first in memory, see `_product`
        return hidden.permute(2, 0, 1).reshape(rows, count, -1).permute(1, 2, 0)
    return hidden.reshape(count, -1, rows)


def _wide(linears: Sequence[Any], size: int | None) -> tuple[Tensor, Tensor | None]:
    """Weight ``(chunks, out, in)`` and bias ``(chunks, out, 1)`` of layers with the same input."""
    weight, bias = _padded(linears, size)
    columns = weight.shape[0] * weight.shape[1]
    chunks = max(_CHUNKS, torch.get_num_threads())
    while columns % chunks:
        chunks -= 1
    weight = _compact(weight.reshape(chunks, columns // chunks, -1))
    return weight, None if bias is None else bias.reshape(chunks, -1, 1)


def _deep(modules: Sequence[Any], size: int | None) -> tuple[type[nn.Module], Any, float]:
    """The kind of equal layers of several heads, their parameters, and the epsilon of a norm."""
    if isinstance(modules[0], nn.LayerNorm):
        both = [
            torch.stack([m._parameters[n] for m in modules])[:, None] for n in ("weight", "bias")
        ]
        return nn.LayerNorm, both, modules[0].eps
    weight, bias = _padded(modules, size)
    return nn.Linear, (_compact(weight), None if bias is None else bias[..., None]), 0.0


def _compact(tensor: Tensor) -> Tensor:
    """A contiguous copy, on a CPU in large pages of memory, because all of it is read each time."""
    if tensor.device.type != "cpu":
        return tensor.contiguous()
    # NumPy asks the system for large pages, torch does not.
    memory = torch.from_numpy(numpy.empty(tensor.numel() * tensor.element_size(), numpy.uint8))
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _padded(linears: Sequence[Any], size: int | None) -> tuple[Tensor, Tensor | None]:
    """The weights, and the biases if there are, stacked, with rows of zeros up to `size`."""
    more = [0 if size is None else size - linear.out_features for linear in linears]
    weights = [functional.pad(m.weight, (0, 0, 0, n)) for m, n in zip(linears, more, strict=True)]
    if linears[0].bias is None:
        return torch.stack(weights), None
    biases = [functional.pad(m.bias, (0, n)) for m, n in zip(linears, more, strict=True)]
    return torch.stack(weights), torch.stack(biases)


def _layers(head: FeedForwardHead) -> list[Any]:
    """The linear layers and norms of a head, in the order in which they act."""
    return [head.layers._modules[name] for name in _names(head.layers)]


def _parameters(heads: Sequence[FeedForwardHead]) -> list[nn.Parameter]:
    return [p for head in heads for module in _layers(head) for p in module.parameters()]


def _names(layers: Stacked) -> list[str]:
    names = [name for number in range(layers.depth) for name in (str(number), f"norm_{number}")]
    return [name for name in names if name in layers._modules]


def _is_plain(head: FeedForwardHead) -> bool:
    """Whether a head is what `FeedForwardHead` makes of linear layers, and nothing more."""
    kind = type(head)
    usual = (
        kind.forward is FeedForwardHead.forward
        and kind.view is PredictionHead.view
        and kind.__call__ is nn.Module.__call__
        and type(head.layers) is Stacked
        and head.config.hidden_layer != "mix"
    )
    if not usual or head._parameters or list(head._modules) != ["layers"]:
        return False
    return not _is_hooked(head) and not any("forward" in m.__dict__ for m in head.modules())


def _is_hooked(head: nn.Module) -> bool:
    """Whether a hook is on a head or a module in it."""
    return any(map(is_hooked, head.modules()))


def _shape(module: Any) -> tuple[Any, ...]:
    if isinstance(module, nn.LayerNorm):
        return (
            "norm",
            module.eps,
            module.weight is None,
            module.bias is None,
            module.normalized_shape,
        )
    return ("linear", module.bias is None, module.in_features, module.out_features)
