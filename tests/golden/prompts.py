"""Prompts where the mask is square: theirs see padding, as the peer lets them; ours do not.

Written out with hooks on the model without adapters: the prompt behind the embeddings, and the mask
of every query. With a mask that lets the first rows see all positions these hooks give the peer's
own numbers, so that is the only difference. Where masks are added to the scores, the peer writes
ones for what may be seen, which lifts the scores of the prompt by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case, block_of, run
from .common import assert_close, call, chosen, read_config

LABELS = ("labels", "start_positions", "end_positions")
LAYERS = {"deberta": "encoder", "deberta-v2": "encoder", "distilbert": "transformer"}
SQUARE = tuple(LAYERS)
"""The model types whose masks say for every query what it sees."""


def check_square_mask(case: Case, model: Any) -> None:
    """No position of the prompt sees padding; the peer's do, and nothing else differs."""
    ((name, folder),) = case.entry["adapters"].items()
    config = read_config(case.folder / folder)["config"]
    (prompt,) = model.adapters[name].state_dict().values()
    start = 0 if config["combine"] == "prefix" else 1
    length = case.inputs()["attention_mask"].shape[-1]

    def cut(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = length + len(prompt)
        return {
            key: torch.cat([t[:, :start], t[:, start + len(prompt) :]], dim=1)
            if t.dim() > 1 and t.shape[1] == whole
            else t
            for key, t in outputs.items()
            if key != "loss"
        }

    got = cut(run(case, model, block_of(case.entry["setup"])))
    assert_close(got, cut(_by_hooks(case, model, prompt, start, sees_padding=False)))
    theirs = cut(_by_hooks(case, model, prompt, start, sees_padding=True))
    assert_close(theirs, cut(case.expected()))


def _by_hooks(
    case: Case, model: Any, prompt: Tensor, start: int, *, sees_padding: bool
) -> dict[str, Tensor]:
    """The outputs with the positions of the prompt, where there is one for each position."""

    def join(module: Any, args: Any, hidden: Tensor) -> Tensor:
        own = prompt.expand(hidden.shape[0], -1, -1)
        return torch.cat([hidden[:, :start], own, hidden[:, start:]], dim=1)

    def widen(module: Any, args: Any, kwargs: Any) -> Any:
        hidden, mask, *rest = args
        real = torch.cat([mask.new_ones(len(mask), len(prompt)), mask], dim=1)
        square = real[:, None, :] * real[:, :, None]
        if sees_padding:
            square[:, : len(prompt)] = square[:, :, : len(prompt)] = 1
        return (hidden, square, *rest), kwargs

    def widen_scores(module: Any, args: Any, kwargs: Any) -> Any:
        mask = real[:, None, None, :].float().log().clamp(min=torch.finfo(torch.float32).min)
        mask = mask.expand(-1, -1, real.shape[1], -1)
        if sees_padding:
            ours = mask[:, :, len(prompt) :, len(prompt) :]
            mask = torch.ones_like(mask)
            mask[:, :, len(prompt) :, len(prompt) :] = ours
        name = next(key for key in kwargs if key in ("attention_mask", "attn_mask"))
        return args, {**kwargs, name: mask}

    given = {key: value for key, value in case.inputs().items() if key not in LABELS}
    layers = LAYERS[model.config.model_type]
    if layers == "transformer":
        mask = given["attention_mask"]
        ones = mask.new_ones(*mask.shape[:-1], len(prompt))
        given["attention_mask"] = torch.cat([ones, mask], dim=-1)
        real = given["attention_mask"].flatten(0, -2)
        widen = widen_scores
    handles = [
        model.base_model.embeddings.register_forward_hook(join),
        model.base_model.get_submodule(layers).register_forward_pre_hook(widen, with_kwargs=True),
    ]
    model.set_active_adapters(None)
    outputs = [name for name in case.entry["outputs"] if name != "loss"]
    found = chosen(call(model, given), outputs)
    for handle in handles:
        handle.remove()
    return found
