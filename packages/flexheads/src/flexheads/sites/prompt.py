"""The prompt site: where rows of an adapter enter the first layer with the embeddings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexheads.errors import UnsupportedError
from flexheads.sites.base import (
    CALL,
    AttachedSite,
    argument_names,
    first_argument,
    first_tensor,
    input_embeddings,
)
from flexheads.sites.caches import past_length
from flexheads.sites.call import noted, real_positions
from flexheads.sites.hooking import hook_before
from flexheads.sites.joining import undoing
from flexheads.sites.prompts import PromptOp, PromptPart, flat, inner_mask, repeated
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime

PROMPT = "prompt"
POOLED = "pooled"
"""What a hook puts for heads that read the first position: the state there, of the prompt too."""

_MASKS = ("attention_mask", "attn_mask", "mask")
_OUTPUT = ("last_hidden_state", "hidden_states")
_ENCODER_OUTPUT = ("encoder_last_hidden_state", "encoder_hidden_states")


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
        self.masked = {"input_ids", "attention_mask"} <= set(self.names)
        # What fills rows up stands behind a sequence, so that its positions stay as they are; but
        # before one that can be gone on with.
        self.padded_first = encoder is None and embeddings is None
        self.counts_by_mask = False  # only known once there are prompts, because it takes a while
        self.entered = False

    def needed(self, part: PromptPart) -> frozenset[str]:
        return frozenset({"enter"})

    def register(self, hook: str) -> RemovableHandle:
        self.counts_by_mask = any(
            isinstance(inner, nn.Embedding) and _MASKS[0] in argument_names(type(inner).forward)
            for inner in self.backbone.modules()
        )
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
        op = PromptOp.of(chains, rows, self.padded_first)
        if not self.masked and any(layout.padding for layout in op.layouts):
            raise UnsupportedError(
                "This model takes no attention mask, which could hide what fills shorter rows up, "
                "so the rows of one batch need prompts of one length. Give every chain such a "
                "prompt, or run them in separate batches."
            )
        return op

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
        if op.ragged and self.masked:
            self._say_of_rows(op, given)
        if self.encoder is not None:
            self.runtime.put(PROMPT, True)
            self._extend_for_decoder(op, given)
        elif self.behind_embeddings:
            self.runtime.put(PROMPT, True)
            if self.masks_late and given.get("attention_mask") is not None:
                given["attention_mask"] = op.mask(flat(given["attention_mask"]))
        else:
            self.runtime.put(PROMPT, self._enter_tokens(op, given, self.tokens))
        return (), given

    def _enter_tokens(self, op: PromptOp, given: dict[str, Any], tokens: nn.Module) -> bool:
        """Changes the arguments of a model that reads tokens; tells whether the prompt enters."""
        read, past = _read(given), past_length(given.get("past_key_values"))
        enters, mask = bool(past == 0), given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = op.mask(flat(mask))
        if isinstance(past, int):
            self._note_tokens(op, mask, read, 0 if enters else past - op.length)
        if given.get("position_ids") is not None:
            given["position_ids"] = op.positions(given["position_ids"], enters)
        if (place := given.get("cache_position")) is not None:
            start = torch.arange(op.length if enters else 0, device=place.device)
            given["cache_position"] = torch.cat([start, place + op.length])
        if enters:
            embeds = tokens(read) if given.get("inputs_embeds") is None else read
            given["inputs_embeds"], given["input_ids"] = op.join(embeds), None
            types = given.get("token_type_ids")
            if types is not None:
                given["token_type_ids"] = op.insert(types, repeated(-1), -1)
        return enters

    def _say_of_rows(self, op: PromptOp, given: dict[str, Any]) -> None:
        """Says what a model takes for granted where all rows are alike: masks and positions.

        Raises:
            UnsupportedError: If that cannot be known.
        """
        read = _read(given)
        if read is None:  # only the decoder reads something
            if given.get("attention_mask") is None:
                raise UnsupportedError(
                    "Rows with prompts of different lengths need the attention mask with which "
                    "the encoder gave encoder_outputs."
                )
            return
        past = past_length(given.get("past_key_values")) if self.padded_first else 0
        past = int(past) - op.length if past else 0
        if given.get("attention_mask") is None:
            given["attention_mask"] = _ones(read, past)
        if not self.padded_first or "position_ids" not in self.names:
            return
        place = given.get("position_ids")
        if place is None and not self.counts_by_mask:
            place = torch.arange(past, past + read.shape[1], device=read.device)
        given["position_ids"] = None if place is None else place.expand(len(read), -1)

    def _note_tokens(
        self, op: PromptOp, mask: Any, read: Tensor, past: int = 0, side: str | None = None
    ) -> None:
        """Tells sites behind which positions are tokens; those of prompts are none.

        Args:
            op: What the site does.
            mask: The mask without prompts, or None.
            read: What the model reads, ``(batch, sequence, ...)``.
            past: How many positions without prompts the cache holds.
            side: The side of the model that reads it.
        """
        given = noted(self.runtime.peek(CALL), side)
        if given is not None:
            real = real_positions(mask)
            real = _ones(read, past).bool() if real is None else real
            given["attention_mask"] = op.tokens(real.expand(len(read), -1))

    def _extend_for_decoder(self, op: PromptOp, given: dict[str, Any]) -> None:
        """Lets the decoder see the prompt in what the encoder gives."""
        mask, states = given.get("attention_mask"), given.get("encoder_outputs")
        if mask is None:
            return
        if states is None or states[0].shape[1] == mask.shape[1] + op.length:
            given["attention_mask"] = op.mask(flat(mask))

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
            self.runtime.put(POOLED, op.first(hidden))
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
        embedded = first_tensor(output)
        mask = (self.runtime.peek(CALL) or {}).get("attention_mask")
        self._note_tokens(op, mask, embedded)
        hidden = op.join(embedded)
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    def _before_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        op: PromptOp | None = self.planned()
        if op is None or not self.runtime.peek(PROMPT):
            return None
        given = {**dict(zip(self.holder_names, args, strict=False)), **kwargs}
        hidden = first_argument(args, kwargs)
        name = next((word for word in _MASKS if given.get(word) is not None), None)
        if name is None:
            if not op.ragged or not self.masked:
                return None
            # Masks that hide nothing are left out by some implementations.
            name = next(word for word in _MASKS if word in self.holder_names)
            given[name] = hidden.new_zeros(len(hidden), 1, 1, hidden.shape[1] - op.length)
        given[name] = inner_mask(op, given[name], hidden)
        return (), given

    def _before_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        op: PromptOp | None = self.planned()
        if op is None:
            return None
        given = {**dict(zip(self.encoder_names, args, strict=False)), **kwargs}
        mask, embeds = given.get("attention_mask"), given.get("inputs_embeds")
        embeds = self.tokens(given.get("input_ids")) if embeds is None else embeds
        if mask is None and op.ragged:
            mask = _ones(embeds)
        if mask is not None and mask.shape[1] == embeds.shape[1]:
            given["attention_mask"] = op.mask(flat(mask))
        elif mask is not None:  # for the decoder it has been extended already
            mask = op.cut(flat(mask))
        self._note_tokens(op, mask, embeds, side="encoder")
        given["inputs_embeds"], given["input_ids"] = op.join(embeds), None
        return (), given


def _ones(read: Tensor, past: int = 0) -> Tensor:
    """A mask that hides nothing of what a model reads, and of what its cache holds."""
    rows, length = read.shape[:2]
    return torch.ones(rows, past + length, dtype=torch.long, device=read.device)


def _read(given: Mapping[str, Any]) -> Any:
    """The ids or the embeddings that a model reads, or None."""
    read = given.get("input_ids")
    return given.get("inputs_embeds") if read is None else read


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
