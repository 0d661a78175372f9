"""Heads of one's own: types registered in this process, and classes of the `adapters` library."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from flexheads.activations import activation
from flexheads.errors import ConfigError, UnknownNameError, UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import HeadConfig
from flexheads.heads.features import Features
from flexheads.plugins import registry, resolve

_CUSTOM: dict[str, type[PredictionHead]] = {}
_WAY_OUT = (
    "Install the package that brings it, or register your own class before: "
    "flexheads.heads.register_custom_head(head_type, head_class)."
)
# Read once, because compiling does not see through fields.
_FIELDS = {field.name: field.default for field in dataclasses.fields(HeadConfig)}


def register_custom_head(identifier: str, head_class: Any) -> None:
    """Makes a class known as a head type, in this process and for all models.

    Files name the type, not the class, so this is done again wherever they are loaded; a package
    that registers the type through the hook does it by itself.

    Args:
        identifier: Name of the head type; one of the same name is replaced.
        head_class: A subclass of `PredictionHead` or of `CustomHead`.

    Raises:
        ConfigError: If it is neither, or an installed package brings a type of that name.
    """
    if not identifier:
        raise ConfigError("A head type needs a name that is not empty.")
    if not (isinstance(head_class, type) and issubclass(head_class, PredictionHead)):
        raise ConfigError(
            f"{head_class!r} is no subclass of flexheads.heads.PredictionHead or of "
            "flexheads.heads.CustomHead, which stands in for adapters.heads.PredictionHead."
        )
    spec = registry().head_types.get(identifier)
    if spec is not None:
        if resolve(spec.head) is head_class:
            return
        raise ConfigError(
            f"The head type {identifier!r} comes from {registry().provider_of(spec)}; register "
            f"{head_class.__name__} under another name."
        )
    _CUSTOM[identifier] = head_class


def custom_head_types() -> tuple[str, ...]:
    """The names of the types that were registered in this process."""
    return tuple(_CUSTOM)


def class_of(head_type: str, provider: str | None = None) -> type[PredictionHead]:
    """The class of a head type, installed or registered in this process.

    Args:
        head_type: Its name.
        provider: The distribution that wrote a saved file, for the message.

    Raises:
        UnknownNameError: If there is none.
    """
    if head_type in _CUSTOM:
        return _CUSTOM[head_type]
    try:
        found: type[PredictionHead] = resolve(registry().head_type(head_type, provider).head)
    except UnknownNameError as error:
        known, hint = [*error.known, *_CUSTOM], f"{error.hint} {_WAY_OUT}".strip()
        raise UnknownNameError(error.kind, error.name, known, hint) from error
    return found


def provider_of(head_type: str) -> str | None:
    """The distribution that brings a head type, ``"name==version"``; None for a registered one."""
    spec = registry().head_types.get(head_type)
    return None if spec is None else registry().provider_of(spec).requirement


def is_foreign(head_type: str) -> bool:
    """Whether a type is written for the `adapters` library, as far as is known here.

    Its tensors are called in files as in the head.
    """
    if (kind := _CUSTOM.get(head_type)) is not None:
        return issubclass(kind, CustomHead)
    return head_type not in registry().head_types


class CustomConfig(dict[str, Any]):
    """The configuration of a `CustomHead`: a dictionary, with the attributes of `HeadConfig`."""

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:
            return self.get(name, _FIELDS[name])
        raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written into files."""
        return dict(self)


class CustomHead(nn.Sequential, PredictionHead):  # type: ignore[misc]  # two kinds of forward
    """Base class of heads that are written as for the `adapters` library.

    It takes the place of that library's ``PredictionHead``: a sequence of modules with a name and a
    dictionary `config`. A subclass is made by ``cls(model, head_name, **kwargs)``, and has a
    ``forward(outputs, cls_output=None, attention_mask=None, return_dict=False, **kwargs)``, where

    - ``outputs`` is the backbone's output, at the head's ``hidden_layer``,
    - ``cls_output`` is what stands for the sequence, ``(batch, hidden)``: the trained pooler's
      result where ``config["use_pooler"]`` is true, otherwise what the architecture pools,
    - ``attention_mask`` is ``(batch, sequence)`` or None,
    - ``return_dict`` is true,
    - ``kwargs`` are the labels that `get_label_names` names, ``pooled_output`` (the trained
      pooler's result or None), ``invertible_adapter``, and ``features``, a
      `flexheads.heads.Features` with everything else.

    The arguments that it was made with and its `config` are what is saved, so they hold plain
    values; it is made anew from them.

    Args:
        name: The head's name.
    """

    head_type: ClassVar[str] = "custom"
    config_class = HeadConfig

    def __new__(cls, *args: Any, **kwargs: Any) -> CustomHead:
        head = super().__new__(cls)
        # So that a head knows how to be made anew, however little its configuration says.
        head.__dict__["_made_with"] = _arguments(cls, args, kwargs)
        return head

    def __init__(self, name: str) -> None:
        nn.Module.__init__(self)  # what a `PredictionHead` is made from is not known here
        self.name, self.config = name, {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and isinstance(value, Mapping):
            value = CustomConfig(value)
        super().__setattr__(name, value)

    @property
    def label_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `PredictionHead.label_names`; here they come from `get_label_names`."""
        return tuple(self.get_label_names())

    def get_label_names(self) -> list[str]:
        """The arguments of a call that are this head's."""
        return ["labels"]

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that gives scores of tokens, where there is one."""
        return None

    def build(self, model: Any) -> None:
        """Adds the usual modules: dropout, linear layer and activation, `layers` times.

        Read from `config`: ``layers``, ``activation_function``, ``dropout_prob``, ``bias``, and the
        size of the last layer, which is ``num_labels``, 1 for ``num_choices``, or else the hidden
        size with an activation behind it. The modules are numbered as in the `adapters` library.

        Args:
            model: The model.
        """
        size, layers = int(model.config.hidden_size), int(self.config["layers"])
        outputs = self.config.get("num_labels", 1 if "num_choices" in self.config else None)
        parts: list[nn.Module | None] = []
        for number in range(layers):
            parts.append(nn.Dropout(self._get_dropout_prob(model.config)))
            if number < layers - 1:
                parts += [nn.Linear(size, size), self._activation()]
                continue
            bias = self.config.get("bias", True)
            parts.append(nn.Linear(size, size if outputs is None else outputs, bias=bias))
            parts.append(self._activation() if outputs is None else None)
        self.extend(part for part in parts if part is not None)
        self.apply(model._init_weights)
        self.train(model.training)

    def to_dict(self) -> dict[str, Any]:
        made = {**self.__dict__["_made_with"], **self.config}
        if made.get("label2id") is not None:
            made.pop("id2label", None)
        return {**made, "head_type": self.head_type}

    @property
    def id2label(self) -> dict[int, str] | None:
        """The name of each label by its number, where the configuration has them."""
        config = self.to_dict()
        if config.get("label2id"):
            return {int(number): name for name, number in config["label2id"].items()}
        names = config.get("id2label")
        return {int(number): name for number, name in names.items()} if names else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs ``forward``; features are taken apart into the arguments that it knows."""
        if not (args and isinstance(args[0], Features)):
            return super().__call__(*args, **kwargs)
        (features,) = args
        own: dict[str, Any] = {
            "cls_output": self._cls(features),
            "attention_mask": features.attention_mask,
            "return_dict": True,
            "pooled_output": features.pooler_output,
            "invertible_adapter": _Inverse(features),
            "features": features,
        }
        return super().__call__(features.output, **own, **kwargs)

    def _cls(self, features: Features) -> Tensor | None:
        try:
            return features.pooled("pooler" if self.config.get("use_pooler") else None)
        except UnsupportedError:
            return None  # `_get_cls_output` says why, to heads that need it

    def _get_cls_output(self, outputs: Any, **kwargs: Any) -> Tensor:
        """What stands for the sequence, from the arguments of ``forward``."""
        features: Features = kwargs["features"]
        return features.pooled("pooler" if self.config.get("use_pooler") else None)

    def _get_dropout_prob(self, model_config: Any) -> float:
        names = ("classifier_dropout", "hidden_dropout_prob")
        own = [self.config.get("dropout_prob"), *(getattr(model_config, n, None) for n in names)]
        return float(next((value for value in own if value is not None), 0.0))

    def _activation(self) -> nn.Module | None:
        return activation(self.config.get("activation_function"))

    @classmethod
    def make(
        cls, model: Any, name: str, head_type: str, config: Mapping[str, Any], tolerant: bool
    ) -> CustomHead:
        """A head from its arguments.

        Args:
            model: The model that it is for.
            name: Its name.
            head_type: The name of its type.
            config: The arguments of the class, as given or as saved.
            tolerant: Leave out what is no argument of the class: a saved configuration may say more
                than how it is made.

        Raises:
            ConfigError: If there is no such argument, or one that cannot be written into a file.
        """
        arguments, taken = dict(config), inspect.signature(cls.__init__).parameters
        if "label2id" not in taken:
            if arguments.get("label2id"):
                arguments["id2label"] = {n: name for name, n in arguments["label2id"].items()}
            arguments.pop("label2id", None)
        if arguments.get("id2label"):  # numbers are words in JSON
            arguments["id2label"] = {int(n): name for n, name in arguments["id2label"].items()}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in taken.values()):
            unknown = sorted(set(arguments) - set(taken))
            if unknown and not tolerant:
                raise ConfigError(
                    f"{cls.__name__} takes no {', '.join(map(repr, unknown))}; it takes "
                    f"{', '.join(list(taken)[3:]) or 'nothing'}."
                )
            arguments = {key: value for key, value in arguments.items() if key in taken}
        head = cls(model, name, **arguments)  # type: ignore[call-arg]
        head.settle(head_type)
        return head

    def settle(self, head_type: str) -> None:
        """Gives a built head the name of its type, and its labels names where they have none.

        Raises:
            ConfigError: If its configuration cannot be written into a file.
        """
        self.__dict__["head_type"] = head_type
        count = self.config.get("num_labels", self.config.get("num_choices"))
        if count is not None and self.config.get("label2id", "") is None:
            self.config["label2id"] = {f"LABEL_{number}": number for number in range(count)}
        for key, value in self.to_dict().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"Head {self.name!r} could not be saved: {key}={value!r} is no plain value."
                ) from error


def _arguments(
    kind: type[CustomHead], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a class by name, without the model and the name of the head."""
    taken = inspect.signature(kind.__init__).parameters
    plain = [p.name for p in taken.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = dict(zip(plain[1:], args, strict=False)) | dict(kwargs)
    return {name: value for name, value in named.items() if name not in plain[1:3]}


class _Inverse:
    """The inverse of the invertible adapters, called as a module of the `adapters` library."""

    def __init__(self, features: Features) -> None:
        self._undo = features.undo

    def __call__(self, hidden: Tensor, rev: bool = True) -> Tensor:
        return self._undo(hidden)
