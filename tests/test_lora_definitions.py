"""Low-rank methods against their papers: the plain model with the weights written out is equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import flexheads
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.lora import LoRAMethod
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model

ALL = "attn_matrices=['q', 'k', 'v', 'o'], intermediate_lora=True, output_lora=True"
Fold = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


def adapted(config: Any, seed: int = 1, **changes: Any) -> Any:
    """A model in double precision whose adapter ``a`` is active and random."""
    model = randomise(tiny_model("bert"), std=0.2).double()
    model.add_adapter("a", flexheads.load_config(config, **changes), set_active=True)
    randomise(model.adapters["a"], seed=seed)
    return model


@torch.no_grad()
def output(model: Any, **how: Any) -> Tensor:
    return model(**tiny_inputs(model.config), head=[], **how).last_hidden_state


@torch.no_grad()
def folded(model: Any, fold: Fold) -> Tensor:
    """The output of the plain model with each part of the adapter written into a projection."""
    plain = transformers.BertModel(tiny_config("bert")).double().eval()
    plain.load_state_dict(model.bert.state_dict())
    paths = {"query": "attention.self.query", "key": "attention.self.key"}
    paths |= {"value": "attention.self.value", "attention_output": "attention.output.dense"}
    paths |= {"mlp_in": "intermediate.dense", "mlp_out": "output.dense"}
    adapter = model.adapters["a"]
    for address, part in adapter.parts.items():
        _, layer, role = address.split(".")
        host = plain.encoder.layer[int(layer)].get_submodule(paths[role])
        tensors = dict(part.named_parameters()) | dict(part.named_buffers())
        shared = adapter.state_dict()
        tensors |= {k[12:]: t for k, t in shared.items() if k.startswith("shared.vera.")}
        weight, bias = fold(tensors, host.weight, host.bias)
        host.weight.copy_(weight)
        host.bias.copy_(bias)
    return plain(**tiny_inputs(plain.config)).last_hidden_state


def product(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    return t["lora_B"] @ t["lora_A"]


def vectors(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    out, width = weight.shape
    a, b = t["lora_A"][:, :width], t["lora_B"][:out]
    return torch.diag(t["vera_B"]) @ b @ torch.diag(t["vera_D"]) @ a


def anchored(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    return t["lora_B"] @ t["lora_A"] - t["initial_B"] @ t["initial_A"]


def several(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    w = torch.exp(t["weights"] / 0.3)
    up = sum(w[i] * t["lora_B"][i] for i in range(len(w))) / w.sum()
    task = t["task_specific.values"]
    return up @ (task.diag() if task.ndim == 1 else task) @ t["lora_A"]


MTL = "mtl_lora[n_up_projection=3, weights_sharpness=0.3, alpha=3, r=4"
ADDED = {
    f"lora[r=4, alpha=6, {ALL}]": (product, 1.5),
    f"lora[r=4, alpha=6, rank_stabilized=True, {ALL}]": (product, 6 / math.sqrt(4)),
    f"vera[r=4, alpha=6, {ALL}]": (vectors, 1.5),
    f"{MTL}, {ALL}]": (several, 0.75),
    f"{MTL}, task_specific_matrix_type=linear, {ALL}]": (several, 0.75),
    f"lora[r=4, alpha=6, init_weights=pissa, {ALL}]": (anchored, 1.5),
    f"lora[r=4, alpha=6, init_weights=olora, {ALL}]": (anchored, 1.5),
}
WITH_MAGNITUDE = {
    f"dora[r=4, alpha=6, {ALL}]": (product, 1.5),
    f"dvora[r=4, alpha=6, {ALL}]": (vectors, 1.5),
    "dora[r=4, alpha=6, init_weights=pissa]": (anchored, 1.5),
    f"{MTL}, use_dora=True, {ALL}]": (several, 0.75),
}


@pytest.mark.parametrize("config", ADDED)
def test_what_is_added(config: str) -> None:
    model, (change, scale) = adapted(config), ADDED[config]
    expected = folded(model, lambda t, w, b: (w + scale * change(t, w), b))
    torch.testing.assert_close(output(model), expected, atol=1e-10, rtol=0)
    assert (output(model) - output(model, adapter_names=[])).abs().max() > 1e-2


@pytest.mark.parametrize("config", WITH_MAGNITUDE)
def test_magnitude_and_direction(config: str) -> None:
    """The whole change is inside the norm, of each row, and the bias is outside."""
    model, (change, scale) = adapted(config), WITH_MAGNITUDE[config]

    def fold(t: dict[str, Tensor], w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        direction = w + scale * change(t, w)
        norms = torch.stack([row.square().sum().sqrt() for row in direction])
        return t["m.weight"] * direction / norms[:, None], b

    torch.testing.assert_close(output(model), folded(model, fold), atol=1e-10, rtol=0)


def test_ia3_scales_results_with_their_biases() -> None:
    model = adapted("ia3[alpha=2, output_lora=True, attn_matrices=['q', 'k', 'v', 'o']]")
    expected = folded(model, lambda t, w, b: (w * 2 * t["lora_B"], b * 2 * t["lora_B"].view(-1)))
    torch.testing.assert_close(output(model), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "config", ["lora", "ia3", "vera", "dora", "dvora", "mtl_lora", *ADDED, *WITH_MAGNITUDE]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(config: str, dtype: torch.dtype) -> None:
    model = randomise(tiny_model("bert"), std=0.2).to(dtype)
    model.add_adapter("a", config, set_active=True)
    assert torch.equal(output(model), output(model, adapter_names=[]))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_factors_that_are_taken_from_the_backbone(kind: str) -> None:
    model = randomise(tiny_model("bert"), std=0.2).double()
    before = {key: tensor.clone() for key, tensor in model.bert.state_dict().items()}
    model.add_adapter("a", flexheads.LoRAConfig(r=4, alpha=6, init_weights=kind))
    part = model.adapters["a"].parts["layers.0.query"]
    weight = model.bert.encoder.layer[0].attention.self.query.weight.detach()
    if kind == "pissa":  # the best approximation of rank 4
        u, s, v = torch.linalg.svd(weight)
        expected = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        torch.testing.assert_close(part.lora_A.norm(dim=1), (s[:4] / 1.5).sqrt())
    else:
        q, r = torch.linalg.qr(weight)
        expected = 1.5 * q[:, :4] @ r[:4]
        torch.testing.assert_close(part.lora_B.T @ part.lora_B, torch.eye(4).double())
    torch.testing.assert_close(1.5 * part.lora_B @ part.lora_A, expected)
    assert all(torch.equal(t, before[k]) for k, t in model.bert.state_dict().items())
    with pytest.raises(UnsupportedError, match="r=40"):
        model.add_adapter("b", flexheads.LoRAConfig(r=40, init_weights=kind))


def test_gradients_take_the_norm_for_a_constant() -> None:
    model = adapted("dora[r=4, alpha=6, attn_matrices=['q']]")
    site = model._attachment.sites["layers.0.query"]
    part, w, b = model.adapters["a"].parts[site.address], site.host.weight, site.host.bias
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    leaves = [part.lora_A, part.lora_B, part.m.weight]
    plain = hidden @ w.T + b
    got = torch.autograd.grad(part(hidden, plain, site.projection).square().sum(), leaves)
    direction = w.detach() + 1.5 * part.lora_B @ part.lora_A
    whole = part.m.weight * direction / direction.norm(dim=1, keepdim=True).detach()
    expected = torch.autograd.grad((hidden @ whole.T + b).square().sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("config", ["lora", "vera", "mtl_lora", "lora[init_weights=pissa]"])
def test_the_gate_stands_in_place_of_the_scaling(config: str) -> None:
    model = adapted(config, use_gating=True, alpha=5)
    site = model._attachment.sites["layers.0.query"]
    part, hidden = model.adapters["a"].parts[site.address], torch.randn(2, 5, 32).double()
    plain = site.projection.run(hidden)
    gate = torch.sigmoid(hidden @ part.gate.weight.T + part.gate.bias).mean(dim=1, keepdim=True)
    expected = plain + gate * (hidden @ part.delta().T)
    torch.testing.assert_close(part(hidden, plain, site.projection), expected)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"], ["a", "b", "c"]])
def test_a_stack_adds_what_each_adds(names: list[str]) -> None:
    """Also for DoRA, whose change is that of the projection's own result."""
    model = adapted("dora[alpha=4, attn_matrices=['q']]")
    model.add_adapter("b", "lora[attn_matrices=['q']]")
    model.add_adapter("c", "dora[attn_matrices=['q']]")
    for name in "bc":
        randomise(model.adapters[name], seed=ord(name))
    projection = model._attachment.sites["layers.0.query"].projection
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    plain = projection.run(hidden)
    parts = [model.adapters[name].parts["layers.0.query"] for name in names]
    expected = plain + sum(part(hidden, plain, projection) - plain for part in parts)
    model.set_active_adapters(names)
    torch.testing.assert_close(projection.host(hidden), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("alpha", [8, 20])
def test_dora_is_that_of_peft(alpha: int) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(f"dora[alpha={alpha}]")
    bare = transformers.BertModel(tiny_config("bert")).double().eval()
    bare.load_state_dict(model.bert.state_dict())
    how = peft.LoraConfig(r=8, lora_alpha=alpha, use_dora=True, target_modules=["query", "value"])
    theirs = peft.get_peft_model(bare, how)
    for address, part in model.adapters["a"].parts.items():
        _, layer, role = address.split(".")
        module = theirs.base_model.model.encoder.layer[int(layer)].attention.self
        host = getattr(module, role)
        with torch.no_grad():
            host.lora_A["default"].weight.copy_(part.lora_A)
            host.lora_B["default"].weight.copy_(part.lora_B)
            host.lora_magnitude_vector["default"].weight.copy_(part.m.weight.view(-1))
    expected = theirs.eval()(**tiny_inputs(model.config)).last_hidden_state
    torch.testing.assert_close(output(model), expected, atol=1e-10, rtol=0)


# --- VeRA ----------------------------------------------------------------------------------------


def test_vera_shares_what_it_draws_from_the_seed() -> None:
    model = tiny_model("bert")
    for name, config in {"a": "vera", "b": "vera", "c": "vera[init_weights_seed=5]"}.items():
        torch.manual_seed(ord(name))
        model.add_adapter(name, flexheads.load_config(config, output_lora=True))
    a, b, c = (model.adapters[name].state_dict()["shared.vera.lora_A"] for name in "abc")
    assert a.shape == (8, 64), "as wide as the widest projection"
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    part = model.adapters["a"].parts["layers.0.query"]
    assert {name: p.shape for name, p in part.named_parameters()} == {
        "vera_D": (8,),
        "vera_B": (32,),
    }


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ia3[use_dora=True]", "DoRA"),
        ("ia3[init_weights=pissa]", "pissa"),
        ("vera[init_weights=olora]", "olora"),
        ("lora[dtype=int8]", "int8"),
        ("lora[dtype=nothing]", "nothing"),
        ("mtl_lora[vera_d=0.1]", "MTL-LoRA"),
        ("mtl_lora[task_specific_matrix_type=square]", "square"),
        ("mtl_lora[n_up_projection=0]", "n_up_projection"),
        ("mtl_lora[weights_sharpness=0]", "positive"),
    ],
)
def test_configurations_without_a_meaning(config: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flexheads.load_config(config)


def test_the_type_of_the_parameters_is_their_own() -> None:
    model = randomise(tiny_model("bert"), std=0.2)
    model.add_adapter("a", "dora[dtype=bfloat16, use_gating=True]", set_active=True)
    assert {p.dtype for p in model.adapters["a"].parameters()} == {torch.bfloat16}
    assert output(model).dtype == torch.float32


# --- which projections ----------------------------------------------------------------------------


def test_letters_stand_for_cross_attention_too() -> None:
    if "t5" not in flexheads.registry().architectures:
        pytest.skip("t5 is not installed")
    model = tiny_model("t5")
    model.add_adapter("a", "lora[attn_matrices=['q', 'o']]")
    roles = {address.split(".")[2] for address in model.adapters["a"].parts}
    assert roles == {"query", "attention_output", "cross_query", "cross_attention_output"}


def test_a_projection_that_the_architecture_lacks() -> None:
    sites = tiny_model("bert")._attachment.sites
    left = {address: site for address, site in sites.items() if site.role not in ("value", "key")}
    method = LoRAMethod(flexheads.LoRAConfig())
    with pytest.raises(UnsupportedError, match=r"no projection for value \('v'\); it has .*'q'"):
        method.build(left, tiny_config("bert"))
    assert set(LoRAMethod(flexheads.LoRAConfig(attn_matrices=["q"])).build(left, None)) == {
        "layers.0.query",
        "layers.1.query",
    }


def test_loading_computes_no_factors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted("lora[init_weights=pissa]")
    model.save_adapter(tmp_path, "a")
    monkeypatch.setattr("flexheads.methods.lora_parts.factors", None)
    model.load_adapter(tmp_path, load_as="b")
    assert torch.equal(output(model, adapter_names="b"), output(model))


@pytest.mark.parametrize("config", ["lora", "dora", "vera"])
def test_without_dropout_there_is_no_module_for_it(config: str) -> None:
    model = adapted(config)
    part = next(iter(model.adapters["a"].parts.values()))
    assert part.dropout is None
    assert not any(isinstance(inner, nn.Dropout) for inner in model.adapters["a"].modules())
    before = output(model)
    part.dropout = nn.Dropout(0.5)  # one that comes later acts in training
    assert not torch.equal(output(model), before)
    part.eval()
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("config", ["lora", "dora", "vera", "mtl_lora"])
def test_dropout_drops_what_enters(config: str) -> None:
    torch.manual_seed(0)
    model = adapted(config, dropout=0.5)
    parts = [*model.adapters["a"].parts.values()]
    assert all(part.dropout.p == 0.5 for part in parts)
    before = output(model)
    model.adapters["a"].train()
    assert not torch.equal(output(model), output(model))
    for part in parts:
        part.dropout.p = 1.0  # nothing enters
    bare = output(model, adapter_names=[])
    if config != "dora":  # whose magnitudes stay
        torch.testing.assert_close(output(model), bare)
    model.adapters["a"].eval()
    assert torch.equal(output(model), before)
