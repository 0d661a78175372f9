"""What this package registers: where X-MOD's sites are, and how its static heads convert."""

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

# The last norm is left out: only models whose norms come first have it.
XMOD = ArchitectureSpec(
    name="xmod",
    model_types=("xmod",),
    backbone="transformers.models.xmod.modeling_xmod:XmodModel",
    embeddings="embeddings",
    layers=(
        LayerSpec(
            path="encoder.layer",
            attention=ResidualSite(
                output="attention.output.dropout",
                residual="attention",
                norm="attention.output.LayerNorm",
                norm_unless="pre_norm",
            ),
            # The language adapters are inside of the sub-layer, behind its residual.
            feed_forward=ResidualSite(
                output="output",
                residual="attention",
                residual_from="output",
                added=True,
                norm="output.LayerNorm",
                norm_unless="pre_norm",
            ),
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            attention_output="attention.output.dense",
            mlp_in="intermediate.dense",
            mlp_out="output.dense",
            self_attention="attention.self",
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
            adapterhub={"attention": "attention.output", "feed_forward": "output"},
        ),
    ),
    norms=("embeddings.LayerNorm",),
    pooling="first_token",
    pooler=True,
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "languages": ["en_XX", "de_DE"],
        "default_language": "en_XX",
    },
)

_ONE_LAYER = {"layers": 1, "activation_function": None}


def _lm(head_type: str) -> HeadRule:
    return HeadRule(
        head_type=head_type,
        weights={
            "lm_head.dense": "layers.0.dense",
            "lm_head.layer_norm": "layers.0.norm",
            "lm_head.decoder.weight": "weight",
            "lm_head.decoder.bias": "bias",
        },
        config={"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
        aliases={"lm_head.bias": "lm_head.decoder.bias"},
    )


_HEADS = {
    "XmodForSequenceClassification": HeadRule(
        head_type="classification",
        weights={"classifier.dense": "layers.0", "classifier.out_proj": "layers.1"},
        config={"layers": 2, "activation_function": "tanh", "use_pooler": False},
    ),
    "XmodForMultipleChoice": HeadRule(
        head_type="multiple_choice",
        weights={"classifier": "layers.0"},
        config={**_ONE_LAYER, "use_pooler": True},
    ),
    "XmodForTokenClassification": HeadRule(
        head_type="tagging", weights={"classifier": "layers.0"}, config=_ONE_LAYER
    ),
    "XmodForQuestionAnswering": HeadRule(
        head_type="question_answering",
        weights={"qa_outputs": "layers.0"},
        config={**_ONE_LAYER, "dropout_prob": 0.0},
        output="start_logits",
    ),
    "XmodForMaskedLM": _lm("masked_lm"),
    "XmodForCausalLM": _lm("causal_lm"),
}


@hookimpl
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """X-MOD."""
    return [XMOD]


@hookimpl
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Every head class that transformers has for X-MOD."""
    return [
        HeadConversion(architecture=XMOD.name, static_class=name, heads=(rule,))
        for name, rule in _HEADS.items()
    ]
