"""`flexheads.describe` on architectures without a package: paths hold, and notes are true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

import flexheads
from flexheads.sites.attach import Attachment

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    **{key: SIZES[key] for key in ("vocab_size", "max_position_embeddings", "pad_token_id")},
}
WHOLE = {
    "megatron-bert": SIZES,
    "roformer": SIZES,
    "starcoder2": SIZES,
    "pegasus": TWO_SIDES,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
}


def proposal(model_type: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](**sizes)).eval()
    return model, flexheads.describe(model)


@pytest.mark.parametrize("model_type", WHOLE)
def test_all_roles_are_found_and_resolve(model_type: str) -> None:
    model, found = proposal(model_type, WHOLE[model_type])
    assert found.notes == ()
    named = {"attention", "feed_forward", "query", "key", "value", "attention_output"}
    assert named | {"mlp_in", "mlp_out", "self_attention", "embeddings"} <= found.spec.roles
    sites = Attachment(model, model, found.spec).sites
    assert sum(site.kind == "residual" for site in sites.values()) in (4, 10)


def test_what_is_not_found_is_said() -> None:
    """Fourier transforms stand where others attend."""
    _, found = proposal("fnet", SIZES)
    assert {"attention", "feed_forward", "mlp_in", "mlp_out"} <= found.spec.roles
    assert not {"query", "key", "value"} & found.spec.roles
    assert any("no query was found" in note for note in found.notes)
    assert "no query was found" in " ".join(repr(found).split())
