"""What this package registers: where ModernBERT's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flexheads import ArchitectureSpec, HeadConversion, HeadRule, LayerSpec, ResidualSite, hookimpl
from flexheads.layouts import TINY, conversions, thirds

MODERNBERT = ArchitectureSpec(
    name="modernbert",
    model_types=("modernbert",),
    backbone="transformers.models.modernbert.modeling_modernbert:ModernBertModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="layers",
            attention=ResidualSite(output="attn.out_drop", residual="attn_norm"),
            feed_forward=ResidualSite(output="mlp", residual="mlp_norm"),
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            fused=thirds(),
            attention_output="attn.Wo",
            mlp_in="mlp.Wi",
            mlp_out="mlp.Wo",
            self_attention="attn",
            # The attention's norm is left out: the first layer has none.
            norms=("mlp_norm",),
            adapterhub={"attention": "attention_adapters", "feed_forward": "output_adapters"},
        ),
    ),
    norms=("embeddings.norm", "final_norm"),
    pooling="first_token",
    prompts="tokens",
    shares_layers=True,
    tiny={
        **TINY,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
)


_HEAD = {"head.dense": "layers.0", "head.norm": "layers.norm_0", "classifier": "layers.1"}
_LAYERS = {"layers": 2, "layer_norm": True}
_ACTIVATION = {"activation_function": "classifier_activation", "dropout_prob": "classifier_dropout"}
_ZERO = {"layers.0.bias": "classifier_bias", "layers.norm_0.bias": "norm_bias"}
_POOLING = {"pooling": ("classifier_pooling", {"cls": None, "mean": "mean"})}


def _two_layers(head_type: str, **own: Any) -> HeadRule:
    """A head with a norm between its two layers."""
    return HeadRule(
        head_type=head_type,
        weights=_HEAD,
        config=_LAYERS,
        config_from=_ACTIVATION,
        zero_unless=_ZERO,
        **own,
    )


_MASKED_LM = HeadRule(
    head_type="masked_lm",
    weights={
        "head.dense": "layers.0.dense",
        "head.norm": "layers.0.norm",
        "decoder.weight": "weight",
        "decoder.bias": "bias",
    },
    config={"layers": 2, "layer_norm": True},
    config_from={"activation_function": "classifier_activation", "bias": "decoder_bias"},
    zero_unless={"layers.0.dense.bias": "classifier_bias", "layers.0.norm.bias": "norm_bias"},
)

_HEADS = {
    "ForMaskedLM": _MASKED_LM,
    "ForSequenceClassification": _two_layers("classification", config_by=_POOLING),
    "ForMultipleChoice": _two_layers("multiple_choice", config_by=_POOLING),
    "ForTokenClassification": _two_layers("tagging"),
    "ForQuestionAnswering": _two_layers("question_answering", output="start_logits"),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ModernBERT."""
    return [MODERNBERT]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for ModernBERT."""
    return conversions(MODERNBERT, "ModernBert", _HEADS)
