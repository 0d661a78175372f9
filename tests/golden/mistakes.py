"""What is right where the peer's own numbers are no target, by case.

What the peer does there: a Stack inside another block misses the residual and the norm between its
members; invertible adapters, prompts and ReFT take the first member for all rows, and of a Stack or
an Average; DiReFT is saved without what makes it one; a second LoRA acts on the first one's delta;
IA3 is merged without the projections' biases; a prompt sees padding where the mask is square; the
bias of a language-model head is lost where a whole checkpoint is converted.
"""

from __future__ import annotations

import collections
import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.composition import Average
from flexheads.routing import route

from .blocks import check_averaged, check_fused_stack
from .cases import Case, block_of, model_for, run
from .common import assert_close, assert_tensor_close, call, pick, read_config, tensors_of
from .magnitudes import check_dora
from .prompts import SQUARE, check_square_mask


def check_chains(case: Case, model: Any) -> None:
    """Every row goes through its chain as a Stack at the top level would, inverse and all."""
    routing = route(block_of(case.entry["setup"]))
    got = run(case, model)
    heads = [name for name in got if name[0].isdigit()]
    whole = case.inputs()
    starts = [sum(routing.sizes[:n]) for n in range(len(routing.chains))] if routing.sizes else None
    for number, chain in enumerate(routing.chains):
        rows = slice(None)
        if starts is not None:
            rows = slice(starts[number], starts[number] + routing.sizes[number])
        given = {key: tensor[rows] for key, tensor in whole.items()}
        single = call(model, given, adapter_names=list(chain), head=chain[-1] if heads else [])
        batch = single[0].shape[0]
        # Scores of pairs are about the rows of other chains too.
        plain = [name for name in got if name != "logits_per_text"]
        for name in [n for n in heads if n.startswith(f"{number}.")] or plain:
            own = got[name] if heads else got[name][number * batch : (number + 1) * batch]
            assert_tensor_close(own, pick(single, name.rpartition(".")[2]), name)


@torch.no_grad()
def check_added_deltas(case: Case, model: Any) -> None:
    """Stacked LoRAs add their deltas: the plain model with the sum folded in gives the same."""
    plain = model_for(case.other("base"))
    attachment = plain._attachment
    sites = {path: attachment.sites[address] for address, path in attachment.paths().items()}
    for folder in case.entry["adapters"].values():
        config = read_config(case.folder / folder)["config"]
        factors: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for key, tensor in tensors_of(case.folder / folder).items():
            path, _, rest = key.partition(".loras.")
            factors[path.removeprefix(f"{plain.base_model_prefix}.")][rest[-6:]] = tensor
        for path, parts in factors.items():
            delta = parts["lora_B"] @ parts["lora_A"] * (config["alpha"] / config["r"])
            sites[path].projection.weight.add_(delta)
    assert_close(run(case, model), run(case, plain, None))


def check_inner_chains(case: Case, model: Any) -> None:
    """A Parallel in a Stack; the peer lets it pass where it refuses a Parallel, and drops rows."""
    if "image_embeds" in case.entry["outputs"]:
        check_chains(case, model)
    else:
        assert_close(run(case, model), case.expected())


def check_merged(case: Case, model: Any) -> None:
    """A merged IA3 equals the unmerged one, biases of the projections included."""
    merged = run(case, model)
    alone = case.other(f"adapter/{case.entry['merge']}")
    assert_close(merged, alone.expected())
    model.reset_adapter()
    assert_close(run(case, model), case.other("base").expected())


def check_decomposed(case: Case, model: Any) -> None:
    """A decomposition in single precision: the peer's numbers too are 2e-5 from the exact ones."""
    got = run(case, model)
    for name, tensor in case.expected().items():
        torch.testing.assert_close(got[name], tensor, atol=3e-5, rtol=0)


def check_whole_checkpoint(case: Case, model: Any) -> None:
    """The head of a static checkpoint, taken over, gives the static outputs, decoder bias and all.

    The peer converts while it loads the checkpoint; we save the static head and load it.
    """
    plain = case.other(case.entry["id"].replace("flex_auto", "plain"))
    with tempfile.TemporaryDirectory() as folder:
        model_for(plain).save_head(folder)
        assert model.load_head(folder, load_as="default") == "default"
    expected = {name: plain.expected()[name] for name in case.entry["outputs"]}
    assert_close(run(case, model), expected)


def check_like_static(case: Case, model: Any) -> None:
    """The converted head gives the peer's outputs, and those of the static class."""
    assert_close(run(case, model), case.expected())
    static = case.other(case.entry["id"].replace("flex_adapter", "adapter"))
    assert_close(run(case, model), static.expected())


def check_couplings(case: Case, model: Any) -> None:
    """Stacked invertible adapters follow one another behind the embeddings; or their mean."""
    plain, block = model_for(case.other("base")), block_of(case.entry["setup"])
    couplings = []
    for name, folder in case.entry["adapters"].items():
        config = read_config(case.folder / folder)["config"]
        plain.add_adapter(name, {**config, "inv_adapter": None, "architecture": None})
        own = model.adapters[name].state_dict()
        rest = {key: tensor for key, tensor in own.items() if "embeddings." not in key}
        plain.adapters[name].load_state_dict(rest)
        stem = f".invertible_adapters.{name}."
        tensors = tensors_of(case.folder / folder).items()
        couplings.append(
            ({k.partition(stem)[2]: t for k, t in tensors if stem in k}, config["non_linearity"])
        )

    def coupled(hidden: Tensor) -> Tensor:
        mean = torch.zeros_like(hidden)
        for number, (tensors, non_linearity) in enumerate(couplings):
            single = nice(hidden, tensors, getattr(torch.nn.functional, non_linearity))
            if isinstance(block, Average):
                mean = mean + block.weights[number] * single
            else:
                hidden = single
        return mean if isinstance(block, Average) else hidden

    # The library has them act behind the positions, which its files are loaded for.
    host = plain.base_model.get_submodule(plain.spec.late_embeddings or plain.spec.embeddings)
    if plain.spec.embeddings_from == "output":
        host.register_forward_hook(lambda module, args, hidden: coupled(hidden))
    else:
        host.register_forward_pre_hook(lambda module, args: (coupled(args[0]), *args[1:]))
    assert_close(run(case, model), run(case, plain, block))


def nice(hidden: Tensor, tensors: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """The additive coupling, written out."""

    def subnet(word: str, half: Tensor) -> Tensor:
        inner = act(half @ tensors[f"{word}.0.weight"].T + tensors[f"{word}.0.bias"])
        return inner @ tensors[f"{word}.2.weight"].T + tensors[f"{word}.2.bias"]

    left, right = hidden.chunk(2, dim=-1)
    left = left + subnet("F", right)
    return torch.cat([left, right + subnet("G", left)], dim=-1)


def check_direft(case: Case, model: Any) -> None:
    """The file does not say that nothing is subtracted; told so, it gives what the peer had."""
    (name,) = case.entry["adapters"]
    state = model.adapters[name].state_dict()
    fields = {**model.adapters[name].config.to_dict(), "subtract_projection": False}
    model.add_adapter(name, fields, overwrite_ok=True)
    model.adapters[name].load_state_dict(state)
    assert_close(run(case, model), case.expected())


def check_stacked_reft(case: Case, model: Any) -> None:
    """Stacked interventions follow one another behind each layer."""
    _check_reft(
        case, model, lambda hidden, edits: functools.reduce(lambda h, f: f(h), edits, hidden)
    )


def check_averaged_reft(case: Case, model: Any) -> None:
    """Averaged interventions give the weighted mean of what each gives."""
    weights = case.entry["setup"]["kwargs"]["weights"]
    _check_reft(
        case,
        model,
        lambda hidden, edits: sum(w * f(hidden) for w, f in zip(weights, edits, strict=True)),
    )


_MASKS = {"decoder": "decoder_attention_mask", "vision_config": "no mask"}
"""What tells the tokens of a part of a model."""


def check_reft_of_sides(case: Case, model: Any) -> None:
    """The last tokens of a decoder, or of an image, are its own; the peer has one mask for both."""
    if {"decoder", "vision_config"} & {layers.part for layers in model.spec.layers}:
        check_stacked_reft(case, model)
    else:
        assert_close(run(case, model), case.expected())


def _check_reft(case: Case, model: Any, combine: Callable[[Tensor, Any], Tensor]) -> None:
    plain, given = model_for(case.other("base")), case.inputs()
    folders = {name: case.folder / where for name, where in case.entry["adapters"].items()}
    paths, sites = plain._attachment.paths(), plain._attachment.sites
    for site in [site for site in sites.values() if site.kind == "hidden"]:
        mask = given.get(_MASKS.get(site.side, "attention_mask"))
        edits = [
            functools.partial(
                edited,
                {
                    key.partition(f"{paths[site.address]}.reft_layer.refts.{name}.units.")[2]: t
                    for key, t in tensors_of(folder).items()
                },
                read_config(folder)["config"],
                mask,
            )
            for name, folder in folders.items()
        ]

        def behind_layer(module: Any, args: Any, output: Any, edits: Any = edits) -> Any:
            if isinstance(output, tuple):
                return (combine(output[0], edits), *output[1:])
            return combine(output, edits)

        site.host.register_forward_hook(behind_layer)
    assert_close(run(case, model), run(case, plain, None))


def edited(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """The intervention written out, row by row and position by position; no non-linearity."""
    assert not config["non_linearity"]
    assert not config["tied_weights"]
    result = hidden.clone()
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask
    for row in range(hidden.shape[0]):
        real = range(hidden.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
        units = dict.fromkeys(real[: config["prefix_positions"]], "0")
        units |= dict.fromkeys(real[len(real) - config["suffix_positions"] :], "1")
        for column, unit in units.items():
            projection = projection_of(tensors, f"{unit}.projection.", config["r"])
            weight, bias = (tensors[f"{unit}.learned_source.{w}"] for w in ("weight", "bias"))
            state = hidden[row, column]
            change = projection.T @ (weight @ state + bias - projection @ state)
            result[row, column] = state + change
    return result


def projection_of(tensors: Mapping[str, Tensor], stem: str, r: int) -> Tensor:
    """A projection, parametrised by torch itself where it is orthonormal."""
    own = {k.removeprefix(stem): t for k, t in tensors.items() if k.startswith(stem)}
    layer = torch.nn.Linear(next(iter(own.values())).shape[1], r, bias=False)
    if "weight" not in own:
        layer = torch.nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict(own)
    return layer.weight.detach()


def check_without_prompt(case: Case, model: Any) -> None:
    """The outputs are the peer's without the positions of the prompt, and labels line up."""
    if model.config.model_type in SQUARE:
        check_square_mask(case, model)
        return
    got, expected = run(case, model), case.expected()
    ((_, folder), *_) = case.entry["adapters"].items()
    config = read_config(case.folder / folder)["config"]
    start = 0 if config["combine"] == "prefix" else 1
    for name, tensor in expected.items():
        if tensor.dim() > 1 and got[name].shape[1:2] != tensor.shape[1:2]:
            first, rest = tensor[:, :start], tensor[:, start + config["prompt_length"] :]
            expected[name] = torch.cat([first, rest], dim=1)
    if "start_logits" in expected:
        labels = case.inputs()
        losses = [
            torch.nn.functional.cross_entropy(expected[f"{w}_logits"], labels[f"{w}_positions"])
            for w in ("start", "end")
        ]
        expected["loss"] = sum(losses) / 2
    assert_close(got, expected)


def check_pooled_prompt(case: Case, model: Any) -> None:
    """What is read at the first position is the peer's, unless the peer's prompt sees padding."""
    if model.config.model_type in SQUARE:
        check_square_mask(case, model)
    else:
        assert_close(run(case, model), case.expected())


def check_stacked_prompts(case: Case, model: Any) -> None:
    """Every prompt of a Stack stands before what the last one left, as one long prompt does."""
    names = list(case.entry["adapters"])
    weights = [model.adapters[name].state_dict() for name in reversed(names)]
    (key,) = weights[0]
    joined = torch.cat([own[key] for own in weights])
    config = model.adapters[names[0]].config.replace(prompt_length=len(joined))
    model.add_adapter("both", config)
    model.adapters["both"].load_state_dict({key: joined})
    got = run(case, model)
    assert_close(got, run(case, model, "both"))
    assert not torch.allclose(
        got["last_hidden_state"], run(case, model, names[0])["last_hidden_state"]
    )


def check_averaged_prompts(case: Case, model: Any) -> None:
    """An Average of prompts is the prompt with their mean, which the peer divides once more."""
    names, shares = list(case.entry["adapters"]), case.entry["setup"]["kwargs"]["weights"]
    owns = [model.adapters[name].state_dict() for name in names]
    pairs = list(zip(owns, shares, strict=True))
    mean = {key: sum(share * own[key] for own, share in pairs) for key in owns[0]}
    model.add_adapter("mean", model.adapters[names[0]].config)
    model.adapters["mean"].load_state_dict(mean)
    assert_close(run(case, model), run(case, model, "mean"))


def check_unscaled(case: Case, model: Any) -> None:
    """Without a head the states are the backbone's own; the peer's T5 scales them as for words."""
    got, expected = run(case, model), case.expected()
    if model.config.model_type == "t5":
        expected["last_hidden_state"] = expected["last_hidden_state"] * model.config.d_model**0.5
    assert_close(got, expected)


# By the case's id, or the end of it.
CHECKS: dict[str, Callable[[Case, Any], None]] = {
    "compose/bn_average": check_averaged,
    "compose/bn_average_w": check_averaged,
    "compose/bn_stack_average": check_averaged,
    "compose/lora_average": check_averaged,
    "compose/ia3_average": check_averaged,
    "compose/bn_fuse_stack": check_fused_stack,
    "compose/bn_parallel_stack": check_chains,
    "compose/bn_stack_parallel": check_inner_chains,
    "compose/bn_batchsplit_stack": check_chains,
    "compose_heads/parallel_stack": check_chains,
    "compose/inv_parallel": check_chains,
    "compose/inv_batchsplit": check_chains,
    "compose/inv_stack": check_couplings,
    "compose/inv_average": check_couplings,
    "compose/lora_stack": check_added_deltas,
    "compose/ia3_parallel": check_chains,
    "compose/reft_parallel": check_chains,
    "compose/reft_batchsplit": check_chains,
    "compose/reft_stack": check_stacked_reft,
    "compose/reft_average": check_averaged_reft,
    "adapter/mtl_lora": check_unscaled,
    "adapter/direft": check_direft,
    "adapter/noreft": check_reft_of_sides,
    "average/lora_delta_w_svd": check_decomposed,
    "adapter/dora": check_dora,
    "adapter/dvora": check_dora,
    "merge/dora": check_dora,
    "adapter/prompt_tuning": check_without_prompt,
    "adapter/prompt_tuning_postfix": check_without_prompt,
    "classification+prompt_tuning": check_pooled_prompt,
    "multilabel+prompt_tuning": check_pooled_prompt,
    "multiple_choice+prompt_tuning": check_pooled_prompt,
    "tagging+prompt_tuning": check_without_prompt,
    "qa+prompt_tuning": check_without_prompt,
    "masked_lm+prompt_tuning": check_without_prompt,
    "causal_lm+prompt_tuning": check_without_prompt,
    "compose/prompt_stack": check_stacked_prompts,
    "compose/prompt_parallel": check_chains,
    "compose/prompt_batchsplit": check_chains,
    "compose/prompt_average": check_averaged_prompts,
    "merge/ia3": check_merged,
    "flex_auto": check_whole_checkpoint,
    "flex_adapter": check_like_static,
}
