"""Two models that make one: the peer's outputs and gradients of the adapters on both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import EncoderDecoderModel

import flexheads
from flexheads import load_config
from flexheads.testing import randomise, tiny_config, tiny_inputs

from .comparing import assert_close, gradients
from .library import PeerConfig, adapters
from .pairs import NAME, SEED, adapter_keys

pytestmark = [
    pytest.mark.peer,
    # What the peer's copy of modelling code calls is on its way out of transformers.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
]


def model() -> Any:
    config = tiny_config("encoder-decoder", attn_implementation="eager")
    for side in (config.encoder, config.decoder):
        side.hidden_dropout_prob = side.attention_probs_dropout_prob = 0.0
        side._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomise(EncoderDecoderModel(config), std=0.1, seed=SEED)


@pytest.mark.parametrize("fields", ["double_seq_bn[cross_adapter=True]", "par_bn", "lora", "ia3"])
def test_outputs_and_gradients(fields: str) -> None:
    ours, theirs = flexheads.init(model()), model()
    adapters.init(theirs)
    ours.add_adapter(NAME, load_config(fields), set_active=True)
    theirs.add_adapter(NAME, config=PeerConfig.load(fields), set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    prefix = f"{ours.base_model_prefix}."
    keys = {own: names[0].removeprefix(prefix) for own, names in adapter_keys(ours).items()}
    state = ours.state_dict()
    named = {theirs_key: state[own] for own, theirs_key in keys.items()}
    own = {key for key in theirs.state_dict() if f".{NAME}." in key}
    assert own == set(named)
    theirs.load_state_dict(named, strict=False)
    ours, theirs = ours.double().eval(), theirs.double().eval()
    given = tiny_inputs(ours.config)
    with torch.no_grad():
        one, other = ours(**given), theirs(**given)
    assert_close(one.logits, other.logits, "logits")
    assert_close(one.encoder_last_hidden_state, other.encoder_last_hidden_state, "encoder")
    mine, peers = (gradients(side, given) for side in (ours, theirs))
    for key, name in keys.items():
        assert mine[key].abs().max() > 0, f"{key} has no part in the output"
        assert_close(mine[key], peers[name], key)
