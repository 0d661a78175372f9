"""What this package registers: where ESM's sites are, and how its static heads convert."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import (
    ArchitectureSpec,
    HeadConversion,
    HeadRule,
    LayerSpec,
    ResidualSite,
    hookimpl,
)

# The norm in the embeddings is left out: only some of the models have it.
ESM = ArchitectureSpec(
    name="esm",
    model_types=("esm",),
    backbone="transformers.models.esm.modeling_esm:EsmModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            attention=ResidualSite(
                output="attention.output.dropout", residual="attention.LayerNorm"
            ),
            feed_forward=ResidualSite(output="output.dropout", residual="LayerNorm"),
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            attention_output="attention.output.dense",
            mlp_in="intermediate.dense",
            mlp_out="output.dense",
            self_attention="attention.self",
            norms=("attention.LayerNorm", "LayerNorm"),
            adapterhub={"attention": "attention.output", "feed_forward": "output"},
        ),
    ),
    norms=("encoder.emb_layer_norm_after",),
    pooling="first_token",
    pooler=True,
    shares_layers=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "mask_token_id": 98,
        "pad_token_id": 1,
        "max_position_embeddings": 64,
        "position_embedding_type": "rotary",
        "token_dropout": True,
    },
)

# Folding is left out: it predicts atoms, which no type of flexible head does.
_HEADS = {
    "EsmForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config={"layers": 2, "activation_function": "tanh", "use_pooler": False},
    ),
    "EsmForTokenClassification": HeadRule(
        head_type="tagging",
        weights={"classifier": "layers.0"},
        config={"layers": 1, "activation_function": None},
    ),
    "EsmForMaskedLM": HeadRule(
        head_type="masked_lm",
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
    ),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """ESM."""
    return [ESM]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """The head classes that transformers has for ESM, but for the one that folds proteins."""
    return [
        HeadConversion(architecture=ESM.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
