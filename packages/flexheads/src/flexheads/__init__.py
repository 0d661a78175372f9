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
    HeadConversion,
    HeadRule,
    HeadTypeSpec,
    LayerSpec,
    ResidualSite,
)

_LAZY = {
    "AdapterConfig": "flexheads.methods.config",
    "AdapterMethod": "flexheads.methods.base",
    "AdapterPlusConfig": "flexheads.methods.bottleneck",
    "AutoModelWithHeads": "flexheads.models.auto",
    "BatchSplit": "flexheads.composition",
    "BnConfig": "flexheads.methods.bottleneck",
    "DoubleSeqBnConfig": "flexheads.methods.bottleneck",
    "DoubleSeqBnInvConfig": "flexheads.methods.bottleneck",
    "Features": "flexheads.heads.base",
    "FlexheadsError": "flexheads.errors",
    "LoRAConfig": "flexheads.methods.lora",
    "ModelWithHeads": "flexheads.models.with_heads",
    "MultiHeadOutput": "flexheads.heads.outputs",
    "ParBnConfig": "flexheads.methods.bottleneck",
    "Parallel": "flexheads.composition",
    "PredictionHead": "flexheads.heads.base",
    "Rows": "flexheads.composition",
    "SeqBnConfig": "flexheads.methods.bottleneck",
    "SeqBnInvConfig": "flexheads.methods.bottleneck",
    "Stack": "flexheads.composition",
    "init": "flexheads.models.static",
    "load_config": "flexheads.methods.config",
    "parse_composition": "flexheads.composition",
    "registry": "flexheads.plugins",
}

__all__ = [
    "AdapterMethodSpec",
    "ArchitectureSpec",
    "CheckpointFormat",
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
    from flexheads.errors import UnknownNameError
    from flexheads.plugins import registry

    try:
        registry().with_heads(name)
    except UnknownNameError as error:
        family = name.removesuffix("ModelWithHeads").lower()
        raise ImportError(
            f"No installed package provides {name}. Try: pip install flexheads-{family}  "
            "(or pip install 'flexheads[all]')"
        ) from error
    from flexheads.models.with_heads import with_heads_class

    return with_heads_class(name)
