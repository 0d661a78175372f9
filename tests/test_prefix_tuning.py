"""Prefix tuning is its definition, under every attention function, cache and plan."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flexheads
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

V5 = int(transformers.__version__.partition(".")[0]) >= 5
LENGTH = 4
SMALL = {"prefix_length": LENGTH, "bottleneck_size": 8}
each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def encoder(attention: str = "sdpa", **config: Any) -> Any:
    model = randomise(tiny_model("bert", attn_implementation=attention), std=0.2)
    return with_prefix(model, "a", **config)


def with_prefix(model: Any, name: str, seed: int = 1, **config: Any) -> Any:
    model.add_adapter(name, flexheads.PrefixTuningConfig(**{**SMALL, **config}), set_active=True)
    randomise(model.adapters[name], std=0.5, seed=seed)
    return model


def decoder(architecture: str, attention: str, **config: Any) -> Any:
    pytest.importorskip(f"flexheads_{architecture}")
    backbone = tiny_model(architecture, attn_implementation=attention).base_model
    kind = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[architecture]
    model = flexheads.init(randomise(getattr(transformers, kind)(backbone.config), std=0.2).eval())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return with_prefix(model, "a", **config)


def ids(padded: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


# --- the definition -------------------------------------------------------------------------------


def states(adapter: Any, layer: int, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """Li and Liang 2021: each layer's keys and values are a slice of MLP(embedding)."""
    pool = adapter.get_submodule("shared.self_prefix")
    first, _, last = pool.control_trans
    made = torch.tanh(pool.wte.weight @ first.weight.T + first.bias) @ last.weight.T + last.bias
    made = made.view(LENGTH, -1, 2, heads, size)[:, layer]
    return made[:, 0].transpose(0, 1), made[:, 1].transpose(0, 1)


@each_attention
def test_attention_sees_the_prefix_before_its_own_keys(attention: str) -> None:
    model, given = encoder(attention), tiny_inputs(tiny_model("bert").config)
    module = model.base_model.encoder.layer[1].attention.self
    seen: dict[str, Tensor] = {}
    handle = module.register_forward_hook(
        lambda m, args, out: seen.update(hidden=args[0], out=out[0])
    )
    with torch.no_grad():
        model(**given)
        handle.remove()
        hidden = seen["hidden"]

        def split(projection: Any) -> Tensor:
            return projection(hidden).view(*hidden.shape[:2], 4, 8).transpose(1, 2)

        keys, values = states(model.adapters["a"], 1, 4, 8)
        keys = torch.cat([keys.expand(3, -1, -1, -1), split(module.key)], dim=2)
        values = torch.cat([values.expand(3, -1, -1, -1), split(module.value)], dim=2)
        scores = split(module.query) @ keys.transpose(-1, -2) / 8**0.5
        visible = torch.cat([torch.ones(3, LENGTH), given["attention_mask"]], dim=1).bool()
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=0)


def test_the_network_costs_one_pass_and_gives_each_layer_its_slice() -> None:
    model = encoder()
    pool = model.adapters["a"].get_submodule("shared.self_prefix")
    whole = pool.flattened().view(LENGTH, 2, 2, 4, 8)
    for layer in range(2):
        torch.testing.assert_close(pool.states(layer), whole[:, layer].permute(1, 2, 0, 3))


@pytest.mark.parametrize("shared", [True, False])
def test_gates_scale_keys_and_values_by_a_mean_over_the_sequence(shared: bool) -> None:
    model = encoder(use_gating=True, shared_gating=shared)
    part = model.adapters["a"].parts["layers.0.self_attention"]
    hidden = torch.randn(3, 5, 32)
    keys, values = part(hidden)
    gate = torch.sigmoid(hidden @ part.gate.weight.T + part.gate.bias).mean(1)
    assert gate.shape == (3, 1 if shared else 2)
    own = part.pool[0].states(0)
    torch.testing.assert_close(keys, own[0] * gate[:, 0].view(3, 1, 1, 1))
    torch.testing.assert_close(values, own[1] * gate[:, -1].view(3, 1, 1, 1))


def test_lengths_can_differ_by_layer() -> None:
    model = encoder(prefix_length={"0": 2, "default": 5}, flat=True)
    parts = model.adapters["a"].parts
    shapes = [parts[f"layers.{n}.self_attention"](torch.zeros(2, 3, 32))[0].shape for n in (0, 1)]
    assert shapes == [(2, 4, 2, 8), (2, 4, 5, 8)]
    model(**tiny_inputs(model.config))
    with pytest.raises(ConfigError, match="layer 0"):
        encoder(prefix_length={"1": 2})


# --- what it must not disturb ---------------------------------------------------------------------


def test_everything_is_undone_with_the_last_prefix() -> None:
    model = randomise(tiny_model("bert"), std=0.2)
    module, given = model.base_model.encoder.layer[0].attention.self, tiny_inputs(model.config)
    config, keys = getattr(module, "config", None), list(model.base_model.state_dict())
    bare = model(**given)[0]
    with_prefix(with_prefix(model, "a"), "b")
    assert list(model.base_model.state_dict()) == keys
    assert torch.equal(model(**given, adapter_names=[])[0], bare)
    model.delete_adapter("a")
    assert not torch.allclose(model(**given, adapter_names="b")[0], bare, atol=1e-2)
    model.delete_adapter("b")
    assert getattr(module, "config", None) is config
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert not any("flexheads" in name for name in vars(module))
    assert torch.equal(model(**given)[0], bare)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_prefixes_of_their_own(twin: Any) -> None:
    model = encoder()
    given = tiny_inputs(model.config)
    before = model(**given)[0]
    other = twin(model)
    assert torch.equal(other(**given)[0], before)
    randomise(other.adapters["a"], std=0.5, seed=9)
    assert not torch.allclose(other(**given)[0], before, atol=1e-2)
    assert torch.equal(model(**given)[0], before)
    bare = model(**given, adapter_names=[])[0]
    other.delete_adapter("a")
    assert torch.equal(other(**given)[0], bare)
    assert torch.equal(model(**given)[0], before)


@pytest.mark.skipif(not V5, reason="before 5.0 this class cannot change its attention")
def test_a_change_of_the_attention_function_reaches_through() -> None:
    model, given = encoder("sdpa"), tiny_inputs(tiny_model("bert").config)
    before = model(**given)[0]
    model.set_attn_implementation("eager")
    output = model(**given, output_attentions=True)
    assert output.attentions[0].shape[-1] == given["input_ids"].shape[1] + LENGTH
    torch.testing.assert_close(output[0], before, atol=1e-5, rtol=0)


def test_an_unknown_attention_function_is_told() -> None:
    if not V5:
        pytest.skip("before 5.0 this class has no attention functions")
    model = encoder("sdpa")
    module = model.base_model.encoder.layer[0].attention.self
    assert module.config._attn_implementation != model.config._attn_implementation == "sdpa"


# --- generation -----------------------------------------------------------------------------------


def generate(model: Any, padded: bool, **how: Any) -> tuple[Tensor, Tensor]:
    found = model.generate(
        **ids(padded),
        max_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )
    return found.sequences, torch.stack(found.scores, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_is_the_same_however_keys_are_kept(architecture: str, padded: bool) -> None:
    model = decoder(architecture, "sdpa")
    expected = generate(decoder(architecture, "eager"), padded, use_cache=False)
    ways: list[dict[str, Any]] = [{"use_cache": True}, {"use_cache": False}]
    ways.append({"cache_implementation": "static", "disable_compile": True})
    for how in ways:
        found = generate(model, padded, **how)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
    beams = [generate(model, padded, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(beams[0][0], beams[1][0])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_caches_hold_no_prefix(architecture: str) -> None:
    model = decoder(architecture, "sdpa")
    cache = model(**ids(), use_cache=True).past_key_values
    assert cache.get_seq_length() == 6
    assert cache.layers[0].keys.shape[2] == 6


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_is_equal_for_both_functions(architecture: str, padded: bool) -> None:
    given = ids(padded)
    outputs = [decoder(architecture, a)(**given).logits for a in ("eager", "sdpa")]
    real = given["attention_mask"].bool()
    torch.testing.assert_close(outputs[0][real], outputs[1][real], atol=1e-5, rtol=0)
    # An earlier token still matters to a later one, and a later one not to an earlier one.
    changed = {**given, "input_ids": given["input_ids"].clone()}
    changed["input_ids"][:, 3] += 1
    other = decoder(architecture, "sdpa")(**changed).logits
    torch.testing.assert_close(other[:, 2], outputs[1][:, 2], atol=1e-5, rtol=0)
    assert not torch.allclose(other[:, 5], outputs[1][:, 5], atol=1e-3)


@pytest.mark.parametrize("flat", [True, False])
def test_two_sides_generate_the_same_however_keys_are_kept(flat: bool) -> None:
    pytest.importorskip("flexheads_t5")
    outputs, tokens = [], []
    sdpa = transformers.T5PreTrainedModel._supports_sdpa
    for attention in ("eager", "sdpa") if sdpa else ("eager",):
        config = tiny_model("t5", attn_implementation=attention).config
        plain = transformers.T5ForConditionalGeneration(config).eval()
        model = with_prefix(flexheads.init(randomise(plain, std=0.2)), "a", flat=flat)
        given = ids(padded=True)
        outputs.append(model(**given, decoder_input_ids=given["input_ids"][:, :4]).logits)
        for how in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
            how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **how}
            tokens.append(model.generate(**given, **how))
        assert torch.equal(tokens[-2], tokens[-3])
        uncached = model.generate(**given, **{**how, "use_cache": False})
        assert torch.equal(tokens[-1], uncached)
    torch.testing.assert_close(outputs[0], outputs[-1], atol=1e-5, rtol=0)
    assert torch.equal(tokens[0], tokens[-3])


# --- rows -----------------------------------------------------------------------------------------


@each_attention
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_each_row_has_its_own_prefix(architecture: str, attention: str) -> None:
    model = encoder(attention) if architecture == "bert" else decoder("gpt2", attention)
    with_prefix(model, "b", seed=5, prefix_length=2, flat=True)
    given = ids(padded=architecture == "gpt2")
    setups: dict[Any, list[Any]] = {
        flexheads.Rows(["a", None, "b"]): ["a", [], "b"],
        flexheads.BatchSplit("b", "a", batch_sizes=[1, 2]): ["b", "a", "a"],
        flexheads.Rows([["a", "b"], "a", "b"]): [["a", "b"], "a", "b"],
    }
    for setup, names in setups.items():
        for use_mask in (True, False):
            kept = given if use_mask else {"input_ids": given["input_ids"]}
            mixed = model(**kept, adapter_names=setup)[0]
            for row, name in enumerate(names):
                own = {key: tensor[row : row + 1] for key, tensor in kept.items()}
                alone = model(**own, adapter_names=name)[0]
                real = own.get("attention_mask", torch.ones(1, 6)).bool()
                torch.testing.assert_close(
                    mixed[row : row + 1][real], alone[real], atol=1e-5, rtol=0
                )


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for use in (False, True):
        model = encoder(use_gating=True).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train_adapter("a")
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**tiny_inputs(model.config))[0].square().sum().backward()
        found.append({n: p.grad for n, p in model.adapters["a"].named_parameters()})
    assert len(found[0]) > 4
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not V5, reason="graphs are promised for 5.x")
def test_compiled_code_is_one_graph_and_sees_other_prefixes() -> None:
    torch._dynamo.reset()
    model, given = encoder(), tiny_inputs(tiny_model("bert").config)
    with_prefix(model, "b", seed=7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("a", "b", None):
        model.set_active_adapters(name)
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0], atol=1e-5, rtol=0)
    torch._dynamo.reset()


# --- ejecting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("union", [False, True])
def test_an_ejected_prefix_gives_the_same_and_reloads(
    architecture: str, union: bool, tmp_path: Any
) -> None:
    pytest.importorskip(f"flexheads_{architecture}")
    model = randomise(tiny_model(architecture), std=0.2)
    config: Any = flexheads.PrefixTuningConfig(**SMALL)
    model.add_adapter(
        "a", flexheads.ConfigUnion(config, flexheads.LoRAConfig()) if union else config
    )
    randomise(model.adapters["a"], std=0.5)
    model.set_active_adapters("a")
    before = model(**ids())[0]
    model.eject_prefix_tuning("a")
    config = model.adapters["a"].config
    assert (config[0] if union else config).flat
    torch.testing.assert_close(model(**ids())[0], before, atol=1e-5, rtol=0)
    model.save_adapter(tmp_path, "a")
    model.delete_adapter("a")
    model.load_adapter(tmp_path, set_active=True)
    torch.testing.assert_close(model(**ids())[0], before, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="no network"):
        model.eject_prefix_tuning("a")


@pytest.mark.parametrize(
    "fields", [{"prefix_length": 0}, {"bottleneck_size": 0.5}, {"dropout": 1.0}]
)
def test_impossible_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        flexheads.PrefixTuningConfig(**fields)


def test_a_module_without_a_way_in_is_refused_before_anything_changes() -> None:
    model = randomise(tiny_model("bert"), std=0.2)
    site = model._attachment.sites["layers.1.self_attention"]
    site.mechanism = None
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attention"):
        with_prefix(model, "a")
    assert not model.adapters
    assert not any(m._forward_pre_hooks for m in model.base_model.modules())


def test_a_layer_left_out_has_no_prefix() -> None:
    model = encoder(leave_out=[0])
    assert list(model.adapters["a"].parts) == ["layers.1.self_attention"]
    assert model.adapters["a"].get_submodule("shared.self_prefix").layers == 1


def test_layers_that_share_a_bias_by_position_can_be_left_out() -> None:
    pytest.importorskip("flexheads_t5")
    model = randomise(tiny_model("t5", attn_implementation="eager"), std=0.2)
    given = {**ids(), "decoder_input_ids": ids()["input_ids"][:, :4]}
    bare = model(**given)[0]
    for name, left_out in {"first": [0, 2], "last": [1, 3]}.items():
        with_prefix(model, name, leave_out=left_out)
        assert not torch.allclose(model(**given)[0], bare, atol=1e-3)
