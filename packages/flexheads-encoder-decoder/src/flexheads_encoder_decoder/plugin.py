"""What this package registers: models made of an encoder and a decoder of other architectures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flexheads import ArchitectureSpec, hookimpl

# The sides of tiny models: the one architecture that has cross-attention and a package in tests.
_SIDE: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}

ENCODER_DECODER = ArchitectureSpec(
    name="encoder-decoder",
    model_types=("encoder-decoder",),
    backbone=("transformers.models.encoder_decoder.modeling_encoder_decoder:EncoderDecoderModel"),
    composed=True,
    # The decoder holds a language-model head of its own; there is nothing behind it to stand on.
    pooling=None,
    # Prompts are for one model; the two sides would have to be told of them by different names.
    fixed_positions_if=("encoder",),
    shares_layers=True,
    tiny={
        "encoder": _SIDE,
        "decoder": {**_SIDE, "is_decoder": True, "add_cross_attention": True},
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
    },
)


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Two models that make one."""
    return [ENCODER_DECODER]
