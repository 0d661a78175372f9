"""AdapterFusion: the paper's attention, training just it, its files, and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads import Fuse, Stack
from flexheads.errors import CheckpointError, CompositionError, ConfigError, UnknownNameError
from flexheads.testing import randomise, tiny_inputs, tiny_model


def fused(config: Any = None, adapter: str = "seq_bn", **changes: Any) -> Any:
    """A tiny model with adapters a, b, c and a fusion of a and b, all with random weights."""
    model = tiny_model("bert")
    for seed, name in enumerate("abc"):
        model.add_adapter(name, config=flexheads.load_config(adapter))
        randomise(model.adapters[name], seed=seed)
    fields = flexheads.AdapterFusionConfig.load(config, **changes)
    model.add_adapter_fusion(["a", "b"], fields, set_active=True)
    randomise(model.adapter_fusions["a,b"], std=0.1, seed=9)
    return model


@torch.no_grad()
def run(model: Any, **call: Any) -> Any:
    return model(**tiny_inputs(model.config), **call)


def noted(model: Any) -> dict[str, Any]:
    """What enters and leaves the last layer norm of the last layer, and the residual before."""
    seen: dict[str, Any] = {}
    layer = model.bert.encoder.layer[-1]
    hooks = [
        layer.output.dropout.register_forward_hook(lambda m, a, out: seen.update(x=out)),
        layer.intermediate.register_forward_pre_hook(lambda m, a: seen.update(r=a[0])),
        layer.output.LayerNorm.register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("dynamic", {}),
        ("static", {}),
        ("dynamic", {"value_before_softmax": False}),
        ("dynamic", {"query_before_ln": True}),
        ("dynamic", {"residual_before": True}),
        ("static", {"key": False, "query": False}),
    ],
)
def test_fusion_is_attention_over_the_adapters(config: str, changes: dict[str, Any]) -> None:
    """Pfeiffer et al. 2021, equations 1 to 4, computed from the layer's own tensors."""
    model = fused(config, **changes)
    seen, norm = noted(model), model.bert.encoder.layer[-1].output.LayerNorm.forward
    part = model.adapter_fusions["a,b"].parts["layers.1.feed_forward"]
    fields = part.config
    with torch.no_grad():
        hidden = norm(seen["x"] + seen["r"])
        ups = [_up(model, name, hidden) for name in "ab"]
        if fields.residual_before:
            ups = [up + seen["x"] for up in ups]
        query = seen["x"] if fields.query_before_ln else hidden
        query = query if part.query is None else part.query(query)
        keys = ups if part.key is None else [part.key(up) for up in ups]
        scores = torch.stack([(query * key).sum(-1) for key in keys], -1).softmax(-1)
        value = torch.nn.Identity() if part.value is None else part.value
        if fields.value_before_softmax:
            context = sum(scores[..., n, None] * value(up) for n, up in enumerate(ups))
        else:
            context = value(sum(scores[..., n, None] * up for n, up in enumerate(ups)))
        skip = 0 if fields.residual_before else seen["x"]
        expected = norm(context + skip + seen["r"])
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=0)


def _up(model: Any, name: str, hidden: Tensor) -> Tensor:
    part = model.adapters[name].parts["layers.1.feed_forward"]
    result: Tensor = part.up(torch.relu(part.down(hidden)))
    return result


def test_one_adapter_fused_without_values_is_that_adapter() -> None:
    model = fused("static")
    model.add_adapter_fusion(["a"], "static")
    expected = run(model, adapter_names="a").last_hidden_state
    actual = run(model, adapter_names=Fuse("a")).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_stack_inside_a_fusion_goes_through_its_adapters() -> None:
    model = fused()
    plain = run(model).last_hidden_state
    stacked = run(model, adapter_names=Fuse(Stack("c", "a"), "b")).last_hidden_state
    assert not torch.allclose(plain, stacked, atol=1e-3)


def test_parallel_adapters_are_added_once() -> None:
    """The peer adds the residual a second time where the fused adapters are parallel."""
    model = fused("static", adapter="par_bn")
    model.add_adapter_fusion(["a"], "static")
    expected = run(model, adapter_names="a").last_hidden_state
    actual = run(model, adapter_names=Fuse("a")).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_training_a_fusion_trains_it_and_its_head_alone() -> None:
    model = fused().train()
    model.add_classification_head("a,b", num_labels=2)
    model.train_adapter_fusion(["a", "b"])
    labels = torch.zeros(3, dtype=torch.long)
    output = model(**tiny_inputs(model.config), labels=labels)
    (output.loss + model.get_fusion_regularization_loss()).backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    wanted = [n for n, _ in model.named_parameters() if "fusions.a,b" in n or "heads.a,b" in n]
    assert got == set(wanted)
    model.train_adapter_fusion(Fuse("a", "b"), unfreeze_adapters=True)
    assert all(p.requires_grad for p in model.adapters["a"].parameters())
    assert not any(p.requires_grad for p in model.adapters["c"].parameters())


def test_regularisation_is_the_distance_from_the_identity() -> None:
    model = fused()
    model.train_adapter_fusion(Fuse("a", "b"))
    values = [p.value.weight for p in model.adapter_fusions["a,b"].parts.values()]
    expected = sum(0.01 * (torch.eye(32) - value).pow(2).sum() for value in values)
    torch.testing.assert_close(model.get_fusion_regularization_loss(), expected)
    model.train_adapter("a")
    assert model.get_fusion_regularization_loss() is None


def test_temperature_is_annealed_in_training_only() -> None:
    model = fused(temperature=True, dropout_prob=0.0)
    part = model.adapter_fusions["a,b"].parts["layers.0.feed_forward"]
    run(model)
    assert part.temperature == 50.0
    model.train()
    for _ in range(3):
        run(model)
    assert part.temperature == pytest.approx(49.85)


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = fused()
    model.add_classification_head("a,b", num_labels=2)
    model.active_head = "a,b"
    model.save_adapter_fusion(tmp_path / "f", Fuse("a", "b"), with_head=True)
    for name in "ab":
        model.save_adapter(tmp_path / name, name)
    other = tiny_model("bert")
    with pytest.raises(UnknownNameError, match="'a'"):
        other.load_adapter_fusion(tmp_path / "f")
    for name in "ab":
        other.load_adapter(tmp_path / name)
    assert other.load_adapter_fusion(tmp_path / "f", set_active=True) == "a,b"
    other.active_head = "a,b"
    assert torch.equal(run(other).logits, run(model).logits)
    with pytest.raises(CheckpointError, match="no adapter"):
        other.load_adapter(tmp_path / "f")


def test_a_whole_model_keeps_its_fusions(tmp_path: Path) -> None:
    model = fused("static")
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert other.active_adapters == Fuse("a", "b")
    assert torch.equal(run(other).last_hidden_state, run(model).last_hidden_state)


def test_attentions_are_shown_on_request() -> None:
    output = run(fused(), output_adapter_fusion_attentions=True)
    scores = output.adapter_fusion_attentions["a,b"]
    assert list(scores) == [0, 1]
    assert scores[0]["feed_forward"].shape == (3, 7, 2)
    torch.testing.assert_close(scores[1]["feed_forward"].sum(-1), torch.ones(3, 7))
    assert "adapter_fusion_attentions" not in run(fused())


def test_gating_scores_are_shown_on_request() -> None:
    model = tiny_model("bert")
    model.add_adapter("a", flexheads.load_config("seq_bn", use_gating=True), set_active=True)
    scores = run(model, output_adapter_gating_scores=True).adapter_gating_scores["a"]
    assert list(scores) == [0, 1]
    assert scores[0]["feed_forward"].shape == (3, 1, 1)


def test_deleting_a_fusion_deactivates_it() -> None:
    model = fused()
    model.delete_adapter_fusion(["a", "b"])
    assert model.active_adapters is None
    with pytest.raises(UnknownNameError, match="fusion"):
        model.set_active_adapters(Fuse("a", "b"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.add_adapter_fusion(["a", "x"]), UnknownNameError, "'x'"),
        (lambda m: m.add_adapter_fusion(["a", "b"]), ConfigError, "already"),
        (lambda m: m.add_adapter_fusion(["a", "double"]), ConfigError, "same places"),
        (lambda m: m.add_adapter_fusion(["lora", "lora"]), ConfigError, "bottleneck"),
        (lambda m: m.add_adapter_fusion(["a", "c"], "slow"), ConfigError, "dynamic"),
        (lambda m: m.train_adapter_fusion("a"), CompositionError, "Fuse"),
        (lambda m: m.set_active_adapters(Fuse("a", "c")), UnknownNameError, "fusion"),
    ],
)
def test_bad_input_changes_nothing(call: Any, error: type[Exception], words: str) -> None:
    model = fused()
    model.add_adapter("double", "double_seq_bn")
    model.add_adapter("lora", "lora")
    before = run(model).last_hidden_state
    with pytest.raises(error, match=words):
        call(model)
    assert model.adapter_fusions.keys() == ("a,b",)
    assert torch.equal(run(model).last_hidden_state, before)
