"""LoHa and LoKr: their definitions, and the same numbers as PEFT on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexheads
from flexheads import LoHaConfig, LoKrConfig
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.lokr import factorise
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALL = {"attn_matrices": ("q", "k", "v", "o"), "intermediate": True, "output": True}
TARGETS = ["query", "key", "value", "dense"]
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "loha": (LoHaConfig, {"r": 3, "alpha": 5}),
    "loha-dropout": (LoHaConfig, {"r": 3, "rank_dropout": 0.4, "module_dropout": 0.3}),
    "loha-dropped": (LoHaConfig, {"r": 3, "module_dropout": 0.96}),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr-full": (LoKrConfig, {"r": 8, "alpha": 3}),
    "lokr-both": (LoKrConfig, {"r": 2, "decompose_both": True, "decompose_factor": 8}),
    "lokr-factor": (LoKrConfig, {"r": 2, "decompose_factor": 5}),
    "lokr-dropout": (LoKrConfig, {"r": 2, "rank_dropout": 0.4, "module_dropout": 0.3}),
    "lokr-rescaled": (
        LoKrConfig,
        {"r": 2, "rank_dropout": 0.4, "module_dropout": 0.3, "rank_dropout_scale": True},
    ),
}
WORDS = {
    "w1.full": "lokr_w1",
    "w1.a": "lokr_w1_a",
    "w1.b": "lokr_w1_b",
    "w2.full": "lokr_w2",
    "w2.a": "lokr_w2_a",
    "w2.b": "lokr_w2_b",
}

# PEFT asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

each_case = pytest.mark.parametrize("case", CASES)
each_config = pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])


def model_with(config: Any, **changes: Any) -> Any:
    model = flexheads.init(tiny_static("BertForSequenceClassification", **NO_DROPOUT, **changes))
    model.add_adapter("a", config=config, set_active=True)
    return model


def logits_of(model: Any) -> Tensor:
    return model(**tiny_inputs(model.config)).logits


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def pair(peft: Any, case: str) -> tuple[Any, Any, dict[nn.Parameter, nn.Parameter]]:
    """Our model, PEFT's, and the parameters of ours with those of PEFT's, the same in value."""
    config_class, fields = CASES[case]
    theirs_class = {LoHaConfig: peft.LoHaConfig, LoKrConfig: peft.LoKrConfig}[config_class]
    base = tiny_static("BertForSequenceClassification", **NO_DROPOUT)
    config = theirs_class(
        target_modules=TARGETS, exclude_modules=["bert.pooler.dense"], init_weights=False, **fields
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = flexheads.init(base)
    ours.add_adapter("a", config=config_class(**ALL, **fields), set_active=True)
    randomise(ours.adapters["a"], std=0.2)
    paths, same = ours._attachment.paths(), {}
    for address, part in ours.adapters["a"].parts.items():
        layer = theirs.get_submodule(f"base_model.model.bert.{paths[address]}")
        for name, parameter in part.named_parameters():
            same[parameter] = getattr(layer, WORDS.get(name, name))["default"]
            with torch.no_grad():
                same[parameter].copy_(parameter)
    trained = [p for n, p in theirs.named_parameters() if p.requires_grad]
    assert {id(p) for p in same.values()} == {id(p) for p in trained}
    ours.train_adapter("a")
    return ours, theirs, same


@each_case
def test_outputs_and_gradients_are_those_of_peft(
    peft: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, same = pair(peft, case)
    # Both draw in the same way, but not equally often; so here a draw tells by its size alone.
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.linspace(0.95, 0.05, size))
    outputs = []
    for training in (False, True):
        outputs += [logits_of(model.train(training)) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs[-2:], atol=1e-5, rtol=0)
    dropout = any("dropout" in field for field in CASES[case][1])
    assert torch.allclose(outputs[0], outputs[2], atol=1e-4) is not dropout
    weights = torch.linspace(-1, 2, outputs[0].numel()).view_as(outputs[0])
    for output in outputs[-2:]:
        if output.requires_grad:  # PEFT does not even compute what it drops
            (output * weights).sum().backward()
    for parameter, other in same.items():
        expected = torch.zeros_like(parameter) if other.grad is None else other.grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=0)


@each_case
def test_merged_weights_are_those_of_peft(peft: Any, case: str) -> None:
    ours, theirs, _ = pair(peft, case)
    acting = logits_of(ours.eval())
    ours.merge_adapter("a")
    theirs.eval().merge_and_unload()
    torch.testing.assert_close(logits_of(ours), acting, atol=1e-5, rtol=0)
    layers = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"
    for path in layers:
        merged = theirs.base_model.model.get_submodule(path).weight
        torch.testing.assert_close(ours.get_submodule(path).weight, merged, atol=1e-6, rtol=0)


def test_factors_are_those_of_peft(peft: Any) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 130):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 12, 64, 200):
            assert factorise(size, factor) == factorization(size, factor), (size, factor)


def test_loha_by_its_definition() -> None:
    model = model_with(LoHaConfig(r=2, alpha=3, attn_matrices="o"))
    part = randomise(model.adapters["a"].parts["layers.1.attention_output"])
    host = model.bert.encoder.layer[1].attention.output.dense
    hidden = torch.randn(2, 5, 32)
    delta = torch.zeros(32, 32)
    for i in range(2):
        for j in range(2):
            left = part.hada_w1_a[:, i] * part.hada_w2_a[:, j]
            delta = delta + torch.outer(left, part.hada_w1_b[i] * part.hada_w2_b[j])
    expected = hidden @ (host.weight + 1.5 * delta).T + host.bias
    torch.testing.assert_close(host(hidden), expected, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(part.delta()) == 4, "the rank is r squared"


@pytest.mark.parametrize("both", [False, True])
def test_lokr_by_its_definition(both: bool) -> None:
    config = LoKrConfig(r=1, alpha=3, attn_matrices="", intermediate=True, decompose_both=both)
    model = model_with(config)
    part = randomise(model.adapters["a"].parts["layers.0.mlp_in"])
    w1, w2 = part.w1(), part.w2()
    assert (w1.shape, w2.shape) == ((8, 4), (8, 8))
    assert (part.w1.low_rank, part.w2.low_rank) == (both, True)
    delta = torch.zeros(64, 32)
    for row in range(64):
        for column in range(32):
            delta[row, column] = w1[row // 8, column // 8] * w2[row % 8, column % 8] * 3
    host = model.bert.encoder.layer[0].intermediate.dense
    hidden = torch.randn(2, 5, 32)
    expected = hidden @ (host.weight + delta).T + host.bias
    torch.testing.assert_close(host(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [LoHaConfig(), LoKrConfig(), LoKrConfig(init_weights="lycoris"), LoKrConfig(r=99)],
)
def test_identity_at_the_start_unless_random(config: Any) -> None:
    model = model_with(config)
    before, acting = model(**tiny_inputs(model.config), adapter_names=[]).logits, logits_of(model)
    assert torch.equal(before, acting)
    model.add_adapter("random", config=config.replace(init_weights=False), set_active=True)
    assert not torch.allclose(logits_of(model), before, atol=1e-4)


def test_rank_dropout_that_leaves_no_row_gives_no_nan() -> None:
    model = model_with(LoHaConfig(rank_dropout=0.999))
    randomise(model.adapters["a"])
    assert logits_of(model.train()).isfinite().all()


@each_config
def test_files_bring_the_adapter_back(config: Any, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config=config(**ALL, r=2), set_active=True)
    randomise(model.adapters["a"])
    hidden = model(**tiny_inputs(model.config)).last_hidden_state
    model.save_adapter(tmp_path / "alone", "a")
    other = tiny_model("bert")
    other.load_adapter(tmp_path / "alone", load_as="b", set_active=True)
    assert other.adapters["b"].config == model.adapters["a"].config
    assert torch.equal(other(**tiny_inputs(model.config)).last_hidden_state, hidden)
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(**tiny_inputs(model.config)).last_hidden_state, hidden)


def test_seeds_and_layers() -> None:
    config = flexheads.load_config("loha[r=2, init_weights_seed=7, leave_out=(0,)]")
    one, other = (model_with(config).adapters["a"] for _ in range(2))
    assert list(one.parts) == ["layers.1.query", "layers.1.value"]
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LoHaConfig, {"r": 0}, "positive whole number"),
        (LoHaConfig, {"attn_matrices": "x"}, "names"),
        (LoHaConfig, {"rank_dropout": 1.0}, "rank_dropout"),
        (LoHaConfig, {"init_weights": "lycoris"}, "init_weights"),
        (LoKrConfig, {"decompose_factor": 0}, "decompose_factor"),
        (LoKrConfig, {"module_dropout": -0.1}, "module_dropout"),
    ],
)
def test_bad_fields_are_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_bad_places_are_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="leave_out"):
        model.add_adapter("a", LoHaConfig(leave_out=(9,)))
    with pytest.raises(ConfigError, match="adapts nothing"):
        model.add_adapter("a", LoHaConfig(attn_matrices=()))
    assert not model.adapters


def test_merging_comes_back_bit_for_bit() -> None:
    model = model_with(LoKrConfig(**ALL))
    randomise(model.adapters["a"])
    before = {key: tensor.clone() for key, tensor in model.bert.state_dict().items()}
    model.merge_adapter("a")
    with pytest.raises(UnsupportedError, match="merged already"):
        model.merge_adapter("a")
    model.reset_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.bert.state_dict().items())
