"""What is CLIP's own: two towers of their own sizes, static classes, pooling, no heads for both."""

import pytest
import torch
from transformers import (
    CLIPForImageClassification,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

import flexheads
from flexheads import Rows
from flexheads.errors import CompositionError, UnsupportedError
from flexheads.testing import check_static_adapter, randomise, tiny_config, tiny_inputs, tiny_model

METHODS = (
    "double_seq_bn",
    "lora",
    "ia3",
    "loreft",
    "prefix_tuning",
    "ln_tuning",
    "compacter[reduction_factor=4]",
)
STATIC = {
    CLIPTextModelWithProjection: "clip_text_model",
    CLIPVisionModelWithProjection: "clip_vision_model",
    CLIPForImageClassification: "clip",
}


def uneven():
    """A model whose towers have different sizes."""
    sizes = tiny_config("clip").to_dict()
    sizes["vision_config"] |= {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
    sizes["text_config"] |= {"attention_dropout": 0.0}
    return tiny_model("clip", **{key: sizes[key] for key in ("text_config", "vision_config")})


@torch.no_grad()
@pytest.mark.parametrize("config", METHODS)
def test_towers_of_different_sizes(config, tmp_path):
    model = uneven()
    inputs = tiny_inputs(model.config)
    before = model(**inputs)
    model.add_adapter("a", config=config, set_active=True)
    randomise(model.adapters)
    acting = model(**inputs)
    for name in ("text_embeds", "image_embeds"):
        assert not torch.allclose(acting[name], before[name], atol=1e-3)
    model.save_adapter(tmp_path, "a")
    other = uneven()
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(other(**inputs).logits_per_text, acting.logits_per_text)


@torch.no_grad()
@pytest.mark.parametrize("config", ["seq_bn", "loreft", "prefix_tuning"])
def test_rows_of_both_towers_follow_their_adapters(config):
    model = tiny_model("clip")
    for seed, name in enumerate("ab"):
        model.add_adapter(name, config=config)
        randomise(model.adapters[name], seed=seed)
    inputs = tiny_inputs(model.config)
    mixed = model(**inputs, adapter_names=Rows(["a", None, "b"]))
    for row, name in ((0, "a"), (1, []), (2, "b")):
        alone = model(**inputs, adapter_names=name)
        for field in ("text_embeds", "image_embeds"):
            torch.testing.assert_close(mixed[field][row], alone[field][row])
    more = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(CompositionError):
        model(**more, adapter_names=Rows(["a", None, "b"]))


@torch.no_grad()
def test_the_last_positions_of_an_image_are_not_those_of_the_text():
    model = tiny_model("clip")
    model.add_adapter("a", config="loreft[prefix_positions=0,suffix_positions=1]", set_active=True)
    randomise(model.adapters)
    changed = {}

    def note(module, args, output, name):
        hidden = output[0] if isinstance(output, tuple) else output
        changed[name] = (hidden - before[name]).abs().sum(-1) > 1e-6

    def bare(module, args, output, name):
        before[name] = output[0] if isinstance(output, tuple) else output

    before = {}
    layers = {
        name: model.clip.get_submodule(f"{name}_model.encoder.layers.0")
        for name in ("text", "vision")
    }
    for hook, names in ((bare, []), (note, "a")):
        handles = [
            layer.register_forward_hook(lambda m, i, o, n=n, h=hook: h(m, i, o, n))
            for n, layer in layers.items()
        ]
        model(**tiny_inputs(model.config), adapter_names=names)
        for handle in handles:
            handle.remove()
    assert changed["text"].nonzero().tolist() == [[0, 6], [1, 6], [2, 4]]  # two are padding
    assert changed["vision"].nonzero().tolist() == [[0, 16], [1, 16], [2, 16]]


@pytest.mark.parametrize("config", ["seq_bn", "lora"])
@pytest.mark.parametrize("static_class", STATIC)
def test_adapters_on_static_classes(static_class, config):
    model = flexheads.init(static_class(tiny_config(STATIC[static_class])).eval())
    randomise(model, std=0.1)
    inputs = tiny_inputs(model.config)
    if static_class is CLIPForImageClassification:
        inputs = {"pixel_values": inputs["pixel_values"]}
    check_static_adapter(model, inputs, config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_text_model", "clip_vision_model"])
def test_heads_read_what_the_tower_gives_for_the_whole(name):
    model = tiny_model(name)
    model.add_classification_head("a", layers=1)
    inputs = tiny_inputs(model.config)
    pooled = model(**inputs, head=[]).pooler_output
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(pooled))


def test_both_towers_together_have_no_heads():
    model = tiny_model("clip")
    with pytest.raises(UnsupportedError, match="no sequence of states"):
        model.add_image_classification_head("a")
    assert not model.heads
