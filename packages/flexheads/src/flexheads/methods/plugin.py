"""The core's own adapter methods, registered like anyone else's."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads.hookspecs import hookimpl
from flexheads.specs import AdapterMethodSpec

_BOTTLENECK = "flexheads.methods.bottleneck"
_BN_CONFIGS = "flexheads.methods.bottleneck_config"
_REFT = "flexheads.methods.reft"
_LORA = "flexheads.methods.lora"
_PREFIX = "flexheads.methods.prefix_tuning"
_UNION = "flexheads.methods.union"
_SEQ = f"{_BN_CONFIGS}:SeqBnConfig"
_DOUBLE = f"{_BN_CONFIGS}:DoubleSeqBnConfig"
_PARALLEL = f"{_BN_CONFIGS}:ParBnConfig"


def _alone(name: str, stem: str, description: str) -> AdapterMethodSpec:
    """A method whose file, tag and only identifier are its name."""
    config = f"flexheads.methods.{name}:{stem}Config"
    return AdapterMethodSpec(
        name=name,
        method=f"flexheads.methods.{name}:{stem}Method",
        config=config,
        identifiers={name: (config, {})},
        tag=name,
        description=description,
    )


_METHODS = (
    AdapterMethodSpec(
        name="bottleneck",
        method=f"{_BOTTLENECK}:BottleneckMethod",
        config=f"{_BN_CONFIGS}:BnConfig",
        identifiers={
            "seq_bn": (_SEQ, {}),
            "pfeiffer": (_SEQ, {}),
            "double_seq_bn": (_DOUBLE, {}),
            "houlsby": (_DOUBLE, {}),
            "par_bn": (_PARALLEL, {}),
            "parallel": (_PARALLEL, {}),
            "scaled_par_bn": (_PARALLEL, {"scaling": "learned"}),
            "scaled_parallel": (_PARALLEL, {"scaling": "learned"}),
            "seq_bn_inv": (f"{_BN_CONFIGS}:SeqBnInvConfig", {}),
            "pfeiffer+inv": (f"{_BN_CONFIGS}:SeqBnInvConfig", {}),
            "double_seq_bn_inv": (f"{_BN_CONFIGS}:DoubleSeqBnInvConfig", {}),
            "houlsby+inv": (f"{_BN_CONFIGS}:DoubleSeqBnInvConfig", {}),
            "compacter": (f"{_BN_CONFIGS}:CompacterConfig", {}),
            "compacter++": (f"{_BN_CONFIGS}:CompacterPlusPlusConfig", {}),
            "adapter_plus": (f"{_BN_CONFIGS}:AdapterPlusConfig", {}),
        },
        description="A small two-layer network behind a sub-layer, in sequence or in parallel",
    ),
    AdapterMethodSpec(
        name="lora",
        method=f"{_LORA}:LoRAMethod",
        config=f"{_LORA}:LoRAConfig",
        identifiers={
            "lora": (f"{_LORA}:LoRAConfig", {}),
            "ia3": (f"{_LORA}:IA3Config", {}),
            "vera": (f"{_LORA}:VeraConfig", {}),
            "dora": (f"{_LORA}:DoRAConfig", {}),
            "dvora": (f"{_LORA}:DvoRAConfig", {}),
        },
        tag="lora",
        description="A low-rank product added to (or a vector scaling) a projection",
    ),
    AdapterMethodSpec(
        name="mtl_lora",
        method=f"{_LORA}:LoRAMethod",
        config=f"{_LORA}:MTLLoRAConfig",
        identifiers={"mtl_lora": (f"{_LORA}:MTLLoRAConfig", {})},
        tag="mtl_lora",
        description="LoRA with a matrix of each task between projections that tasks share",
    ),
    AdapterMethodSpec(
        name="reft",
        method=f"{_REFT}:ReftMethod",
        config=f"{_REFT}:ReftConfig",
        identifiers={
            "loreft": (f"{_REFT}:LoReftConfig", {}),
            "noreft": (f"{_REFT}:NoReftConfig", {}),
            "direft": (f"{_REFT}:DiReftConfig", {}),
        },
        tag="reft",
        description="Low-rank edits of what layers give, at the first and the last tokens",
    ),
    AdapterMethodSpec(
        name="prefix_tuning",
        method=f"{_PREFIX}:PrefixTuningMethod",
        config=f"{_PREFIX}:PrefixTuningConfig",
        identifiers={
            "prefix_tuning": (f"{_PREFIX}:PrefixTuningConfig", {}),
            "prefix_tuning_flat": (f"{_PREFIX}:PrefixTuningConfig", {"flat": True}),
        },
        tag="prefix_tuning",
        description="Learned keys and values that every attention sees before its own",
    ),
    AdapterMethodSpec(
        name="union",
        method=f"{_UNION}:UnionMethod",
        config=f"{_UNION}:ConfigUnion",
        identifiers={
            "mam": (f"{_UNION}:MAMConfig", {}),
            "unipelt": (f"{_UNION}:UniPELTConfig", {}),
        },
        tag="union",
        description="Several methods at once under one name",
    ),
    _alone("prompt_tuning", "PromptTuning", "Learned embeddings that stand before the text"),
    _alone("loha", "LoHa", "The elementwise product of two low-rank products, added"),
    _alone("lokr", "LoKr", "The Kronecker product of two small matrices, added"),
    _alone("ln_tuning", "LNTuning", "Layer norms with weights and biases of their own"),
    _alone("trainable_tokens", "TrainableTokens", "Embeddings of its own for a few tokens"),
)


@hookimpl
def flexheads_register_adapter_methods() -> Iterable[AdapterMethodSpec]:
    """All methods of the core."""
    return _METHODS
