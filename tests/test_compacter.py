"""Compacters: hypercomplex layers against their definition, what is shared, and bad input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexheads import CompacterConfig, CompacterPlusPlusConfig, Parallel, load_config
from flexheads.checkpoints.store import read_tensors, write_tensors
from flexheads.errors import CheckpointError, ConfigError
from flexheads.methods.phm import PhmLinear, SharedPhm
from flexheads.testing import randomise, tiny_inputs, tiny_model

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "own rule": {"shared_phm_rule": False},
    "factorised rule": {"factorized_phm_rule": True},
    "full W": {"factorized_phm_W": False},
    "shared W": {"shared_W_phm": True, "phm_rank": 2},
    "shared full W": {"shared_W_phm": True, "factorized_phm_W": False},
    "nothing shared": {"shared_phm_rule": False, "factorized_phm_W": False},
}
SHARED = {
    "default": {"phm_rule"},
    "own rule": set(),
    "factorised rule": {"phm_rule_left", "phm_rule_right"},
    "full W": {"phm_rule"},
    "shared W": {"phm_rule", *(f"W_{p}_{s}" for p in ("down", "up") for s in ("left", "right"))},
    "shared full W": {"phm_rule", "W_down", "W_up"},
    "nothing shared": set(),
}
each_form = pytest.mark.parametrize("form", FORMS)


def config_of(form: str, **changes: Any) -> CompacterConfig:
    return CompacterConfig(**{"reduction_factor": 4, **FORMS[form], **changes})


def product(owner: Any, name: str) -> Tensor:
    """A factor, multiplied out where it is factorised."""
    if hasattr(owner, name):
        return getattr(owner, name)
    left, right = getattr(owner, f"{name}_left"), getattr(owner, f"{name}_right")
    return torch.stack([one @ other for one, other in zip(left, right, strict=True)])


@each_form
@pytest.mark.parametrize("position", ["down", "up"])
def test_the_layer_is_a_sum_of_kronecker_products(form: str, position: Any) -> None:
    config = config_of(form)
    shared = randomise(SharedPhm(32, 8, config), seed=1)
    inputs, outputs = (32, 8) if position == "down" else (8, 32)
    layer = randomise(PhmLinear(inputs, outputs, position, config, shared), seed=2)
    rule = product(shared if config.shared_phm_rule else layer, "phm_rule")
    weight = product(*((shared, f"W_{position}") if config.shared_W_phm else (layer, "W")))
    whole = sum(torch.kron(a, w) for a, w in zip(rule, weight, strict=True))
    hidden = torch.randn(2, 5, inputs)
    expected = hidden @ whole + layer.b
    torch.testing.assert_close(layer(hidden), expected)
    assert expected.abs().max() > 0.1


def build(form: str = "default", **changes: Any) -> Any:
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.add_adapter("c", config_of(form, **changes), set_active=True)
    randomise(model.adapters["c"])
    return model


def output(model: Any, call: Any = None) -> Tensor:
    return (model if call is None else call)(**tiny_inputs(model.config)).last_hidden_state


@each_form
def test_shared_tensors_are_there_once_and_learn(form: str) -> None:
    model = build(form)
    stem = "shared.phm."
    found = {k.removeprefix(stem) for k in model.adapters["c"].state_dict() if k.startswith(stem)}
    assert found == SHARED[form]
    model.train_adapter("c")
    (output(model) ** 2).sum().backward()
    assert all(bool(p.grad.abs().max() > 0) for p in model.adapters["c"].parameters())


@each_form
def test_files_copies_and_pickles(form: str, tmp_path: Path) -> None:
    model = build(form)
    expected = output(model)
    model.save_adapter(tmp_path, "c")
    other = tiny_model("bert")
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(output(other), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), expected)
        randomise(twin.adapters["c"], seed=9)  # its own, not ours
        assert not torch.allclose(output(twin), expected, atol=1e-3)
        assert torch.equal(output(model), expected)


def test_the_peers_words_in_files(tmp_path: Path) -> None:
    model = build("shared full W")
    model.save_adapter(tmp_path, "c")
    keys = {key.partition("bert.")[2] for key in read_tensors(tmp_path / "adapter.safetensors")}
    assert {f"shared_parameters.c.{word}" for word in ("phm_rule", "W_down", "W_up")} <= keys
    assert "encoder.layer.0.output.adapters.c.adapter_down.0.b" in keys


def test_files_without_the_shared_tensors_are_refused(tmp_path: Path) -> None:
    model = build()
    model.save_adapter(tmp_path, "c")
    file = tmp_path / "adapter.safetensors"
    tensors = {k: t for k, t in read_tensors(file).items() if "shared_parameters" not in k}
    write_tensors(file, tensors)
    other = tiny_model("bert")
    with pytest.raises(CheckpointError, match=r"shares?\. Releases of the adapters library before"):
        other.load_adapter(tmp_path)
    assert len(other.adapters) == 0


def test_a_rule_that_is_not_learned_stays() -> None:
    model = build(learn_phm=False)
    model.train_adapter("c")
    rule = model.adapters["c"].get_submodule("shared.phm").phm_rule
    assert not rule.requires_grad
    assert "shared.phm.phm_rule" in model.adapters["c"].state_dict()


@each_form
def test_compiled_in_one_graph(form: str) -> None:
    torch._dynamo.reset()
    model = build(form).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(output(model, compiled), output(model))


def test_glorot_uniform_is_uniform() -> None:
    """The adapters library draws normal values whatever is asked for."""
    bounds = {}
    for start in ("glorot-uniform", "glorot-normal", "normal", "phm"):
        config = config_of("full W", hypercomplex_nonlinearity=start, phm_init_range=0.5)
        torch.manual_seed(0)
        weight = PhmLinear(128, 64, "down", config, SharedPhm(128, 64, config)).W.detach()
        bounds[start] = float(weight.abs().max() / weight.std())
    assert bounds["glorot-uniform"] < 1.8  # the square root of 3
    assert min(bounds[start] for start in ("glorot-normal", "normal", "phm")) > 3


def test_uniform_rules() -> None:
    config = config_of("default", phm_c_init="uniform")
    rule = SharedPhm(128, 64, config).phm_rule
    assert isinstance(rule, nn.Parameter)
    assert 0.8 < rule.abs().max() <= 1.0


def test_parallel_and_rows() -> None:
    model = build()
    model.add_adapter("d", config_of("shared W"))
    randomise(model.adapters["d"], seed=3)
    given = tiny_inputs(model.config)
    with torch.no_grad():
        alone = [model(**given, adapter_names=name).last_hidden_state for name in ("c", "d")]
        both = model(**given, adapter_names=Parallel("c", "d")).last_hidden_state
    torch.testing.assert_close(both, torch.cat(alone))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: load_config("compacter", reduction_factor=32), "must divide the hidden size, 32"),
        (lambda: CompacterPlusPlusConfig(phm_dim=3, reduction_factor=2), "phm_dim=3 must divide"),
        (
            lambda: config_of("shared W", reduction_factor={"0": 2, "default": 4}),
            "bottlenecks of one shape",
        ),
        (lambda: config_of("default", phm_c_init="zero"), "phm_c_init='zero'"),
        (lambda: config_of("default", phm_rank=0), "phm_rank=0"),
        (lambda: config_of("default", hypercomplex_nonlinearity="x"), "hypercomplex_nonlinearity"),
        (
            lambda: load_config("seq_bn", reduction_factor=33),
            "leaves nothing of the hidden size 32",
        ),
        (
            lambda: load_config("seq_bn", reduction_factor={"7": 2, "default": 4}),
            "reduction_factor",
        ),
        (lambda: load_config("seq_bn", leave_out=[0, 2]), r"leave_out names layers \[2\]"),
        (lambda: load_config("seq_bn_inv", inv_adapter_reduction_factor=17), "nothing of the half"),
    ],
)
def test_bad_input(config: Any, message: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("x", config())
    assert len(model.adapters) == 0


def test_a_bottleneck_that_the_peer_has_made_of_size_one(tmp_path: Path) -> None:
    """Its files may say a reduction that leaves nothing; the tensors have size one then."""
    model = tiny_model("bert")
    model.add_adapter("x", load_config("seq_bn", reduction_factor=32), set_active=True)
    randomise(model.adapters["x"])
    model.save_adapter(tmp_path, "x")
    file = tmp_path / "adapter_config.json"
    file.write_text(
        file.read_text("utf-8").replace('"reduction_factor": 32', '"reduction_factor": 96')
    )
    other = tiny_model("bert")
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(output(other), output(model))
