"""Adapters on transformers classes as they are, with their own static heads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from flexheads.checkpoints.bundle import Bundle, SavedHead, SavedStaticHead
from flexheads.composition import Setup
from flexheads.conversion.to_static import convert_to_static, in_names_of
from flexheads.errors import (
    CheckpointError,
    ConversionWarning,
    UnknownNameError,
    UnsupportedError,
)
from flexheads.heads.config import label_names
from flexheads.models.adapters.averaging import AveragingMixin
from flexheads.models.adapters.mixin import AdapterModelMixin
from flexheads.models.calls.inputs import batch_size, repeat_rows
from flexheads.models.calls.scores import ARGUMENTS, take_asked, with_scores
from flexheads.models.calls.signature import signed
from flexheads.models.calls.task_ids import check_rows
from flexheads.models.generating.plans import GenerationPlansMixin
from flexheads.models.generating.rows import GenerationPlan
from flexheads.models.heads.static import StaticHead
from flexheads.models.saving.files import reading
from flexheads.models.saving.setups import SetupMixin
from flexheads.models.saving.whole import WholeModelMixin, load_backbone, restore
from flexheads.plugins import registry, resolve
from flexheads.sites.base import argument_names, compiled
from flexheads.sites.finding import holds

_ARGUMENTS = ("adapter_names", "task_ids", *ARGUMENTS)


class StaticModelMixin(GenerationPlansMixin, WholeModelMixin, AveragingMixin, SetupMixin):
    """Adapter support on a transformers class; `init` puts it in front of the class in hand."""

    static_class: ClassVar[type[PreTrainedModel]]
    input_names: ClassVar[tuple[str, ...]]
    _head_of: str | None = None
    """The adapter that the head was loaded with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attach(self)

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        """Loads a model of the transformers class, with the adapters that were saved with it."""
        return load_static(cls.static_class, path, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.static_class,), self.__dict__

    def _planned_forward(
        self, *args: Any, adapter_names: Setup = None, task_ids: Any = None, **kwargs: Any
    ) -> Any:
        if asked := take_asked(kwargs):
            how: Any = {"adapter_names": adapter_names, "task_ids": task_ids}
            return with_scores(self, asked, functools.partial(self.forward, *args, **how, **kwargs))
        inputs = dict(zip(self.input_names, args, strict=False)) | kwargs
        plan = self._plan_of_call(adapter_names, task_ids=task_ids)
        if isinstance(plan, GenerationPlan):
            plan = plan.for_rows(batch_size(inputs))
        check_rows(plan, inputs)
        if plan.routing.repeat > 1:
            args, kwargs = (), repeat_rows(inputs, plan.routing.repeat)
        with self._enter(plan):
            return self._attachment.run(self, self.static_class.forward, args, kwargs)

    def _planned_generate(
        self, *args: Any, adapter_names: Setup = None, task_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Transformers' ``generate``, under one plan from beginning to end.

        Each row of the batch follows its own adapters, its beams and returned sequences too.
        `Parallel` repeats the batch: first come the rows of its first branch, then of the second.
        """
        original: Any = self.static_class
        plan = self._plan_of_call(adapter_names, task_ids=task_ids)
        generate = functools.partial(original.generate, self)
        return self._generate_under(plan, generate, args, kwargs)

    # --- the static head ----------------------------------------------------------------------

    def _active_head_modules(self) -> list[nn.Module]:
        return StaticHead(self).modules()

    def _saved_head(self, name: str) -> SavedStaticHead | None:
        return StaticHead(self).saved()

    def save_head(self, save_directory: Any, format: str = "adapterhub") -> None:
        """Saves the model's head alone.

        Raises:
            UnsupportedError: If the class has no head.
        """
        head = self._saved_head("")
        if head is None:
            raise UnsupportedError(f"{type(self).__name__} has no head.")
        self._write_head(head, save_directory, format)

    def load_head(self, save_directory: Any, id2label: Mapping[int, str] | None = None) -> None:
        """Loads a head alone, of this class or a flexible one that equals it.

        Raises:
            CheckpointError: If the files cannot be read, or hold a head of another kind.
        """
        bundle = self._read(save_directory)
        if bundle.head is None:
            raise CheckpointError(f"{bundle.source} holds no head.")
        try:
            with reading(bundle.source):
                fitting = self._fitting_head(bundle)
        except (UnknownNameError, UnsupportedError) as error:
            raise CheckpointError(f"{bundle.source}: {error}") from error
        with reading(bundle.source):
            StaticHead(self).fill(fitting, id2label)

    def _fitting_head(self, bundle: Bundle) -> SavedStaticHead:
        """The loaded head as one of this class.

        Raises:
            FlexheadsError: If it is of another class and cannot become this one's.
        """
        head, own, keys = bundle.head, type(self).__name__, StaticHead(self).keys
        if isinstance(head, SavedStaticHead):
            if head.model_class != own:
                raise UnsupportedError(
                    f"the head was saved by a {head.model_class}, this model is a {own}"
                )
            return in_names_of(head, keys)
        assert isinstance(head, SavedHead)
        conversion = registry().conversion(own)
        config = self._attachment.backbone.config
        return convert_to_static([head], conversion, config, self._embeddings(), keys)

    def _prepare_head(
        self,
        bundle: Bundle,
        name: str | None,
        id2label: Mapping[int, str] | None,
        overwrite_ok: bool,
    ) -> Any:
        if bundle.head is None or not StaticHead(self).keys:
            return None
        try:
            with reading(bundle.source):
                fitting = self._fitting_head(bundle)
        except (UnknownNameError, UnsupportedError) as error:
            warnings.warn(
                f"{bundle.source}: the head is left out, {error}. The adapter is loaded.",
                ConversionWarning,
                stacklevel=3,
            )
            return None
        with reading(bundle.source):
            StaticHead(self).check(fitting)
        if id2label is not None:
            label_names(self.config.num_labels, id2label)
        owner = bundle.adapter.name if name is None and bundle.adapter is not None else name
        if self._head_of in self.adapters and self._head_of != owner:
            warnings.warn(
                f"{bundle.source}: the head that came with adapter {self._head_of!r} is replaced. "
                f"A {type(self).__name__} has one head; load with with_head=False to keep it.",
                stacklevel=3,
            )
        return fitting, id2label, owner

    def _install_prepared(self, prepared: Any) -> None:
        if prepared is not None:
            *head, owner = prepared
            StaticHead(self).fill(*head)
            self._head_of = owner


def init(model: Any) -> Any:
    """Gives any transformers model adapter support, in place.

    The model stays an instance of its class; its parameters and their names stay as they are.

    Args:
        model: A model of an architecture that some installed package registers.

    Returns:
        The same model.

    Raises:
        UnknownNameError: If no installed package knows the architecture.
        UnsupportedError: If the model is compiled already.
    """
    if isinstance(model, AdapterModelMixin):
        return model
    if compiled(model):
        raise UnsupportedError(
            "This model is compiled already, and would not see adapters that come now. Call "
            "flexheads.init on the model first and compile afterwards."
        )
    leftover = model.__dict__.pop("forward", None)
    if leftover is not None and hasattr(model, "_hf_hook"):
        model.__dict__["forward"] = leftover
        return _init_under_hook(model)
    original = type(model)
    model.__class__ = _with_adapters(original)  # type: ignore[arg-type]
    try:
        attach(model)
    except Exception:
        model.__class__ = original
        raise
    return model


def load_static(loader: Any, path: str, *args: Any, **kwargs: Any) -> Any:
    """Loads a model with adapter support, and the adapters that were saved with it.

    Args:
        loader: A transformers class or auto class.
        path: A directory or the id of a repository on the hub.
        args: As for transformers' ``from_pretrained``.
        kwargs: As for transformers' ``from_pretrained``.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = load_backbone(loader, path, *args, **kwargs)
    init(model)
    restore(model, path, kwargs)
    return (model, info) if wants_info else model


def attach(model: Any) -> None:
    """Finds the backbone of a model and attaches its architecture's sites."""
    spec = registry().architecture_for(model.config.model_type)
    backbone_class = resolve(spec.backbone)
    children = (getattr(model, name, None) for name in spec.prefixes)
    # Where a class misnames the place, its base model is itself.
    inside = next((child for child in children if isinstance(child, backbone_class)), None)
    backbone = model.base_model if inside is None or model.base_model is not model else inside
    # Some classes hold the backbone's parts themselves, and some only one of them.
    family = next(c for c in backbone_class.__mro__ if c.__name__.endswith("PreTrainedModel"))
    held = any(holds(backbone, layers.path) for layers in spec.layers)
    if not isinstance(backbone, family if held else backbone_class):
        raise UnsupportedError(
            f"The base model of {type(model).__name__} is a {type(backbone).__name__}; "
            f"architecture {spec.name!r} is about {backbone_class.__name__}."
        )
    model._attach(spec, backbone)


def _init_under_hook(model: Any) -> Any:
    """Initialises a model that accelerate has dispatched: its hook wraps the forward it finds."""
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = model._hf_hook
    remove_hook_from_module(model)
    init(model)
    add_hook_to_module(model, hook)
    return model


@functools.cache
def _with_adapters(original: Any) -> Any:
    """A subclass that looks like its parent, by module and name too.

    Transformers keys what it knows about a class by these, the capture of hidden states included.
    """
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "static_class": original,
        "input_names": argument_names(original.forward),
        "forward": signed(StaticModelMixin._planned_forward, original.forward, _ARGUMENTS),
    }
    if hasattr(original, "generate"):
        body["generate"] = functools.wraps(original.generate)(StaticModelMixin._planned_generate)
    return type(original.__name__, (StaticModelMixin, original), body)


def _rebuild(original: Any) -> Any:
    cls = _with_adapters(original)
    return cls.__new__(cls)
