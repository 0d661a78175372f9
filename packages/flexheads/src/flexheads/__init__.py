"""Named adapters and named prediction heads on pre-trained transformers.

Importing this module is cheap: names that need torch or transformers are imported when read.
"""

from __future__ import annotations

from typing import Any

from flexheads.hookspecs import hookimpl, hookspec
from flexheads.specs import (
    AdapterMethodSpec,
    ArchitectureSpec,
    CheckpointFormat,
    FusedBlock,
    HeadConversion,
    HeadRule,
    HeadTypeSpec,
    LayerSpec,
    ResidualSite,
)

_LAZY = {
    "AdapterConfig": "flexheads.methods.config",
    "AdapterFusionConfig": "flexheads.methods.fusion",
    "AdapterMethod": "flexheads.methods.base",
    "AdapterPlusConfig": "flexheads.methods.bottleneck_config",
    "AutoModelWithHeads": "flexheads.models.auto",
    "Average": "flexheads.composition",
    "BatchSplit": "flexheads.composition",
    "BnConfig": "flexheads.methods.bottleneck_config",
    "CompacterConfig": "flexheads.methods.bottleneck_config",
    "CompacterPlusPlusConfig": "flexheads.methods.bottleneck_config",
    "ConfigUnion": "flexheads.methods.union",
    "DiReftConfig": "flexheads.methods.reft",
    "DoRAConfig": "flexheads.methods.lora",
    "DoubleSeqBnConfig": "flexheads.methods.bottleneck_config",
    "DoubleSeqBnInvConfig": "flexheads.methods.bottleneck_config",
    "DvoRAConfig": "flexheads.methods.lora",
    "DynamicAdapterFusionConfig": "flexheads.methods.fusion",
    "Features": "flexheads.heads.features",
    "FlexheadsError": "flexheads.errors",
    "Fuse": "flexheads.composition",
    "IA3Config": "flexheads.methods.lora",
    "LNTuningConfig": "flexheads.methods.ln_tuning",
    "LoHaConfig": "flexheads.methods.loha",
    "LoKrConfig": "flexheads.methods.lokr",
    "LoRAConfig": "flexheads.methods.lora",
    "LoReftConfig": "flexheads.methods.reft",
    "MAMConfig": "flexheads.methods.union",
    "MTLLoRAConfig": "flexheads.methods.lora",
    "ModelWithHeads": "flexheads.models.with_heads",
    "MultiHeadOutput": "flexheads.heads.outputs",
    "MultiTask": "flexheads.composition",
    "NoReftConfig": "flexheads.methods.reft",
    "ParBnConfig": "flexheads.methods.bottleneck_config",
    "Parallel": "flexheads.composition",
    "PredictionHead": "flexheads.heads.base",
    "PrefixTuningConfig": "flexheads.methods.prefix_tuning",
    "PromptTuningConfig": "flexheads.methods.prompt_tuning",
    "ReftConfig": "flexheads.methods.reft",
    "Rows": "flexheads.composition",
    "SeqBnConfig": "flexheads.methods.bottleneck_config",
    "SeqBnInvConfig": "flexheads.methods.bottleneck_config",
    "Split": "flexheads.composition",
    "Stack": "flexheads.composition",
    "StaticAdapterFusionConfig": "flexheads.methods.fusion",
    "TrainableTokensConfig": "flexheads.methods.trainable_tokens",
    "UniPELTConfig": "flexheads.methods.union",
    "VeraConfig": "flexheads.methods.lora",
    "active": "flexheads.models.active",
    "describe": "flexheads.models.describing.describe",
    "init": "flexheads.models.static",
    "load_config": "flexheads.methods.config",
    "lora_fa_groups": "flexheads.methods.lora_groups",
    "lora_plus_groups": "flexheads.methods.lora_groups",
    "parse_composition": "flexheads.composition",
    "registry": "flexheads.plugins",
}

__all__ = [
    "AdapterMethodSpec",
    "ArchitectureSpec",
    "CheckpointFormat",
    "FusedBlock",
    "HeadConversion",
    "HeadRule",
    "HeadTypeSpec",
    "LayerSpec",
    "ResidualSite",
    "hookimpl",
    "hookspec",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name.endswith("ModelWithHeads"):
        return _with_heads(name)
    if name.startswith("AutoModel"):
        from flexheads.models.auto import static_auto_class

        return static_auto_class(name)
    raise AttributeError(f"module 'flexheads' has no attribute {name!r}")


def _with_heads(name: str) -> Any:
    from flexheads._registry import package_for
    from flexheads.errors import UnknownNameError
    from flexheads.plugins import registry

    try:
        registry().with_heads(name)
    except UnknownNameError as error:
        raise ImportError(
            f"No installed package provides {name}. Try: pip install {package_for(name)}  "
            "(or pip install 'flexheads[all]')"
        ) from error
    from flexheads.models.with_heads import with_heads_class

    return with_heads_class(name)
