"""Unions in AdapterHub files: each member writes and reads what is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flexheads.checkpoints.bundle import Layout
from flexheads.checkpoints.hub.names import AdapterNames

_BOTTLENECKS = {
    "attention": "mh_adapter",
    "cross_attention": "cross_adapter",
    "feed_forward": "output_adapter",
    "embeddings": "inv_adapter",
}
_MATRICES = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
_HALVES = {"mlp_in": "intermediate_lora", "mlp_out": "output_lora"}
_ROLES = {
    "prefix_tuning": ("self_attention", "encoder_attention"),
    "prompt_tuning": ("prompt",),
    "reft": ("output",),
    "ln_tuning": ("norm", "norms"),
    "trainable_tokens": ("tokens",),
}
"""By method, the sites that no other method takes."""


class UnionNames(AdapterNames):
    """The names of several methods.

    Args:
        name, config, layout, old: As for `AdapterNames`.
        member: Makes the names of one member.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        layout: Layout,
        *,
        old: bool = False,
        member: Callable[[Mapping[str, Any]], AdapterNames],
    ) -> None:
        super().__init__(name, config, layout, old=old)
        self.members = [member(own) for own in config["configs"]]

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        for number, member in enumerate(self.members):
            own = {a: t for a, t in tensors.items() if self._owner(a) == number}
            written |= member.write(own)
        return written

    def read(self, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        tensors: dict[str, Tensor] = {}
        unexpected = dict.fromkeys(raw)
        for number, member in enumerate(self.members):
            own, others = member.read(raw)
            tensors |= {a: t for a, t in own.items() if self._owner(a) == number}
            unexpected = {key: None for key in unexpected if key in others}
        self.config = {**self.config, "configs": [member.config for member in self.members]}
        return tensors, list(unexpected)

    def keys(self, address: str) -> list[str]:
        return self.members[self._owner(address)].keys(address)

    def _owner(self, address: str) -> int:
        """The number of the member that a tensor belongs to."""
        known = [n for n, m in enumerate(self.members) if _acts(m.config, address)]
        others = [n for n, m in enumerate(self.members) if _acts(m.config, address) is None]
        return (known or others or [0])[0]


def _acts(config: Mapping[str, Any], address: str) -> bool | None:
    """Whether a configuration has a tensor at an address; None where only its method knows."""
    words, tag = address.split("."), config.get("architecture")
    if words[0] == "layers" and int(words[1]) in config.get("leave_out", ()):
        return False
    role = words[2] if words[0] == "layers" else words[0]
    if words[:2] == ["shared", "vera"]:
        return tag == "lora"
    if role == "shared":
        pool = "control_trans" in words or "wte" in words
        return pool if tag == "prefix_tuning" or pool else None
    if tag is None:
        return bool(config.get(_BOTTLENECKS.get(role, "")))
    if tag in ("lora", "mtl_lora"):
        in_attention = role.removeprefix("cross_")
        if in_attention in _MATRICES:
            return (
                bool(config["selfattn_lora"]) and _MATRICES[in_attention] in config["attn_matrices"]
            )
        return bool(config.get(_HALVES.get(role, "")))
    return role in _ROLES[tag] if tag in _ROLES else None
