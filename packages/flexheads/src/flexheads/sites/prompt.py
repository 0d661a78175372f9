"""The prompt site: where rows of an adapter enter the first layer with the embeddings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexheads.errors import UnsupportedError
from flexheads.sites.base import (
    AttachedSite,
    argument_names,
    first_argument,
    first_tensor,
    input_embeddings,
    run_chains,
)
from flexheads.sites.caches import past_length
from flexheads.sites.hooking import hook_before
from flexheads.sites.joining import undoing
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime

PROMPT = "prompt"
POOLED = "pooled"
"""What a hook puts for heads that read the first position: the state there, of the prompt too."""

_MASKS = ("attention_mask", "attn_mask", "mask")
_OUTPUT = ("last_hidden_state", "hidden_states")
_ENCODER_OUTPUT = ("encoder_last_hidden_state", "encoder_hidden_states")


class PromptPart(nn.Module):
    """What an adapter has at the prompt site.

    Attributes:
        length: Number of positions.
        after_first: Whether it stands behind the first position instead of before it.
    """

    length: int
    after_first: bool

    def forward(self) -> Tensor:
        """The prompt, ``(length, embedding size)``."""
        raise NotImplementedError


class PromptOp(NamedTuple):
    """What the prompt site does in one plan: each prompt of a chain joins what was left."""

    chains: tuple[tuple[PromptPart, ...], ...]
    rows: RowMap | None
    steps: tuple[tuple[int, bool], ...]
    """The length of each prompt, and whether it stands behind the first position."""

    @property
    def length(self) -> int:
        """The positions of all prompts of a chain."""
        return sum(length for length, _ in self.steps)

    def join(self, hidden: Tensor) -> Tensor:
        """Embeddings with the prompts of each row in them: ``(batch, sequence, width)``."""
        return run_chains(self.chains, self.rows, _join, hidden)

    def insert(self, tensor: Tensor, like: Any, dim: int) -> Tensor:
        """A tensor with something in the place of every prompt.

        Args:
            tensor: The tensor.
            like: Makes what stands there, from the tensor so far and the number of positions.
            dim: The dimension of positions.
        """
        for length, after_first in self.steps:
            tensor = _inserted(tensor, like(tensor, length), after_first, dim)
        return tensor

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor ``(batch, sequence, ...)`` without the positions of prompts."""
        for length, after_first in reversed(self.steps):
            if after_first:
                tensor = torch.cat([tensor[:, :1], tensor[:, 1 + length :]], dim=1)
            else:
                tensor = tensor[:, length:]
        return tensor

    def mask(self, mask: Tensor) -> Tensor:
        """A mask ``(batch, sequence)`` in which the prompts count."""
        return self.insert(mask, lambda m, length: m.new_ones(m.shape[0], length), 1)

    def positions(self, positions: Tensor, enters: bool) -> Tensor:
        """Positions ``(..., sequence)`` that count through the prompts."""
        if not enters:
            return positions + self.length
        for length, after_first in self.steps:
            own = torch.arange(length, device=positions.device, dtype=positions.dtype)
            own = own.expand(*positions.shape[:-1], -1)
            first, rest = positions[..., :after_first], positions[..., after_first:] + length
            own = own + first + 1 if after_first else own
            positions = torch.cat([first, own, rest], dim=-1)
        return positions


def _join(parts: Sequence[PromptPart], hidden: Tensor) -> Tensor:
    for part in parts:
        prompt = part().to(hidden).expand(hidden.shape[0], -1, -1)
        hidden = _inserted(hidden, prompt, part.after_first, 1)
    return hidden


def _inserted(tensor: Tensor, rows: Tensor, after_first: bool, dim: int) -> Tensor:
    if not after_first:
        return torch.cat([rows, tensor], dim=dim)
    first, rest = torch.split(tensor, [1, tensor.shape[dim] - 1], dim=dim)
    return torch.cat([first, rows, rest], dim=dim)


class AttachedPrompt(AttachedSite):
    """The place of prompts in a live model; its parts are `PromptPart`.

    In a model that reads in both directions the prompt joins what enters the first layer, without
    a position of its own. In a causal model, and in an encoder beside a decoder, it joins the
    embeddings of tokens, and positions count through it. A cache holds its keys and values, which
    enter once. The model's outputs are cut back to the positions of the input.

    Args:
        model, backbone: The model, and what of it is called with token ids or embeddings.
        embeddings: The module whose result enters the first layer; None to join token embeddings.
        holder: The module that holds the layers; it is handed their mask.
        width: Width of what the prompt joins.
        runtime: The model's runtime.
        encoder: The encoder, where the prompt is for that side of an encoder-decoder.
    """

    kind = "prompt"

    def __init__(
        self,
        model: nn.Module,
        backbone: PreTrainedModel,
        embeddings: nn.Module | None,
        holder: nn.Module,
        width: int,
        runtime: Runtime,
        encoder: Any = None,
    ) -> None:
        self.tokens: Any = input_embeddings(encoder or backbone)
        super().__init__(PROMPT, PROMPT, None, embeddings or self.tokens, width, runtime)
        self.model, self.backbone, self.holder, self.encoder = model, backbone, holder, encoder
        self.behind_embeddings = embeddings is not None
        self.names = argument_names(type(backbone).forward)
        self.encoder_names = () if encoder is None else argument_names(type(encoder).forward)
        self.host_names = argument_names(type(self.host).forward)
        self.holder_names = argument_names(type(holder).forward)
        module = sys.modules[type(backbone).__module__]
        self.masks_late = hasattr(module, "create_bidirectional_mask")
        self.entered = False

    def needed(self, part: PromptPart) -> frozenset[str]:
        return frozenset({"enter"})

    def register(self, hook: str) -> RemovableHandle:
        handles = []
        if self.model is not self.backbone:
            handles += [
                hook_before(self.backbone, self._before_call),
                self.backbone.register_forward_hook(self._after_call),
            ]
        if self.behind_embeddings:
            handles.append(self.host.register_forward_hook(self._after_embeddings))
            if self.holder is not self.backbone and not self.masks_late:
                mask = hook_before(self.holder, self._before_layers)
                handles.append(mask)
            if self.masks_late and "attention_mask" in self.host_names:
                cut = hook_before(self.host, self._before_embeddings)
                handles.append(cut)
        if self.encoder is not None:
            enter = hook_before(self.encoder, self._before_encoder)
            handles.append(enter)
        self.entered = True
        return undoing(handles, self._leave)

    def _leave(self) -> None:
        self.entered = False

    def op(self, chains: Sequence[Sequence[PromptPart]], rows: RowMap | None) -> PromptOp:
        steps = {tuple((part.length, part.after_first) for part in chain) for chain in chains}
        if len(steps) > 1:
            raise UnsupportedError(
                "The rows of one batch need prompts of one length, all in one place. Give every "
                "chain such a prompt, or run them in separate batches."
            )
        return PromptOp(tuple(map(tuple, chains)), rows, steps.pop())

    # --- the call of the backbone -----------------------------------------------------------------

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of a model that is its own backbone, under the plan of the call."""
        if not self.entered or self.planned() is None:
            return forward(*args, **kwargs)
        args, kwargs = self._before_call(self.backbone, args, kwargs) or (args, kwargs)
        output = forward(*args, **kwargs)
        changed = self._after_call(self.backbone, args, output)
        return output if changed is None else changed

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        op: PromptOp | None = self.planned()
        if op is None:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.encoder is not None:
            self.runtime.put(PROMPT, True)
            self._extend_for_decoder(op, given)
        elif self.behind_embeddings:
            self.runtime.put(PROMPT, True)
            if self.masks_late and given.get("attention_mask") is not None:
                given["attention_mask"] = op.mask(_flat(given["attention_mask"]))
        else:
            self.runtime.put(PROMPT, self._enter_tokens(op, given, self.tokens))
        return (), given

    def _enter_tokens(self, op: PromptOp, given: dict[str, Any], tokens: nn.Module) -> bool:
        """Changes the arguments of a model that reads tokens; tells whether the prompt enters."""
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = op.mask(_flat(mask))
        enters = _is_empty(given.get("past_key_values"))
        for name in ("position_ids", "cache_position"):
            if given.get(name) is not None:
                given[name] = op.positions(given[name], enters)
        if enters:
            embeds = given.get("inputs_embeds")
            embeds = tokens(given["input_ids"]) if embeds is None else embeds
            given["inputs_embeds"], given["input_ids"] = op.join(embeds), None
            types = given.get("token_type_ids")
            if types is not None:
                given["token_type_ids"] = op.insert(types, _repeated(1), 1)
        return enters

    def _extend_for_decoder(self, op: PromptOp, given: dict[str, Any]) -> None:
        """Lets the decoder see the prompt in what the encoder gives."""
        mask, states = given.get("attention_mask"), given.get("encoder_outputs")
        if mask is None:
            return
        if states is None or states[0].shape[1] == mask.shape[1] + op.length:
            given["attention_mask"] = op.mask(_flat(mask))

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: PromptOp | None = self.planned()
        if op is None or not self.runtime.take(PROMPT):
            return None
        if self.encoder is not None:
            if not hasattr(output, "keys"):
                return None
            both = hasattr(output, _ENCODER_OUTPUT[0])
            return _changed(output, _ENCODER_OUTPUT if both else _OUTPUT, op.cut)
        hidden: Tensor = output[0]
        if self.runtime.current().heads:
            self.runtime.put(POOLED, hidden[:, 0])
        length = hidden.shape[1]

        def cut(tensor: Tensor) -> Tensor:
            return op.cut(tensor) if tensor.shape[1] == length else tensor

        if hasattr(output, "keys"):
            return _changed(output, _OUTPUT, cut)
        return tuple(_each(value, lambda t: cut(t) if t.dim() == 3 else t) for value in output)

    # --- inside -----------------------------------------------------------------------------------

    def _before_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Embeddings that read the mask get that of their own tokens."""
        op: PromptOp | None = self.planned()
        given = {**dict(zip(self.host_names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if op is None or mask is None or not self.runtime.peek(PROMPT):
            return None
        return (), {**given, "attention_mask": op.cut(mask)}

    def _after_embeddings(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: PromptOp | None = self.planned()
        if op is None or not self.runtime.peek(PROMPT):
            return None
        hidden = op.join(first_tensor(output))
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    def _before_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        op: PromptOp | None = self.planned()
        if op is None or not self.runtime.peek(PROMPT):
            return None
        given = {**dict(zip(self.holder_names, args, strict=False)), **kwargs}
        name = next((word for word in _MASKS if given.get(word) is not None), None)
        if name is None:
            return None
        given[name] = _inner_mask(op, given[name], first_argument(args, kwargs).shape[1])
        return (), given

    def _before_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        op: PromptOp | None = self.planned()
        if op is None:
            return None
        given = {**dict(zip(self.encoder_names, args, strict=False)), **kwargs}
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        embeds = given.get("inputs_embeds")
        embeds = self.tokens(ids) if embeds is None else embeds
        if mask is not None and mask.shape[1] == embeds.shape[1]:
            given["attention_mask"] = op.mask(_flat(mask))
        given["inputs_embeds"], given["input_ids"] = op.join(embeds), None
        return (), given


def _is_empty(cache: Any) -> bool:
    return bool(past_length(cache) == 0)


def _flat(mask: Any) -> Tensor:
    """A mask ``(batch, sequence)``.

    Raises:
        UnsupportedError: If it has another form, as transformers makes it for static caches.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    raise UnsupportedError(
        "Prompt tuning needs an attention mask of (batch, sequence). Masks by query, which "
        "generation with a static cache makes too, say nothing about the prompt; use a dynamic "
        "cache."
    )


def _inner_mask(op: PromptOp, mask: Tensor, length: int) -> Tensor:
    """A mask that lacks the prompt, with it; no position of the prompt sees padding.

    Args:
        op: What the site does.
        mask: ``(batch, keys)`` or ``(batch, 1, queries, keys)``, equal for all queries.
        length: The length of the sequence with the prompt.
    """
    short = length - op.length
    if mask.dim() == 2:
        return op.mask(mask) if mask.shape[1] == short else mask
    if mask.shape[-1] == short:
        additive = mask.is_floating_point()
        mask = op.insert(mask, _visible(0 if additive else 1), -1)
    if mask.shape[-2] == short:
        mask = op.insert(mask, _repeated(-2), -2)
    return mask


def _visible(value: int) -> Any:
    return lambda mask, length: mask.new_full((*mask.shape[:-1], length), value)


def _repeated(dim: int) -> Any:
    """What stands at the first position, as often as there are positions."""

    def repeat(tensor: Tensor, length: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = length
        return tensor.narrow(dim, 0, 1).expand(shape)

    return repeat


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return tuple(_each(v, change) for v in value) if type(value) in (tuple, list) else value


def _changed(output: Any, names: Sequence[str], change: Any) -> Any:
    """An output with some of its fields changed."""
    fields: Mapping[str, Any] = {
        key: _each(value, change) if key in names else value for key, value in output.items()
    }
    return type(output)(**fields)
