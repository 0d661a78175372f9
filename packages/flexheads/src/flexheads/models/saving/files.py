"""Saving and loading adapters and heads: read, check, build aside, fill, and only then swap in."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexheads.checkpoints.bundle import (
    Bundle,
    Layout,
    Provenance,
    SavedAdapter,
    SavedHead,
    SavedStaticHead,
)
from flexheads.checkpoints.transfer import fill, read_bundle, write_bundle
from flexheads.errors import (
    CheckpointError,
    CompositionError,
    ConfigError,
    FlexheadsError,
    UnknownNameError,
)
from flexheads.methods.base import to_be_filled
from flexheads.methods.config import load_config
from flexheads.models.adapters.mixin import AdapterModelMixin
from flexheads.plugins import registry
from flexheads.sites.attach import Attachment
from flexheads.sites.base import input_embeddings
from flexheads.sites.finding import first
from flexheads.specs import Spec

logger = logging.getLogger(__name__)

_ABOUT_FILES = (CheckpointError, CompositionError, ConfigError)


class SavingMixin(AdapterModelMixin):
    """``save_adapter`` and ``load_adapter``, and what heads add to them."""

    _known_layout: tuple[Attachment, Layout] | None = None

    def save_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str,
        with_head: bool = True,
        format: str = "adapterhub",
    ) -> None:
        """Saves an adapter, and the head that belongs to it, into one directory.

        Args:
            save_directory: The directory; it is made where it does not exist.
            adapter_name: The adapter.
            with_head: Save its head beside it: the flexible head of the same name, where there is
                one, or the static head of the model.
            format: The layout of files.

        Raises:
            UnknownNameError: If there is no such adapter or format.
            CheckpointError: If the directory cannot be used.
        """
        adapter = self.adapters[adapter_name]
        method = registry().method_for_tag(adapter.config.tag)
        head = self._saved_head(adapter_name) if with_head else None
        bundle = Bundle(
            adapter=SavedAdapter(
                name=adapter_name, config=adapter.config.to_dict(), tensors=adapter.state_dict()
            ),
            head=head,
            adapter_from=self._provenance(method),
            head_from=self._head_provenance(head),
        )
        write_bundle(bundle, save_directory, self._layout(), format)

    def load_adapter(
        self,
        adapter_name_or_path: str | Path | None = None,
        load_as: str | None = None,
        with_head: bool = True,
        set_active: bool = False,
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        revision: str | None = None,
        **upstream: Any,
    ) -> str:
        """Loads an adapter, and the head beside it, or else leaves the model as it was.

        Args:
            adapter_name_or_path: A directory, or the id of a repository on the hub.
            load_as: Name for the adapter and its head; None keeps the saved names.
            with_head: Load the head too, converted where it was saved by a static class.
            set_active: Activate both.
            overwrite_ok: Replace an adapter or a head of that name.
            id2label: Label names for the head, instead of the saved ones.
            revision: Branch, tag or commit on the hub.
            upstream: For transformers' own method of this name; such a call is passed on.

        Returns:
            The adapter's name.

        Raises:
            CheckpointError: If the files cannot be read, or do not fit this model.
            ConfigError: If a name is taken.
            UnknownNameError: If a type of head or adapter is not installed.
            UnsupportedError: If transformers' own method is meant, and there are adapters.
        """
        if upstream or adapter_name_or_path is None or self._is_language(adapter_name_or_path):
            return self._load_upstream(adapter_name_or_path, revision, upstream)
        bundle = self._read(adapter_name_or_path, revision, with_head)
        if bundle.adapter is None:
            raise CheckpointError(f"{bundle.source} holds no adapter; see load_head().")
        name = bundle.adapter.name if load_as is None else load_as
        self._refuse_taken("adapter", name, overwrite_ok)
        with reading(bundle.source), to_be_filled():
            config = load_config(bundle.adapter.config, tolerant=True)
            adapter = self._build_adapter(name, config)
            fill(adapter, bundle.adapter.tensors, f"{bundle.source}: adapter {name!r}")
        head = load_as if load_as is not None or not _is_static(bundle) else name
        heads = self._prepare_head(bundle, head, id2label, overwrite_ok) if with_head else None
        self._install(adapter)
        self._install_prepared(heads)
        if set_active:
            self.set_active_adapters(name)
        return name

    # --- what the classes with heads fill in --------------------------------------------------

    def _saved_head(self, name: str) -> SavedHead | SavedStaticHead | None:
        """The head that is saved with an adapter."""
        return None

    def _prepare_head(
        self,
        bundle: Bundle,
        name: str | None,
        id2label: Mapping[int, str] | None,
        overwrite_ok: bool,
    ) -> Any:
        """Builds a loaded head aside; nothing of the model is changed yet."""
        if bundle.head is not None:
            logger.info("%s has no place for a head; it is left out.", type(self).__name__)
        return None

    def _install_prepared(self, prepared: Any) -> None:
        """Puts what `_prepare_head` has built into the model."""

    def _load_upstream(self, path: Any, revision: str | None, upstream: dict[str, Any]) -> str:
        """Passes a call on to transformers' own ``load_adapter``."""
        theirs = super().load_adapter  # type: ignore[misc]
        first = next(iter(inspect.signature(theirs).parameters))
        if first == "peft_model_id":
            self._refuse_peft()
        given = {first: path, "revision": revision}
        upstream |= {key: value for key, value in given.items() if value is not None}
        return str(theirs(**upstream))

    def _is_language(self, path: str | Path) -> bool:
        """Whether a call is for a class whose own ``load_adapter`` takes a language.

        Such a class has small layers for each language, which its configuration gives a size.
        """
        if getattr(self.config, "adapter_attn_dim", None) is None:
            return False
        names = inspect.signature(super().load_adapter).parameters  # type: ignore[misc]
        named = isinstance(path, str) and "/" not in path and not Path(path).is_dir()
        return "target_lang" in names and named

    # --- helpers ------------------------------------------------------------------------------

    def _read(
        self, source: str | Path, revision: str | None = None, with_head: bool = True
    ) -> Bundle:
        """What a directory or a repository holds, for this model."""
        with reading(source):
            return read_bundle(source, self._layout(), revision, with_head=with_head)

    def _write_head(
        self, head: SavedHead | SavedStaticHead, save_directory: str | Path, format: str
    ) -> None:
        """Saves a head alone."""
        bundle = Bundle(head=head, head_from=self._head_provenance(head))
        write_bundle(bundle, save_directory, self._layout(), format)

    def _layout(self) -> Layout:
        """What files must know of this model, found out once."""
        attachment = self._attachment
        if self._known_layout is None or self._known_layout[0] is not attachment:
            self._known_layout = attachment, self._new_layout()
        return self._known_layout[1]

    def _new_layout(self) -> Layout:
        attachment = self._attachment
        backbone = attachment.backbone
        return Layout(
            architecture=attachment.spec.name,
            model_types=_related(backbone.config.model_type),
            hidden_size=getattr(backbone.config, "hidden_size", None),
            prefix=self._backbone_name(),
            paths=attachment.paths(),
            renamed=attachment.renamed(),
            interleaved=any(
                block.groups is not None
                for layers in attachment.spec.layers
                for block in layers.fused.values()
            ),
            pooler=attachment.spec.pooler,
            prefixes=(str(backbone.base_model_prefix), *attachment.spec.prefixes),
        )

    def _backbone_name(self) -> str:
        """The name under which the backbone hangs in this model, or would in one with a head."""
        backbone = self._attachment.backbone
        # In files the name of a tower is a part of its paths; some releases hold it under that.
        inside = {first(layers.path).partition(".")[0] for layers in self._attachment.spec.layers}
        named = (name for name, child in self.named_children() if child is backbone)
        return str(next((n for n in named if n not in inside), backbone.base_model_prefix))

    def _embeddings(self) -> Tensor | None:
        """The weight of the token embeddings, or None for a model that reads something else."""
        module = input_embeddings(self._attachment.backbone)
        return module.weight if isinstance(module, nn.Embedding) else None

    def _head_provenance(self, head: SavedHead | SavedStaticHead | None) -> Provenance:
        kind = head.config["head_type"] if isinstance(head, SavedHead) else None
        return self._provenance(registry().head_types.get(kind) if kind else None)

    def _provenance(self, spec: Spec | None) -> Provenance:
        config = self._attachment.backbone.config
        return Provenance(
            model_type=config.model_type,
            model_class=type(self).__name__,
            model_name=config.name_or_path or None,
            hidden_size=getattr(config, "hidden_size", None),
            version=f"flexheads.{library_version()}",
            provider=None if spec is None else registry().provider_of(spec).requirement,
        )


@contextmanager
def reading(source: str | Path | None) -> Iterator[None]:
    """Says of whatever goes wrong inside that it is about the files in `source`.

    Files come from anywhere, so any value in them may be of another kind than expected. Types that
    are not installed, and what this model does not support, are no damage.

    Raises:
        CheckpointError: In place of what the damage has led to.
    """
    try:
        yield
    except FlexheadsError as error:
        inside = isinstance(error, UnknownNameError) and error.kind in ("adapter", "head")
        if str(source) in str(error) or not (inside or isinstance(error, _ABOUT_FILES)):
            raise
        raise CheckpointError(f"{source}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{source}: the files are damaged, or of a kind that is unknown here: "
            f"{type(error).__name__}: {error}"
        ) from error


@functools.cache
def library_version() -> str:
    """The installed version of flexheads."""
    try:
        return version("flexheads")
    except PackageNotFoundError:
        return "0"


def _related(model_type: str) -> tuple[str, ...]:
    """Model types whose heads can become heads of one of this type, itself first."""
    pairs = [
        (conversion.model_type, own)
        for conversion in registry().conversions.values()
        if conversion.model_type is not None
        for own in registry().architecture(conversion.architecture).model_types
    ]
    both = [*pairs, *((own, static) for static, own in pairs)]
    return (model_type, *dict.fromkeys(other for one, other in both if one == model_type))


def _is_static(bundle: Bundle) -> bool:
    return isinstance(bundle.head, SavedStaticHead)
