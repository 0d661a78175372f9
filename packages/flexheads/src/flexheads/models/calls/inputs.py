"""What happens to a model's inputs before the backbone sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flexheads.errors import ConfigError
from flexheads.sites.repeat import Once, has_rows, tile
from flexheads.sites.repeat import batch_size as batch_size

_ENCODED = ("encoder_outputs",)
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def batch_sizes(inputs: Mapping[str, Any]) -> list[int]:
    """How many rows the batch may be said to have: those of each tensor, or of all its choices."""
    sizes: dict[int, None] = {}
    for name, value in inputs.items():
        if not has_rows(name, value):
            continue
        flat = 2 + (name == "inputs_embeds")
        choices = (name in _TOKEN_INPUTS or name == "inputs_embeds") and value.dim() > flat
        sizes[value.shape[0] * value.shape[1] if choices else value.shape[0]] = None
    return list(sizes)


def repeat_rows(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeats the batch, whole after whole, in every tensor that carries it.

    Those of what an encoder has given are among them.
    """
    encoded = {name: value for name, value in inputs.items() if name in _ENCODED}
    batch = batch_size(inputs) or max(map(_rows_of, encoded.values()), default=0)
    once = Once(batch, times)
    plain = {
        name: tile(value, times) if has_rows(name, value) and len(value) == batch else value
        for name, value in inputs.items()
    }
    return {**plain, **{name: once.everywhere(value) for name, value in encoded.items()}}


def _rows_of(encoded: Any) -> int:
    """Rows of what an encoder has given: an output, a tuple, or None."""
    return 0 if encoded is None else len(encoded[0])


def among(
    run: Callable[..., Tensor] | None, rows: list[int] | slice, batch: int
) -> Callable[..., Tensor] | None:
    """What runs on whole batches, as something that runs on some of their rows.

    Args:
        run: Works row by row, on tensors that all have a batch dimension.
        rows: The rows that there will be.
        batch: Rows of the whole batch.
    """
    if run is None:
        return None

    def run_some(*some: Tensor) -> Tensor:
        whole = [tensor.new_zeros(batch, *tensor.shape[1:]) for tensor in some]
        for empty, tensor in zip(whole, some, strict=True):
            empty[rows] = tensor
        return run(*whole)[rows]

    return run_some


def flatten_choices(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Turns ``(batch, choices, sequence)`` inputs into ``(batch * choices, sequence)``.

    Returns:
        The inputs, and the number of choices, or None where the input has no such dimension.

    Raises:
        ConfigError: If only some of the inputs have it.
    """
    given = {name: inputs[name] for name in _TOKEN_INPUTS if name in inputs}
    depth = {name: t.dim() for name, t in given.items() if isinstance(t, Tensor) and t.dim()}
    if _batched(inputs.get("inputs_embeds")):
        depth["inputs_embeds"] = inputs["inputs_embeds"].dim() - 1
    if 3 not in depth.values():
        return dict(inputs), None
    if set(depth.values()) != {3}:
        raise ConfigError(
            "Some inputs are (batch, choices, sequence) and others are not: "
            + ", ".join(f"{name} has shape {tuple(inputs[name].shape)}" for name in depth)
        )
    choices = int(inputs[next(iter(depth))].shape[1])
    flat = {name: inputs[name].flatten(0, 1) for name in depth}
    return {**inputs, **flat}, choices


def with_decoder_inputs(
    inputs: Mapping[str, Any], labels: Any, config: PretrainedConfig, starts_with: str
) -> dict[str, Any]:
    """The inputs of an encoder-decoder backbone, with the decoder's own where there are none.

    Args:
        inputs: The backbone's inputs.
        labels: What the decoder shall write, ``(batch, sequence)``, if that is known; otherwise it
            reads the encoder's tokens. Either way one step late.
        config: The backbone's configuration.
        starts_with: What comes first, see `ArchitectureSpec.decoder_starts_with`.

    Raises:
        ConfigError: If there is nothing that the decoder could read.
    """
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    if any(inputs.get(name) is not None for name in names):
        return dict(inputs)
    written = inputs.get("input_ids") if labels is None else labels
    if written is None:
        raise ConfigError(
            "The decoder has nothing to read: give decoder_input_ids or decoder_inputs_embeds, or "
            "input_ids, or labels for a language-model head."
        )
    return {**inputs, "decoder_input_ids": _one_step_late(written, config, starts_with)}


def _one_step_late(ids: Tensor, config: PretrainedConfig, starts_with: str) -> Tensor:
    """The tokens one step later, behind what comes first; ignored ones are padding."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if starts_with == "last_token" and pad is not None:
        ids = ids.masked_fill(ids == -100, pad)
        last = (ids != pad).sum(dim=-1, keepdim=True) - 1
        return torch.cat([ids.gather(-1, last.clamp(min=0)), ids[..., :-1]], dim=-1)
    start = pad if start is None else start
    if start is None or pad is None:
        raise ConfigError(
            "The configuration has no decoder_start_token_id or no pad_token_id, so give "
            "decoder_input_ids."
        )
    late = ids.new_full(ids.shape, start)
    late[..., 1:] = ids[..., :-1]
    return late.masked_fill(late == -100, pad)


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
