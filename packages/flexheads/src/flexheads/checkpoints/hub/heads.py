"""Flexible heads in AdapterHub files: their keys and their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.checkpoints.hub.configs import OLD_ACTIVATIONS
from flexheads.heads.custom import is_foreign

_MULTILABEL = "multilabel_classification"
LANGUAGE_MODELS = ("masked_lm", "causal_lm", "seq2seq_lm")
# Types whose configuration says nothing of a bias: there always is one.
_WITHOUT_BIAS = ("tagging", "question_answering", "multiple_choice")
# Fields that the library's configurations of these types do not have.
_UNKNOWN = {
    "masked_lm": ("dropout_prob",),
    "seq2seq_lm": ("dropout_prob", "embedding_size"),
    "dependency_parsing": ("dropout_prob",),
}


def modern_head_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a saved flexible head of any age, in the fields of today."""
    config = dict(content["config"])
    config.pop("shift_labels", None)
    if config["head_type"] in LANGUAGE_MODELS:
        config.pop("label2id", None)
    elif config.get("label2id"):
        config["label2id"] = {name: int(number) for name, number in config["label2id"].items()}
    if content.get("version") is None and config.get("activation_function"):
        word = config["activation_function"]
        config["activation_function"] = OLD_ACTIVATIONS.get(word, word)
    return config


class HeadNames:
    """Keys of one flexible head: numbered modules of a sequence, of which few carry weights.

    Args:
        config: The head's configuration with its ``head_type``.
    """

    _EXTRA = (
        *("problem_type", "tied", "scaled", "softcap", "loss", "threshold"),
        *("unanswerable", "null_threshold", "ignore_pad_arcs"),
    )
    # Left out where they say what that library does anyway; else it shall refuse the file.
    _USUAL: Mapping[str, Any] = {
        "pooling": None,
        "hidden_layer": None,
        "side": None,
        "late": False,
        "layer_norm": False,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.type: str = config["head_type"]
        layers = int(config.get("layers") or 1)
        acts = config.get("activation_function") is not None
        self.words: dict[str, str] = {}
        self.foreign = is_foreign(self.type)  # its keys are those of the file
        if self.foreign:
            return
        if self.type in LANGUAGE_MODELS:
            step = 1 + acts + bool(config.get("layer_norm"))
            for layer in range(layers - 1):
                self.words[f"layers.{layer}.dense"] = str(layer * step)
                if config.get("layer_norm"):
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
        return None if rest[:1].isdigit() and not self.foreign else rest

    def hub_config(self) -> dict[str, Any]:
        """The configuration in fields that the `adapters` library knows."""
        if self.foreign:
            return dict(self.config)
        config = {key: value for key, value in self.config.items() if key not in self._EXTRA}
        usual = dict(self._USUAL)
        if self.type in LANGUAGE_MODELS:
            del usual["layer_norm"]
        if self.type in _WITHOUT_BIAS:
            usual["bias"] = True
        config = {k: v for k, v in config.items() if k not in usual or v != usual[k]}
        if self.type in LANGUAGE_MODELS:
            config |= {"shift_labels": self.type == "causal_lm", "label2id": None}
        for field in _UNKNOWN.get(self.type, ()):
            config.pop(field)
        if self.config.get("problem_type") == "multi_label_classification":
            own_field = "multilabel" in config
            config |= {"multilabel": True} if own_field else {"head_type": _MULTILABEL}
        if self.type == "multiple_choice" and config["num_choices"] is None:
            # That library needs a number; where the input tells it, this one stays as it is.
            config["num_choices"] = len(config["label2id"] or ()) or 2
        return config
