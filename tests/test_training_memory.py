"""What autograd keeps of a training step: nothing below the lowest adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads.testing import randomise, tiny_inputs, tiny_model

LAYERS = 4
FREE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(config: Any, arch: str = "bert", **changes: Any) -> Any:
    """A tiny model in training, without dropout, one of whose adapters is trained."""
    free = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if arch == "gpt2" else FREE
    depth = "n_layer" if arch == "gpt2" else "num_hidden_layers"
    model = tiny_model(arch, **free, **{depth: LAYERS}, **changes)
    model.add_adapter("a", config=config)
    model.add_classification_head("a", num_labels=2)
    randomise(model, std=0.2)
    model.train_adapter("a")
    return model.train()


def loss_of(model: Any) -> Tensor:
    inputs = tiny_inputs(model.config)
    rows = inputs["input_ids"].shape[0]
    loss: Tensor = model(**inputs, labels=torch.arange(rows) % 2).loss
    return loss


def kept(model: Any) -> list[Tensor]:
    """What autograd keeps of a step, each storage once, without weights."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            found.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    return list(found.values())


def kept_by_layer(model: Any) -> list[int]:
    """How many tensors autograd keeps of each layer of the backbone."""
    counts, now = [0] * LAYERS, [-1]
    layers = [site.host for site in model._attachment.sites.values() if site.kind == "hidden"]

    def note(tensor: Tensor) -> Tensor:
        if now[0] >= 0:
            counts[now[0]] += 1
        return tensor

    def enter(number: int) -> Callable[..., None]:
        return lambda *_: now.__setitem__(0, number)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(lambda *_: now.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model)
    return counts


def count(runs: list[int], number: int, *_: Any) -> None:
    runs[number] += 1


METHODS = {
    "seq_bn": lambda leave: flexheads.SeqBnConfig(leave_out=leave),
    "double_seq_bn": lambda leave: flexheads.DoubleSeqBnConfig(leave_out=leave),
    "par_bn": lambda leave: flexheads.ParBnConfig(leave_out=leave),
    "lora": lambda leave: flexheads.LoRAConfig(leave_out=leave),
    "ia3": lambda leave: flexheads.IA3Config(leave_out=leave),
    "prefix_tuning": lambda leave: flexheads.PrefixTuningConfig(leave_out=leave),
}


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_of_layers_below_the_lowest_adapter(arch: str, method: str) -> None:
    counts = kept_by_layer(build(METHODS[method]((0, 1)), arch))
    assert counts[:2] == [0, 0]
    assert all(counts[2:])


def test_where_all_layers_have_an_adapter_all_keep_something() -> None:
    assert all(kept_by_layer(build("seq_bn")))


def test_the_embeddings_and_the_backbone_require_no_gradients() -> None:
    model = build(METHODS["seq_bn"]((0, 1)))
    loss_of(model).backward()
    graded = [name for name, p in model.named_parameters() if p.grad is not None]
    assert graded
    assert all(name.startswith(("adapters.", "heads.")) for name in graded)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compute_nothing_again_below_the_lowest_adapter(
    reentrant: bool,
) -> None:
    model = build(METHODS["seq_bn"]((0, 1)))
    loss_of(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain = sum(tensor.nbytes for tensor in kept(model))
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert sum(tensor.nbytes for tensor in kept(model)) < plain
    runs = [0] * LAYERS
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.intermediate.register_forward_hook(partial(count, runs, number))
    model.zero_grad()
    loss_of(model).backward()
    assert runs == [1, 1, 2, 2]  # nothing is computed again where nothing is trained
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)
