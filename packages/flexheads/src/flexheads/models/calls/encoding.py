"""The encoder of an encoder-decoder backbone, run alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqModelOutput

from flexheads.sites.base import argument_names


def encode(backbone: PreTrainedModel, **inputs: Any) -> Seq2SeqModelOutput:
    """Runs the encoder of a backbone that has a decoder too.

    Args:
        backbone: The backbone.
        inputs: Its inputs; those of the decoder are left out.

    Returns:
        What the backbone would return, with the encoder's states in place of the decoder's too.
    """
    encoder: Any = backbone.get_encoder()
    known = set(argument_names(type(encoder).forward))
    others = set(argument_names(type(backbone).forward)) - known
    output = encoder(**{name: value for name, value in inputs.items() if name not in others})
    states = output.get("hidden_states")
    return Seq2SeqModelOutput(
        last_hidden_state=output.last_hidden_state,
        decoder_hidden_states=states,
        encoder_last_hidden_state=output.last_hidden_state,
        encoder_hidden_states=states,
        encoder_attentions=output.get("attentions"),
    )
