"""Low-rank adapters in files: exact, and in the other library's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flexheads
from flexheads import BertModelWithHeads
from flexheads.errors import CheckpointError, ConfigError, UnknownNameError
from flexheads.testing import randomise, tiny_inputs, tiny_model

CONFIGS = (
    "lora[rank_stabilized=True, alpha=3]",
    "lora[init_weights=pissa, alpha=3]",
    "lora[init_weights=olora, rank_stabilized=True, attn_matrices=['q', 'k', 'v', 'o']]",
    "ia3",
    "vera[intermediate_lora=True, output_lora=True]",
    "vera[vera_dense=True]",
    "dora[init_weights=pissa]",
    "dvora[init_weights_seed=4]",
    "mtl_lora[n_up_projection=2, task_specific_matrix_type=linear]",
    "lora[use_gating=True]",
)
TEXT = ("gpt2", "llama", "t5")


def build(config: str, architecture: str = "bert") -> Any:
    if architecture not in flexheads.registry().architectures:
        pytest.skip(f"{architecture} is not installed")
    model = randomise(tiny_model(architecture), std=0.2)
    model.add_adapter("a", config, set_active=True)
    return model


@torch.no_grad()
def output(model: Any, **how: Any) -> Tensor:
    inputs = tiny_inputs(model.config)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs, head=[], **how).last_hidden_state


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))["config"]
    return config, load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("architecture", ["bert", *TEXT])
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_loaded(config: str, architecture: str, trained: bool, tmp_path: Path) -> None:
    model = build(config, architecture)
    if trained:
        randomise(model.adapters["a"])
    expected, state = output(model), model.adapters["a"].state_dict()
    model.save_adapter(tmp_path, "a")
    again = randomise(tiny_model(architecture), std=0.2)
    again.load_adapter(tmp_path, set_active=True)
    loaded = again.adapters["a"]
    assert loaded.config.to_dict() == model.adapters["a"].config.to_dict()
    assert {k: t.shape for k, t in loaded.state_dict().items()} == {
        k: t.shape for k, t in state.items()
    }
    assert all(torch.equal(t, state[k]) for k, t in loaded.state_dict().items())
    assert torch.equal(output(again), expected)


def test_initial_factors_become_a_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = build("lora[init_weights=pissa, r=3, alpha=6]")
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    config, tensors = read(tmp_path)
    assert (config["init_weights"], config["r"], config["alpha"]) == ("lora", 6, 12)
    known = {key.rpartition(".")[2] for key in tensors}
    assert known == {"lora_A", "lora_B"}
    content = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    del content["flexheads"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    model.load_adapter(tmp_path, load_as="plain")
    torch.testing.assert_close(
        output(model, adapter_names="plain"), output(model), atol=1e-5, rtol=0
    )


def test_projections_of_one_module_have_one_set_of_matrices(tmp_path: Path) -> None:
    model = build("lora[r=2, attn_matrices=['q', 'v'], use_gating=True]", "gpt2")
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    _, tensors = read(tmp_path)
    stem = "transformer.h.0.attn.c_attn.loras.a."
    own = model.adapters["a"].state_dict()
    for word in ("lora_A", "lora_B", "gate.weight", "gate.bias"):
        parts = [own[f"layers.0.{role}.{word}"] for role in ("query", "value")]
        assert torch.equal(tensors[stem + word], torch.cat(parts))


def test_the_names_of_the_feed_forward_projections_are_swapped(tmp_path: Path) -> None:
    model = build("lora[selfattn_lora=False, intermediate_lora=True]", "llama")
    assert set(model.adapters["a"].parts) == {"layers.0.mlp_in", "layers.1.mlp_in"}
    model.save_adapter(tmp_path, "a")
    config, tensors = read(tmp_path)
    assert (config["intermediate_lora"], config["output_lora"]) == (False, True)
    assert all(".mlp.up_proj." in key for key in tensors)


def test_square_matrices_are_read_as_they_are(tmp_path: Path) -> None:
    """The other library learns whole matrices; diagonals become vectors, others stay exact."""
    model = build("vera[r=4]")
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    _, tensors = read(tmp_path)
    diagonal = tensors["bert.encoder.layer.0.attention.self.query.loras.a.vera_B"]
    assert diagonal.shape == (32, 32)
    diagonal[0, 1] = 0.5
    save_file(tensors, tmp_path / "adapter.safetensors")
    content = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    del content["flexheads"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    model.load_adapter(tmp_path, load_as="dense")
    dense = model.adapters["dense"]
    assert dense.config.vera_dense
    part, vectors = (model.adapters[n].parts["layers.0.query"] for n in ("dense", "a"))
    down, up = vectors.matrices
    change = diagonal @ up @ torch.diag(vectors.vera_D) @ down
    torch.testing.assert_close(part.delta(), change)
    model.save_adapter(tmp_path / "again", "dense")
    _, again = read(tmp_path / "again")
    assert all(torch.equal(t, again[k.replace(".a.", ".dense.")]) for k, t in tensors.items())


def test_a_file_without_the_shared_matrices_is_refused(tmp_path: Path) -> None:
    model = build("vera")
    model.save_adapter(tmp_path, "a")
    _, tensors = read(tmp_path)
    kept = {k: t for k, t in tensors.items() if "shared_parameters" not in k}
    save_file(kept, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"shared\.vera\.lora_A is missing"):
        model.load_adapter(tmp_path, load_as="b")
    assert "b" not in model.adapters


# --- shared parameters ---------------------------------------------------------------------------


def tasks(*names: str) -> Any:
    model = randomise(tiny_model("bert"), std=0.2)
    for name in names:
        model.add_adapter(name, "mtl_lora[n_up_projection=2]")
        randomise(model.adapters[name], seed=ord(name))
    return model


def test_shared_parameters_are_one(tmp_path: Path) -> None:
    model = tasks("a", "b", "c")
    own = {name: output(model, adapter_names=name) for name in "abc"}
    model.share_parameters(["a", "b"], reference_adapter_name="b")
    one, two = (model.adapters[name].parts["layers.0.query"] for name in "ab")
    assert one.lora_A is two.lora_A
    assert one.lora_B is two.lora_B
    assert one.task_specific.values is not two.task_specific.values
    assert torch.equal(output(model, adapter_names="b"), own["b"])
    assert torch.equal(output(model, adapter_names="c"), own["c"])
    shared = output(model, adapter_names="a")
    assert not torch.equal(shared, own["a"])
    model.save_pretrained(tmp_path / "model")
    again = BertModelWithHeads.from_pretrained(tmp_path / "model")
    assert again.adapters["a"].parts["layers.0.query"].lora_A is (
        again.adapters["b"].parts["layers.0.query"].lora_A
    )
    model.save_adapter(tmp_path / "a", "a")
    fresh = tasks("d")
    fresh.load_adapter(tmp_path / "a")
    for other in (again, fresh):
        assert torch.equal(output(other, adapter_names="a"), shared)
    for loaded in (model, again):
        loaded.unshare_parameters(["a", "b"])
        assert torch.equal(output(loaded, adapter_names="a"), shared)
        with torch.no_grad():
            loaded.adapters["a"].parts["layers.0.query"].lora_A.zero_()
        assert torch.equal(output(loaded, adapter_names="b"), own["b"])


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    model = tasks("a", "b")
    model.add_adapter("lora", "lora")
    model.add_adapter("wide", "mtl_lora[r=4]")
    state = {k: t.clone() for k, t in model.adapters.state_dict().items()}
    for names, how, message in (
        (["a", "lora"], {}, "several tasks"),
        (["a", "wide"], {}, "other shapes"),
        (["a", "b"], {"reference_adapter_name": "wide"}, "reference"),
        (["a"], {}, "two adapters"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.share_parameters(names, **how)
    with pytest.raises(UnknownNameError):
        model.share_parameters("a,c")
    with pytest.raises(UnknownNameError, match="shared group"):
        model.unshare_parameters(["a", "b"])
    now = model.adapters.state_dict()
    assert all(torch.equal(t, now[k]) for k, t in state.items())
    model.share_parameters("a,b", "both")
    model.delete_adapter("a")
    model.save_pretrained(tmp_path)
    assert set(BertModelWithHeads.from_pretrained(tmp_path).adapters) == {"b", "lora", "wide"}


def test_a_release_that_scaled_only_projections_of_one_module(tmp_path: Path) -> None:
    model = build("lora[r=2, alpha=6, intermediate_lora=True]", "gpt2")
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    content = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    content |= {"version": "adapters.1.0.1", "flexheads": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    model.load_adapter(tmp_path, load_as="old")
    for address, factor in (("layers.0.query", 3.0), ("layers.0.mlp_in", 1.0)):
        part, own = (model.adapters[n].parts[address] for n in ("old", "a"))
        torch.testing.assert_close(part.scaling * part.delta(), factor * own.delta())


def test_a_union_with_vera(tmp_path: Path) -> None:
    union = {"architecture": "union", "configs": [{}, {}]}
    union["configs"] = [flexheads.load_config(c).to_dict() for c in ("seq_bn", "vera")]
    model = build("lora")
    model.add_adapter("both", union, set_active=True)
    randomise(model.adapters["both"])
    model.save_adapter(tmp_path, "both")
    expected = output(model)
    model.load_adapter(tmp_path, overwrite_ok=True, set_active=True)
    assert torch.equal(output(model), expected)


def test_a_letter_that_the_other_library_ignores(tmp_path: Path) -> None:
    model = build("lora")
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    content = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    content["config"]["attn_matrices"] = ["q", "v", "o"]
    content["flexheads"] = {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    model.load_adapter(tmp_path, load_as="b")
    assert model.adapters["b"].config == model.adapters["a"].config
    assert torch.equal(output(model, adapter_names="b"), output(model))
