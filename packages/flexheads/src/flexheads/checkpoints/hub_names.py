"""Names in AdapterHub files and the logical addresses that they stand for, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexheads.checkpoints.bundle import Layout

_EMBEDDINGS = "embeddings"
_BOTTLENECK = {"up": "adapter_up", "norm_before": "adapter_norm_before"}
_BOTTLENECK |= {"norm_after": "adapter_norm_after", "gate": "gate", "scaling": "scaling"}
# Files of the first generation named the kind of adapter in the path.
_FIRST_GENERATION = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
# Until its third generation the ancestor of the adapters library called the tanh approximation
# "gelu"; files without a version are older than that.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def adapter_keys(address: str, name: str, config: Mapping[str, Any], layout: Layout) -> list[str]:
    """The keys in a file that hold the tensor at a logical address; some are written twice."""
    prefix = f"{layout.prefix}." if layout.prefix else ""
    site = _site(address, layout)
    suffix = address[len(site) + 1 :]
    if site == _EMBEDDINGS:
        return [f"{prefix}invertible_adapters.{name}.{suffix}"]
    stem = f"{prefix}{layout.paths[site]}.{_infix(config)}.{name}."
    return [stem + word for word in _hub_suffixes(suffix, config)]


def adapter_address(
    key: str, name: str, config: Mapping[str, Any], layout: Layout, *, old: bool
) -> str | None:
    """The logical address of a key.

    Args:
        key: The key in the file.
        name: The adapter's name in the file.
        config: Its configuration.
        layout: The model.
        old: Whether the file is older than the third generation.

    Returns:
        The address; an empty string for a key that repeats another; None for one without a place.
    """
    if layout.prefix:
        key = key.removeprefix(f"{layout.prefix}.")
    if old:
        for before, after in _FIRST_GENERATION.items():
            key = key.replace(f"{before}.{name}.", f"{after}.{name}.")
    stem = f"invertible_adapters.{name}."
    if key.startswith(stem) and _EMBEDDINGS in layout.paths:
        return f"{_EMBEDDINGS}.{key[len(stem) :]}"
    infix = _infix(config)
    for site, path in layout.paths.items():
        stem = f"{path}.{infix}.{name}."
        if key.startswith(stem):
            suffix = _own_suffix(key[len(stem) :], config)
            return f"{site}.{suffix}" if suffix else suffix
    return None


def _site(address: str, layout: Layout) -> str:
    """The site that a tensor's address belongs to."""
    return next(site for site in layout.paths if address.startswith(f"{site}."))


def _infix(config: Mapping[str, Any]) -> str:
    """The word between a site's path and the adapter's name."""
    tag = config.get("architecture")
    return {None: "adapters", "lora": "loras"}.get(tag, "flexheads_adapters")


def _down(config: Mapping[str, Any]) -> str:
    return "adapter_down.1" if config.get("ln_before") else "adapter_down.0"


def _hub_suffixes(suffix: str, config: Mapping[str, Any]) -> list[str]:
    if config.get("architecture") is not None:
        return [suffix]
    module, dot, parameter = suffix.partition(".")
    if module == "down":
        return [f"{_down(config)}.{parameter}"]
    words = [f"{_BOTTLENECK[module]}{dot}{parameter}"]
    if module == "norm_before":
        words.append(f"adapter_down.0.{parameter}")
    return words


def _own_suffix(suffix: str, config: Mapping[str, Any]) -> str | None:
    if config.get("architecture") is not None:
        return suffix
    down = f"{_down(config)}."
    if suffix.startswith(down):
        return f"down.{suffix[len(down) :]}"
    if config.get("ln_before") and suffix.startswith("adapter_down.0."):
        return ""
    for module, word in _BOTTLENECK.items():
        if suffix == word or suffix.startswith(f"{word}."):
            return module + suffix[len(word) :]
    return None


def hub_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration in fields that the `adapters` library knows."""
    config = dict(config)
    if config.pop("rank_stabilized", False):
        # alpha / sqrt(r) is what alpha * sqrt(r) over r gives.
        config["alpha"] = config["alpha"] * config["r"] ** 0.5
    return config


def modern_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a saved adapter of any age, in the fields of today."""
    config = dict(content["config"])
    version = content.get("version")
    nested = config.pop("invertible_adapter", None)
    if nested and content.get("type") != "text_task":
        # Task adapters of the first generation named one but never had its weights.
        config["inv_adapter"] = nested.get("block_type")
        config["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    if version is None and "non_linearity" in config:
        word = config["non_linearity"]
        config["non_linearity"] = _OLD_ACTIVATIONS.get(word, word)
    if config.get("architecture") == "lora" and _is_unscaled(str(version)):
        config["alpha"] = config["r"]
    return config


def _is_unscaled(version: str) -> bool:
    """Whether a LoRA of that library version did not scale by ``alpha / r``, as until 1.0.1."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def modern_head_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a saved flexible head of any age, in the fields of today."""
    config = dict(content["config"])
    config.pop("shift_labels", None)
    if config["head_type"] in ("masked_lm", "causal_lm"):
        config.pop("label2id", None)
    elif config.get("label2id"):
        config["label2id"] = {name: int(number) for name, number in config["label2id"].items()}
    if content.get("version") is None and config.get("activation_function"):
        word = config["activation_function"]
        config["activation_function"] = _OLD_ACTIVATIONS.get(word, word)
    return config


class HeadNames:
    """Keys of one flexible head: numbered modules of a sequence, of which few carry weights.

    Args:
        config: The head's configuration with its ``head_type``.
    """

    _EXTRA = ("problem_type", "tied")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.type: str = config["head_type"]
        layers = int(config.get("layers") or 1)
        acts = config.get("activation_function") is not None
        self.words: dict[str, str] = {}
        if self.type in ("masked_lm", "causal_lm"):
            step = 1 + acts + bool(config.get("layer_norm"))
            for layer in range(layers - 1):
                self.words[f"layers.{layer}.dense"] = str(layer * step)
                self.words[f"layers.{layer}.norm"] = str(layer * step + 1 + acts)
            for parameter in ("weight", "bias"):
                self.words[parameter] = f"{(layers - 1) * step}.{parameter}"
        elif "layers" in config:
            for layer in range(layers):
                self.words[f"layers.{layer}"] = str(1 + layer * (2 + acts))

    def key(self, address: str, name: str) -> str:
        """The key in a file for the tensor at a logical address of the head."""
        for own, word in self.words.items():
            if address == own or address.startswith(f"{own}."):
                return f"heads.{name}.{word}{address[len(own) :]}"
        return f"heads.{name}.{address}"

    def address(self, key: str, name: str) -> str | None:
        """The logical address of a key in a file.

        Returns:
            The address; None for a key without a place; an empty string for one of another head.
            Every release of the `adapters` library picks tensors by the beginning of the name, so
            that its file of a head "a" holds a head "ab" of the same model too.
        """
        stem = f"heads.{name}."
        if not key.startswith(stem):
            return "" if key.startswith(stem[:-1]) else None
        rest = key[len(stem) :]
        for own, word in self.words.items():
            if rest == word or rest.startswith(f"{word}."):
                return own + rest[len(word) :]
        return None if self.words else rest

    def hub_config(self) -> dict[str, Any]:
        """The configuration in fields that the `adapters` library knows."""
        config = {key: value for key, value in self.config.items() if key not in self._EXTRA}
        if self.type in ("masked_lm", "causal_lm"):
            config |= {"shift_labels": self.type == "causal_lm", "label2id": None}
            if self.type == "masked_lm":
                config.pop("dropout_prob")
        if self.config.get("problem_type") == "multi_label_classification":
            config["head_type"] = "multilabel_classification"
        if self.type == "multiple_choice" and config["num_choices"] is None:
            # That library needs a number; where the input tells it, this one stays as it is.
            config["num_choices"] = len(config["label2id"] or ()) or 2
        return config
