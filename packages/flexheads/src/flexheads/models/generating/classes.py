"""Classes with flexible heads that generate as transformers' own classes do."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

from flexheads.errors import ConfigError
from flexheads.models.generating.generate import GenerationWithHeadsMixin, generates
from flexheads.models.saving.whole import hub_arguments
from flexheads.plugins import registry, resolve
from flexheads.specs import ArchitectureSpec

_FURTHER_HOOKS = ("_reorder_cache", "create_masks_for_generate")
"""What generation asks a class for without having it itself."""


def generation_bases(spec: ArchitectureSpec, backbone: type[PreTrainedModel]) -> tuple[type, ...]:
    """What makes a class with flexible heads generate as transformers' own class does.

    That class is the backbone itself, or one that the architecture's conversions name with a head
    that generates. Where it steps into generation, so does the class with flexible heads.

    Returns:
        Base classes, or none where transformers does not generate with the architecture.
    """
    writer = backbone if issubclass(backbone, GenerationMixin) else _writer(spec, backbone)
    return () if writer is None else (GenerationWithHeadsMixin, _steps_of(writer))


def _writer(spec: ArchitectureSpec, backbone: type[PreTrainedModel]) -> type | None:
    """The static class that writes with a backbone: with a decoder of its own, or one head."""
    found: list[tuple[tuple[bool, bool], type]] = []
    for conversion in registry().conversions_for(spec.name):
        heads = [resolve(registry().head_type(rule.head_type).head) for rule in conversion.heads]
        name, module = conversion.static_class, sys.modules[backbone.__module__]
        static = getattr(module, name, None) or getattr(transformers, name, None)
        writes = any(generates(head) for head in heads)
        if writes and isinstance(static, type) and issubclass(static, GenerationMixin):
            rank = any(head.writes_labels for head in heads), len(heads) == 1
            found.append((rank, static))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _steps_of(writer: type) -> type:
    """A mixin with what a static class changes in generation; transformers' own without that.

    Methods that were written in that class call ``super()``, which looks for the class they stand
    in; so they get a copy that stands in this one.
    """
    mixin = next(
        c
        for c in writer.__mro__
        if issubclass(c, GenerationMixin) and not issubclass(c, PreTrainedModel)
    )
    hooks = {name for name in dir(mixin) if name not in dir(object)} | set(_FURTHER_HOOKS)
    own: dict[str, Any] = {}
    for cls in reversed(writer.__mro__):
        if issubclass(cls, GenerationMixin) and cls not in mixin.__mro__:
            own |= {name: value for name, value in vars(cls).items() if name in hooks}
    if not own:
        return mixin
    here = types.CellType()
    body = {name: _standing_in(here, value) for name, value in own.items()}
    # Transformers knows classes that generate by this word among the names of their bases.
    here.cell_contents = type(f"{writer.__name__}GenerationMixin", (mixin,), body)
    found: type = here.cell_contents
    return found


def _standing_in(here: types.CellType, method: Any) -> Any:
    """A method whose ``super()`` starts from the class in `here`."""
    if not isinstance(method, types.FunctionType):
        return method
    free, closure = method.__code__.co_freevars, method.__closure__ or ()
    cells = (here if n == "__class__" else c for n, c in zip(free, closure, strict=True))
    moved = types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, tuple(cells)
    )
    moved.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(moved, method)


def configure_generation(
    model: Any, given: GenerationConfig | None, path: str, kwargs: Mapping[str, Any]
) -> None:
    """Gives a loaded model what its files say about generation.

    Older files say it in the model's configuration.

    Args:
        model: The model; one that does not generate stays as it is.
        given: What the caller wants instead.
        path: A directory or the id of a repository on the hub.
        kwargs: The arguments of ``from_pretrained``.

    Raises:
        ConfigError: If `given` is something else.
    """
    if not model.can_generate():
        return
    if given is not None and not isinstance(given, GenerationConfig):
        raise ConfigError(f"generation_config should be a GenerationConfig, not {given!r}.")
    saved = _saved(model, path, kwargs) if given is None else copy.deepcopy(given)
    model.generation_config = saved


def _saved(model: Any, path: str, kwargs: Mapping[str, Any]) -> GenerationConfig:
    hub = hub_arguments(kwargs)
    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:
        told, _ = PretrainedConfig.get_config_dict(path, **hub)
        if _adds_nothing(told, model):
            own: GenerationConfig = model.generation_config
            return own
        return GenerationConfig.from_model_config(told)


def _adds_nothing(told: Mapping[str, Any], model: Any) -> bool:
    """Whether a file says no more of generation than the model's configuration has taken in.

    So it is nearly always, and to make a configuration of it once more would take a while.
    """
    if not told.keys().isdisjoint(("decoder", "generator", "text_config")):
        return False
    known = vars(model.config)
    about = told.keys() & vars(model.generation_config).keys()
    return all(name in known and known[name] == told[name] for name in about)
