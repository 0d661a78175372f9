"""What is Swin's own: wider layers in later stages, windows, the model's pooling."""

import pytest
import torch

from flexheads import Rows
from flexheads.errors import UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model


def test_layers_are_as_wide_as_their_stage():
    model = tiny_model("swin")
    model.add_adapter("a", config="double_seq_bn[reduction_factor=4]")
    parts = model.adapters["a"].parts
    assert [parts[f"layers.{n}.attention"].down.weight.shape[1] for n in range(4)] == [
        *(32, 32),
        *(64, 64),
    ]
    paths = model._attachment.paths()
    assert paths["layers.2.feed_forward"] == "encoder.layers.1.blocks.0.output_adapters"


@torch.no_grad()
@pytest.mark.parametrize("config", ["lora", "ia3", "dora", "double_seq_bn", "loreft"])
@pytest.mark.parametrize("size", [32, 40])
def test_rows_follow_their_adapters_through_windows(config, size):
    """At 40 pixels the grid of a stage is no multiple of the window, so it is padded inside."""
    model = tiny_model("swin", window_size=4, image_size=size)
    for seed, name in enumerate("ab"):
        model.add_adapter(name, config=config)
        randomise(model.adapters[name], seed=seed)
    inputs = tiny_inputs(model.config)
    mixed = model(**inputs, adapter_names=Rows(["a", None, "b"])).last_hidden_state
    for row, name in ((0, "a"), (1, []), (2, "b")):
        alone = model(**inputs, adapter_names=name).last_hidden_state
        torch.testing.assert_close(mixed[row], alone[row])
    assert not torch.allclose(mixed[0], model(**inputs).last_hidden_state[0], atol=1e-3)


@torch.no_grad()
def test_heads_read_the_mean_of_the_patches():
    model = tiny_model("swin")
    model.add_image_classification_head("a", num_labels=3)
    inputs = tiny_inputs(model.config)
    pooled = model(**inputs, head=[]).last_hidden_state.mean(1)
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(pooled))


@pytest.mark.parametrize("config", ["prefix_tuning", "prompt_tuning", "seq_bn_inv"])
def test_what_windows_have_no_place_for_is_refused(config):
    model = tiny_model("swin")
    with pytest.raises(UnsupportedError):
        model.add_adapter("a", config=config)
    assert not model.adapters
