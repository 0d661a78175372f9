"""What is the family's own: two orders of norms, sound as input, `load_adapter` for languages."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

import flexheads
from flexheads.errors import UnsupportedError
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_output

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask:UserWarning"
)

FAMILY = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_residual_sites_in_both_orders_of_norms(name, first):
    model = tiny_model(name, do_stable_layer_norm=first)
    sites = model._attachment.sites
    seen = {}

    def note(key):
        return lambda module, args, *output: seen.__setitem__(key, (output or args)[0])

    for role in ("attention", "feed_forward"):
        site = sites[f"layers.1.{role}"]
        assert (site.norm is None) == first
        site.output.register_forward_hook(lambda m, a, out, r=role: seen.update({r + ".x": out}))
        site.residual.register_forward_pre_hook(
            lambda m, a, kw, r=role: seen.update(
                {r + ".r": a[0] if a else next(iter(kw.values()))}
            ),
            with_kwargs=True,
        )
    layer = sites["layers.1.attention"].host
    layer.feed_forward.register_forward_pre_hook(note("between"))
    layer.register_forward_hook(
        lambda m, a, out: seen.update(after=out[0] if isinstance(out, tuple) else out)
    )
    tiny_output(model)
    between = seen["attention.x"] + seen["attention.r"]
    after = seen["feed_forward.x"] + seen["feed_forward.r"]
    if first:
        torch.testing.assert_close(layer.final_layer_norm(between), seen["between"])
    else:
        torch.testing.assert_close(layer.layer_norm(between), seen["between"])
        after = layer.final_layer_norm(after)
    torch.testing.assert_close(after, seen["after"])


@torch.no_grad()
@pytest.mark.parametrize("config", ["double_seq_bn", "par_bn", "seq_bn_inv", "loreft", "ln_tuning"])
@pytest.mark.parametrize("name", FAMILY)
def test_adapters_where_the_norms_come_first(name, config, tmp_path):
    model = tiny_model(name, do_stable_layer_norm=True)
    before = tiny_output(model)
    model.add_adapter("a", config=config, set_active=True)
    torch.testing.assert_close(tiny_output(model), before)
    randomise(model.adapters)
    acting = tiny_output(model)
    assert not torch.allclose(acting, before, atol=1e-3)
    model.save_adapter(tmp_path, "a")
    other = tiny_model(name, do_stable_layer_norm=True)
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(tiny_output(other), acting)


@torch.no_grad()
def test_heads_pool_the_positions_that_are_no_padding():
    model = tiny_model("wav2vec2")
    model.add_classification_head("a", layers=1)
    inputs = tiny_inputs(model.config)
    hidden = model(**inputs, head=[]).last_hidden_state
    # Of 400 samples 18 positions remain, and of 250 samples 11.
    length = ((250 - 10) // 5 + 1 - 8) // 4 + 1
    assert (hidden.shape[1], length) == (18, 11)
    pooled = torch.stack([hidden[0].mean(0), hidden[1].mean(0), hidden[2, :length].mean(0)])
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(pooled))


@torch.no_grad()
@pytest.mark.parametrize("config", ["double_seq_bn", "lora"])
@pytest.mark.parametrize("ending", ["ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize("name", FAMILY)
def test_adapters_on_static_classes(name, ending, config, tmp_path):
    torch.manual_seed(0)
    static_class = getattr(transformers, FAMILY[name] + ending)
    model = flexheads.init(static_class(tiny_config(name)).eval())
    before = tiny_output(model)
    if (name, config) == ("wavlm", "lora"):
        with pytest.raises(UnsupportedError, match="no projection for query"):
            model.add_adapter("a", config=config)
        return
    model.add_adapter("a", config=config, set_active=True)
    randomise(model.adapters)
    acting = tiny_output(model)
    assert not torch.allclose(acting, before, atol=1e-4)
    model.save_adapter(tmp_path, "a")
    model.delete_adapter("a")
    assert torch.equal(tiny_output(model), before)
    assert model.load_adapter(tmp_path, set_active=True) == "a"
    assert torch.equal(tiny_output(model), acting)


@torch.no_grad()
def test_the_layers_of_a_language_are_loaded_as_without_us(tmp_path):
    """`load_adapter` of transformers' own class takes a language; ours takes files."""
    fields = {"do_stable_layer_norm": True, "adapter_attn_dim": 4}
    kind = transformers.Wav2Vec2ForCTC
    plain, model = (kind(tiny_config("wav2vec2", **fields)).eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    language = {key: torch.randn_like(t) for key, t in plain._get_adapters().items()}
    save_file(language, tmp_path / "adapter.spa.safetensors")
    for own in (plain, model):
        own.config._name_or_path = str(tmp_path)
        own.name_or_path = str(tmp_path)
    flexheads.init(model)
    model.add_adapter("a", config="seq_bn", set_active=True)
    before = tiny_output(model)
    plain.load_adapter("spa")
    expected = tiny_output(plain)
    assert not torch.allclose(before, expected, atol=1e-3)
    for call in (
        lambda: model.load_adapter("spa"),
        lambda: model.load_adapter("spa", force_load=True),
        lambda: model.load_adapter(target_lang="spa"),
    ):
        for parameter in model._get_adapters().values():
            parameter.zero_()
        call()
        torch.testing.assert_close(tiny_output(model), expected)
    model.save_adapter(tmp_path / "own", "a")
    model.load_adapter(tmp_path / "own", load_as="b", with_head=False)
    model.load_adapter(str(tmp_path / "own"), load_as="c", with_head=False)
    assert list(model.adapters) == ["a", "b", "c"]
