"""Auto classes: the right class with heads, and transformers' own classes with adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from flexheads.models.saving.whole import hub_arguments
from flexheads.models.static import init, load_static
from flexheads.models.with_heads import ModelWithHeads, with_heads_class
from flexheads.plugins import registry


class AutoModelWithHeads:
    """Picks the class with flexible heads that fits a configuration."""

    def __init__(self) -> None:
        raise TypeError("Use AutoModelWithHeads.from_pretrained(...) or .from_config(...).")

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> ModelWithHeads:
        """Loads a model with flexible heads; see `ModelWithHeads.from_pretrained`.

        Raises:
            UnknownNameError: If no installed package knows the architecture.
        """
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            model_type = config.model_type
        else:
            model_type = _model_type(path, hub_arguments(kwargs))
        model: ModelWithHeads = cls._class_for(model_type).from_pretrained(path, *args, **kwargs)
        return model

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelWithHeads:
        """A model with random weights.

        Raises:
            UnknownNameError: If no installed package knows the architecture.
        """
        return cls._class_for(config.model_type)(config)

    @staticmethod
    def _class_for(model_type: str) -> type[ModelWithHeads]:
        return with_heads_class(registry().architecture_for(model_type).with_heads)


def _model_type(path: str, hub: Mapping[str, Any]) -> str:
    """The type of a saved model; where its file does not tell, what transformers makes of it."""
    told, _ = PretrainedConfig.get_config_dict(path, **hub)
    model_type = told.get("model_type")
    if ("model type", model_type) in registry().claims:
        return str(model_type)
    return str(AutoConfig.from_pretrained(path, **hub).model_type)


class _StaticAuto:
    """A transformers auto class whose models have adapter support."""

    original: Any

    def __init__(self) -> None:
        raise TypeError("Use from_pretrained(...) or from_config(...).")

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        """Loads a model of transformers' own class, and the adapters that were saved with it."""
        return load_static(cls.original, path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        """A model of transformers' own class with random weights."""
        return init(cls.original.from_config(config, **kwargs))


@functools.cache
def static_auto_class(name: str) -> type[_StaticAuto]:
    """Transformers' auto class of that name, with adapter support.

    Raises:
        AttributeError: If transformers has no such class.
    """
    original = getattr(transformers, name)
    body = {"original": original, "__module__": "flexheads", "__doc__": original.__doc__}
    return type(name, (_StaticAuto,), body)
