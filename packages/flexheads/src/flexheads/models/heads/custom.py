"""Heads of one's own on a model: built ones, and types that are registered in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.checkpoints.hub.heads import modern_head_config
from flexheads.errors import ConfigError
from flexheads.heads.base import PredictionHead
from flexheads.heads.custom import (
    CustomHead,
    class_of,
    custom_head_types,
    register_custom_head,
)
from flexheads.models.heads.methods import HeadsMixin


class CustomHeadsMixin(HeadsMixin):
    """``add_prediction_head`` and ``add_custom_head``, as users of the `adapters` library know."""

    def add_prediction_head(
        self, head: PredictionHead, overwrite_ok: bool = False, set_active: bool = True
    ) -> None:
        """Adds a head that is built already, under its own name.

        Its type has to be installed or registered; a class of `CustomHead` that is not is
        registered under ``config["head_type"]``, or its own name.

        Args:
            head: The head; it is moved to the device and dtype of the model.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.

        Raises:
            ConfigError: If the name is taken, it is no head, or made for another hidden size.
            UnknownNameError: If its type is neither installed nor registered.
            UnsupportedError: If the model lacks what the head would read.
        """
        if not isinstance(head, PredictionHead):
            raise ConfigError(
                f"{type(head).__name__} is no subclass of flexheads.heads.PredictionHead or of "
                "flexheads.heads.CustomHead."
            )
        self._refuse_taken("head", head.name, overwrite_ok)
        size = self._attachment.backbone.config.hidden_size
        if getattr(head, "hidden_size", size) != size:
            raise ConfigError(
                f"Head {head.name!r} was built for hidden size {head.hidden_size}, but this model "
                f"has {size}."
            )
        head.check_architecture(self._attachment.spec)
        self._check_pooler(head.name, head.config)
        _settle(head)
        self._add_built(self._placed(head), set_active)

    def add_custom_head(
        self,
        head_type: str,
        head_name: str,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds a head of a type that was registered.

        Args:
            head_type: Its type, as given to `register_custom_head`.
            head_name: Its name.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.
            kwargs: The arguments of its class, or the fields of its configuration.

        Raises:
            ConfigError: If the name is taken, or an argument does not exist or cannot be saved.
            UnknownNameError: If there is no such type.
        """
        self.add_head(head_name, head_type, overwrite_ok, set_active, **kwargs)

    def register_custom_head(self, identifier: str, head: type[PredictionHead]) -> None:
        """Makes a class known as a head type, in this process and for all models.

        See `flexheads.heads.register_custom_head`, which does the same without a model.

        Args:
            identifier: Name of the head type.
            head: A subclass of `PredictionHead` or of `CustomHead`.

        Raises:
            ConfigError: If it is neither, or an installed package brings a type of that name.
        """
        register_custom_head(identifier, head)

    def add_prediction_head_from_config(
        self,
        head_name: str,
        config: Mapping[str, Any],
        overwrite_ok: bool = False,
        set_active: bool = True,
    ) -> None:
        """Adds a head from a configuration, as `get_prediction_heads_config` gives it.

        Args:
            head_name: Its name.
            config: The configuration with its ``head_type``, ours or the `adapters` library's.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.

        Raises:
            ConfigError: If the name is taken, or the configuration has no type or a wrong field.
            UnknownNameError: If there is no such type.
        """
        if "head_type" not in config:
            raise ConfigError(f"The configuration of head {head_name!r} has no head_type.")
        self._refuse_taken("head", head_name, overwrite_ok)
        # What a class of one's own says of itself may be more than it is made with.
        own = config["head_type"] in custom_head_types()
        fields = dict(config) if own else modern_head_config({"config": config, "version": ""})
        head = self._build_head(head_name, fields.pop("head_type"), fields, tolerant=own)
        self._add_built(head, set_active)

    def get_prediction_heads_config(self) -> dict[str, dict[str, Any]]:
        """The configuration of every head by its name."""
        return {name: head.to_dict() for name, head in self.heads.items()}

    def _build_head(
        self,
        name: str,
        head_type: str,
        config: Mapping[str, Any],
        provider: str | None = None,
        tolerant: bool = False,
    ) -> PredictionHead:
        kind = class_of(head_type, provider)
        if not issubclass(kind, CustomHead):
            built = super()._build_head(name, head_type, config, provider, tolerant)
            _name_type(built, head_type)
            return built
        kind.check_architecture(self._attachment.spec)
        return self._placed(kind.make(self, name, head_type, config, tolerant))


def _settle(head: PredictionHead) -> None:
    """Gives a built head the name of the type that builds it again.

    Raises:
        ConfigError: If there is none.
        UnknownNameError: If it says one that is not known.
    """
    kind = type(head)
    own = [name for name in custom_head_types() if class_of(name) is kind]
    said = head.config.get("head_type") or getattr(head, "head_type", None)
    if own:
        said = said if said in own else own[0]
    elif isinstance(head, CustomHead):
        said = head.config.get("head_type") or kind.__name__
        register_custom_head(said, kind)
    elif said is None or class_of(said) is not kind:
        raise ConfigError(
            f"Head {head.name!r} is a {kind.__name__}, which head_type={said!r} does not build. "
            f"Register it before: register_custom_head(head_type, {kind.__name__})."
        )
    if isinstance(head, CustomHead):
        head.settle(said)
    _name_type(head, said)


def _name_type(head: PredictionHead, head_type: str) -> None:
    """Names the type of a head as it was registered, whatever its class says."""
    if getattr(head, "head_type", None) != head_type:
        head.__dict__["head_type"] = head_type
