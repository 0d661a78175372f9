"""Configurations of adapters that more than one test file is about, and how tests name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads import load_config

from .library import PeerConfig, adapters

# Stochastic depth needs torchvision in the peer, and acts in training only.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("seq_bn", {}),
    "double_seq_bn": ("double_seq_bn", {}),
    "par_bn": ("par_bn", {}),
    "scaled_par_bn": ("scaled_par_bn", {}),
    "seq_bn_inv": ("seq_bn_inv", {}),
    "double_seq_bn_inv": ("double_seq_bn_inv", {}),
    "adapter_plus": ("adapter_plus", {"stochastic_depth": 0.0, "reduction_factor": 8}),
    "compacter": ("compacter", {"reduction_factor": 4}),
    "compacter++": ("compacter++", {"reduction_factor": 2}),
}


def both(name: str) -> tuple[Any, Any]:
    """Our configuration of a class and the peer's; the peer has no identifier for one of them."""
    identifier, changes = CLASSES[name]
    theirs: Any = adapters.AdapterPlusConfig() if name == "adapter_plus" else identifier
    return load_config(identifier, **changes), PeerConfig.load(theirs, **changes)


def ident(fields: Mapping[str, Any]) -> str:
    return "-".join(
        f"{key}={value}" if not isinstance(value, bool) else key
        for key, value in fields.items()
        if value is not False
    )


SMALL_PREFIX = {"prefix_length": 4, "bottleneck_size": 8}
UNIONS: dict[str, Any] = {
    "mam": adapters.MAMConfig(adapters.PrefixTuningConfig(**SMALL_PREFIX)).to_dict(),
    "unipelt": adapters.UniPELTConfig(adapters.PrefixTuningConfig(**SMALL_PREFIX)).to_dict(),
}
PREFIXES: dict[str, Any] = {
    "prefix": PeerConfig.load("prefix_tuning", **SMALL_PREFIX).to_dict(),
    "prefix_flat": PeerConfig.load("prefix_tuning_flat", prefix_length=3).to_dict(),
    "prefix_gated": PeerConfig.load(
        "prefix_tuning", use_gating=True, shared_gating=False, leave_out=[0], **SMALL_PREFIX
    ).to_dict(),
}

# Fields of the adapters that go through files.
FILES: dict[str, dict[str, Any]] = {
    **{name: both(name)[1].to_dict() for name in CLASSES},
    "norms": PeerConfig.load("seq_bn", ln_before=True, ln_after=True, use_gating=True).to_dict(),
    "map": PeerConfig.load("seq_bn", reduction_factor={"0": 2, "default": 8}).to_dict(),
    "leave_out": PeerConfig.load("double_seq_bn", leave_out=[1]).to_dict(),
    "lora": PeerConfig.load("lora", alpha=3).to_dict(),
    "lora_all": PeerConfig.load(
        "lora", attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ).to_dict(),
    "lora_gated": PeerConfig.load("lora", use_gating=True).to_dict(),
    "compacter_W": PeerConfig.load("compacter", reduction_factor=4, shared_W_phm=True).to_dict(),
    "compacter_rule": PeerConfig.load(
        "compacter++", reduction_factor=4, factorized_phm_rule=True, phm_rank=2
    ).to_dict(),
    "compacter_own": PeerConfig.load(
        "compacter", reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False
    ).to_dict(),
    "loreft": PeerConfig.load("loreft", r=2, suffix_positions=1).to_dict(),
    "loreft_tied": PeerConfig.load("loreft", r=3, tied_weights=True, layers=[1]).to_dict(),
    "noreft": PeerConfig.load("noreft", r=2).to_dict(),
    "ia3": PeerConfig.load("ia3").to_dict(),
    "ia3_gated": PeerConfig.load("ia3", use_gating=True).to_dict(),
    **PREFIXES,
    **UNIONS,
}


OWN_FIELDS = {"rank_stabilized": False, "vera_dense": False, "inv_adapter_late": False}
"""Fields that the peer does not have, and what they are where nobody sets them."""


def shared_fields(config: Any) -> dict[str, Any]:
    """A configuration of ours in the fields that the peer has too."""
    fields = config.to_dict()
    for own, usual in OWN_FIELDS.items():
        assert fields.pop(own, usual) == usual
    return fields
