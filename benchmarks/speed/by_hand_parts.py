"""What the hand-written works put into a backbone: modules in plain torch, and where they go.

They know the weights they are given and nothing else: no names, no hooks' order, no checks, and
nothing that could tell when an adapter has changed. In-place operations are those that autograd
allows, so the same modules are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[Tensor], Tensor]
Change = Callable[[Tensor, Norm], Tensor]
"""From the residual stream behind an addition, and the norm that follows, to the new stream."""


class Bottleneck(nn.Module):
    """``up(act(down(h)))``.

    Args:
        weights: ``down.weight``, ``down.bias``, ``up.weight`` and ``up.bias``.
        activation: A function; that of ReLU by default.
    """

    def __init__(self, weights: dict[str, Tensor], activation: Any = functional.relu) -> None:
        super().__init__()
        self.down, self.down_bias, self.up, self.up_bias = (
            nn.Parameter(weights[f"{side}.{kind}"].detach().clone())
            for side in ("down", "up")
            for kind in ("weight", "bias")
        )
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """What it adds."""
        inner = functional.linear(hidden, self.down, self.down_bias)
        return functional.linear(self.activation(inner, inplace=True), self.up, self.up_bias)


class InSequence(nn.Module):
    """Bottlenecks one behind the other, each on the norm of the stream (Pfeiffer's place)."""

    def __init__(self, bottlenecks: Sequence[Bottleneck]) -> None:
        super().__init__()
        self.bottlenecks = nn.ModuleList(bottlenecks)

    def forward(self, total: Tensor, norm: Norm) -> Tensor:
        """The new stream."""
        for bottleneck in self.bottlenecks:
            total = bottleneck(norm(total)).add_(total)
        return total


class SideBySide(nn.Module):
    """A bottleneck for each equal share of the batch, as two batched products."""

    down: Tensor
    up: Tensor
    down_bias: Tensor
    up_bias: Tensor

    def __init__(self, bottlenecks: Sequence[Bottleneck]) -> None:
        super().__init__()
        for side in ("down", "up"):
            weight = torch.stack([getattr(each, side).detach().t() for each in bottlenecks])
            bias = torch.stack([getattr(each, f"{side}_bias").detach() for each in bottlenecks])
            self.register_buffer(side, weight.contiguous())
            self.register_buffer(f"{side}_bias", bias.unsqueeze(1))

    def forward(self, total: Tensor, norm: Norm) -> Tensor:
        """The new stream."""
        shares = norm(total).view(len(self.down), -1, total.shape[-1])
        inner = torch.baddbmm(self.down_bias, shares, self.down).relu_()
        return torch.baddbmm(self.up_bias, inner, self.up).view_as(total).add_(total)


class Attending(nn.Module):
    """AdapterFusion with its projections folded into the adapters' rank.

    A score is ``(Q h + q) . K (U z + b)``, so with ``G = U' K' Q`` it is a product of two vectors
    as long as the bottleneck is wide; what the key's bias adds is equal for all adapters, and
    softmax does not see it. The value projection is folded into the upward matrices.

    Args:
        bottlenecks: The adapters.
        fusion: The weights of the three projections.
    """

    entry: Tensor
    entry_bias: Tensor
    exit: Tensor

    def __init__(self, bottlenecks: Sequence[Bottleneck], fusion: dict[str, Tensor]) -> None:
        super().__init__()
        self.count, self.rank = len(bottlenecks), len(bottlenecks[0].down)
        fusion = {key: weight.float() for key, weight in fusion.items()}
        asked = fusion["key.weight"].t() @ fusion["query.weight"]
        asked_bias = fusion["key.weight"].t() @ fusion["query.bias"]
        ups = [each.up.detach().float() for each in bottlenecks]
        biases = torch.stack([each.up_bias.detach().float() for each in bottlenecks])
        rows = [each.down.detach() for each in bottlenecks]
        rows += [up.t() @ asked for up in ups] + [biases @ asked]
        offsets = [each.down_bias.detach() for each in bottlenecks]
        offsets += [up.t() @ asked_bias for up in ups] + [biases @ asked_bias]
        value = fusion["value.weight"]
        exits = torch.cat([*(value @ up for up in ups), value @ biases.t()], 1)
        dtype = bottlenecks[0].up.dtype
        self.register_buffer("entry", torch.cat(rows).to(dtype))
        self.register_buffer("entry_bias", torch.cat(offsets).to(dtype))
        self.register_buffer("exit", exits.to(dtype))

    def forward(self, total: Tensor, norm: Norm) -> Tensor:
        """The new stream."""
        wide = self.count * self.rank
        seen = functional.linear(norm(total), self.entry, self.entry_bias)
        inner, keys, scores = torch.split(seen, [wide, wide, self.count], dim=-1)
        shape = (*seen.shape[:-1], self.count, self.rank)
        inner, keys = inner.relu().view(shape), keys.view(shape)
        share = torch.softmax((inner * keys).sum(-1).add_(scores), -1)
        weighed = torch.cat([(inner * share.unsqueeze(-1)).flatten(-2), share], -1)
        return functional.linear(weighed, self.exit).add_(total)


class LowRank(nn.Module):
    """A projection and ``B A x`` added to it."""

    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())

    def forward(self, given: Tensor) -> Tensor:
        """The projection's result."""
        output: Tensor = self.linear(given)
        inner = given.view(-1, given.shape[-1]) @ self.down.t()
        output.view(-1, output.shape[-1]).addmm_(inner, self.up.t())
        return output


class LowRankByRow(nn.Module):
    """A projection and, for each row of the batch, the ``B A x`` of one adapter of a bank.

    Args:
        linear: The projection.
        downs, ups: All factors: ``(adapters, rank, in)`` and ``(adapters, out, rank)``.
        rows: The number of the adapter of each row.
    """

    downs: Tensor
    ups: Tensor
    rows: Tensor

    def __init__(self, linear: nn.Linear, downs: Tensor, ups: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("downs", downs.transpose(1, 2).contiguous())
        self.register_buffer("ups", ups.transpose(1, 2).contiguous())
        self.register_buffer("rows", rows)

    def forward(self, given: Tensor) -> Tensor:
        """The projection's result."""
        output: Tensor = self.linear(given)
        inner = torch.bmm(given, self.downs.index_select(0, self.rows))
        return output.baddbmm_(inner, self.ups.index_select(0, self.rows))


class Scaled(nn.Module):
    """A projection whose results are scaled one by one."""

    scale: Tensor

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, given: Tensor) -> Tensor:
        """The projection's result."""
        output: Tensor = self.linear(given)
        return output.mul_(self.scale)


class Around(nn.Module):
    """A projection and a bottleneck that looks at its result (Houlsby's place)."""

    def __init__(self, linear: nn.Linear, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.linear, self.bottleneck = linear, bottleneck

    def forward(self, given: Tensor) -> Tensor:
        """The projection's result, and what the bottleneck adds."""
        output = self.linear(given)
        added: Tensor = self.bottleneck(output).add_(output)
        return added


class PostNorm(nn.Module):
    """BERT's module behind a sub-layer, with a change of the stream before its norm."""

    def __init__(self, old: Any, change: Change) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = old.dense, old.dropout, old.LayerNorm
        self.change = change

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The norm of the changed stream."""
        total = self.dropout(self.dense(hidden)).add_(residual)
        normed: Tensor = self.LayerNorm(self.change(total, self.LayerNorm))
        return normed


class PrefixedAttention(nn.Module):
    """BERT's self-attention with keys and values in front that are computed once.

    Args:
        old: The module in whose place it stands.
        keys, values: ``(heads, positions, size)``.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, old: Any, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.query, self.key, self.value = old.query, old.key, old.value
        self.heads = old.num_attention_heads
        self.register_buffer("keys", keys.detach().unsqueeze(0).clone())
        self.register_buffer("values", values.detach().unsqueeze(0).clone())

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """The attended values, and no weights."""
        rows, length, width = hidden.shape
        shape = (rows, length, self.heads, -1)
        query, key, value = (
            linear(hidden).view(shape).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        key = torch.cat([self.keys.expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([self.values.expand(rows, -1, -1, -1), value], 2)
        if attention_mask is not None:
            shown = attention_mask.dtype == torch.bool
            attention_mask = functional.pad(attention_mask, (self.keys.shape[2], 0), value=shown)
        seen = functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return seen.transpose(1, 2).reshape(rows, length, width), None


# --- where they go ----------------------------------------------------------------------------


def layers_of(model: Any) -> Sequence[Any]:
    """The layers of a backbone."""
    found: Sequence[Any] = model.encoder.layer if hasattr(model, "encoder") else model.layers
    return found


def change_stream(layer: Any, change: Change) -> None:
    """Changes the residual stream behind a layer's feed-forward part."""
    if hasattr(layer, "intermediate"):
        layer.output = PostNorm(layer.output, change)
    else:
        layer.change = change  # so that its weights are among the layer's
        layer.register_forward_hook(lambda _layer, _given, output: change(output, lambda h: h))


_PROJECTIONS = {
    "query": ("attention.self.query", "self_attn.q_proj"),
    "key": ("attention.self.key", "self_attn.k_proj"),
    "value": ("attention.self.value", "self_attn.v_proj"),
    "mlp_in": ("intermediate.dense", "mlp.up_proj"),
    "attention": ("attention.output.dense", "self_attn.o_proj"),
    "feed_forward": ("output.dense", "mlp.down_proj"),
}


def projection(layer: Any, role: str) -> Any:
    """The module of a layer that has this role."""
    return layer.get_submodule(_path(layer, role))


def replace(layer: Any, role: str, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts another module in the place of a projection."""
    layer.set_submodule(_path(layer, role), make(projection(layer, role)))


def _path(layer: Any, role: str) -> str:
    return _PROJECTIONS[role][0 if hasattr(layer, "intermediate") else 1]
