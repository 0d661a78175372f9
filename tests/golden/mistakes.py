"""What is right where the peer's own numbers are no target, by case.

What the peer does there: a Stack inside another block misses the residual and the norm between its
members; invertible adapters take the first member for all rows, and of a Stack; a second LoRA acts
on the first one's delta; IA3 is merged without the projections' biases; the bias of a
language-model head is lost where a whole checkpoint is converted.
"""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.routing import route

from .cases import Case, block_of, model_for, run
from .common import assert_close, assert_tensor_close, call, pick, read_config, tensors_of


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
        for name in heads[number : number + 1] or got:
            own = got[name] if heads else got[name][number * batch : (number + 1) * batch]
            assert_tensor_close(own, pick(single, name.rpartition(".")[2]), name)


def check_added_deltas(case: Case, model: Any) -> None:
    """Stacked LoRAs add their deltas: the plain model with the sum folded in gives the same."""
    plain = model_for(case.other("base"))
    state = plain.base_model.state_dict()
    for folder in case.entry["adapters"].values():
        config = read_config(case.folder / folder)["config"]
        factors: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for key, tensor in tensors_of(case.folder / folder).items():
            path, _, rest = key.partition(".loras.")
            factors[path.removeprefix(f"{plain.base_model_prefix}.")][rest[-6:]] = tensor
        for path, parts in factors.items():
            delta = parts["lora_B"] @ parts["lora_A"] * (config["alpha"] / config["r"])
            state[f"{path}.weight"] += delta
    assert_close(run(case, model), run(case, plain, None))


def check_merged(case: Case, model: Any) -> None:
    """A merged IA3 equals the unmerged one, biases of the projections included."""
    merged = run(case, model)
    alone = case.other(f"adapter/{case.entry['merge']}")
    assert_close(merged, alone.expected())
    model.reset_adapter()
    assert_close(run(case, model), case.other("base").expected())


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


def check_stacked_couplings(case: Case, model: Any) -> None:
    """Stacked invertible adapters follow one another behind the embeddings."""
    plain, names = model_for(case.other("base")), list(case.entry["adapters"])
    couplings = []
    for name, folder in case.entry["adapters"].items():
        config = read_config(case.folder / folder)["config"]
        plain.add_adapter(name, {**config, "inv_adapter": None, "architecture": None})
        own = model.adapters[name].state_dict()
        rest = {key: tensor for key, tensor in own.items() if not key.startswith("embeddings.")}
        plain.adapters[name].load_state_dict(rest)
        stem = f".invertible_adapters.{name}."
        tensors = tensors_of(case.folder / folder).items()
        couplings.append(
            ({k.partition(stem)[2]: t for k, t in tensors if stem in k}, config["non_linearity"])
        )

    def behind_embeddings(module: Any, args: Any, hidden: Tensor) -> Tensor:
        for tensors, non_linearity in couplings:
            hidden = nice(hidden, tensors, getattr(torch.nn.functional, non_linearity))
        return hidden

    plain.base_model.embeddings.register_forward_hook(behind_embeddings)
    assert_close(run(case, model), run(case, plain, names))


def nice(hidden: Tensor, tensors: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """The additive coupling, written out."""

    def subnet(word: str, half: Tensor) -> Tensor:
        inner = act(half @ tensors[f"{word}.0.weight"].T + tensors[f"{word}.0.bias"])
        return inner @ tensors[f"{word}.2.weight"].T + tensors[f"{word}.2.bias"]

    left, right = hidden.chunk(2, dim=-1)
    left = left + subnet("F", right)
    return torch.cat([left, right + subnet("G", left)], dim=-1)


# By the case's id, or the end of it.
CHECKS: dict[str, Callable[[Case, Any], None]] = {
    "compose/bn_parallel_stack": check_chains,
    "compose/bn_batchsplit_stack": check_chains,
    "compose_heads/parallel_stack": check_chains,
    "compose/inv_parallel": check_chains,
    "compose/inv_batchsplit": check_chains,
    "compose/inv_stack": check_stacked_couplings,
    "compose/lora_stack": check_added_deltas,
    "merge/ia3": check_merged,
    "flex_auto": check_whole_checkpoint,
    "flex_adapter": check_like_static,
}
