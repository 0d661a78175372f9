"""Named heads on a model: adding, activating, deleting, saving and loading them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flexheads.checkpoints.bundle import Bundle, SavedHead, SavedStaticHead
from flexheads.checkpoints.transfer import fill
from flexheads.composition import Block, Rows, Setup
from flexheads.conversion.to_flex import convert_to_flexible, untie
from flexheads.errors import CheckpointError, ConfigError, UnknownNameError, UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import HeadConfig, PooledConfig, label_names
from flexheads.heads.custom import class_of
from flexheads.models.calls.tasks import routes_of_rows
from flexheads.models.container import NamedModules
from flexheads.models.heads.label_names import HeadLabelsMixin, with_names
from flexheads.models.saving.files import reading
from flexheads.plan import HeadRoute
from flexheads.plugins import registry
from flexheads.routing import route, step_name
from flexheads.sites.base import place


class HeadsMixin(HeadLabelsMixin):
    """Named prediction heads of any installed type.

    Attributes:
        heads: The heads by name.
    """

    heads: NamedModules[PredictionHead]

    # --- adding and deleting ------------------------------------------------------------------

    def add_head(
        self,
        head_name: str,
        head_type: str,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **config: Any,
    ) -> None:
        """Adds a head of any installed type.

        Args:
            head_name: Its name; any string.
            head_type: Its type, as in `flexheads.plugins.Registry.head_types`.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.
            config: The fields of the type's configuration. Labels can be named by ``id2label`` or
                ``label2id``, and need not be counted then.

        Raises:
            ConfigError: If the name is taken, or the configuration has no such field or value.
            LabelError: If names of labels contradict each other or the number of labels.
            UnknownNameError: If no such type is installed.
            UnsupportedError: If the model lacks what the head would read.
        """
        self._refuse_taken("head", head_name, overwrite_ok)
        self._add_built(self._build_head(head_name, head_type, config), set_active)

    def delete_head(self, head_name: str) -> None:
        """Removes a head; where it was active it is no more, and others that were stay.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        if head_name not in self.heads:
            raise UnknownNameError("head", head_name, self.heads)
        runtime = self._attachment.runtime
        setup = runtime.active.setup
        left = tuple(route for route in runtime.active.heads if route.head != head_name)
        self.heads.drop(head_name)
        self._activate(setup, left)
        self._changed()

    def _build_head(
        self,
        name: str,
        head_type: str,
        config: Mapping[str, Any],
        provider: str | None = None,
        tolerant: bool = False,
    ) -> PredictionHead:
        """A new head that is not in the model yet, placed where the backbone ends."""
        head_class = class_of(head_type, provider)
        head_class.check_architecture(self._attachment.spec)
        backbone = self._attachment.backbone
        kind = head_class.config_class
        fields = kind.from_dict(with_names(kind, config), tolerant=tolerant)
        self._check_pooler(name, fields)
        return self._placed(head_class(name, fields, backbone.config))

    def _placed(self, head: PredictionHead) -> PredictionHead:
        """A head on the device, in the dtype and in the mode of the model."""
        place(head, self._attachment.backbone, which=-1)
        return head.train(self.training)

    def _add_built(self, head: PredictionHead, set_active: bool) -> None:
        self._install_head(head)
        if set_active:
            self.active_head = head.name

    def _check_pooler(self, name: str, config: HeadConfig) -> None:
        """Refuses a head that reads the trained pooler where that is not, or reads another layer.

        Raises:
            UnsupportedError: If so.
        """
        spec, backbone = self._attachment.spec, self._attachment.backbone
        if not isinstance(config, PooledConfig) or config.pooled_by not in ("pooler", None):
            return
        if (config.pooled_by or spec.pooling) != "pooler" or config.get("late"):
            return
        if not spec.pooler or getattr(backbone, "pooler", backbone) is None:
            raise UnsupportedError(
                f"Head {name!r} reads the trained pooler, and this {type(backbone).__name__} has "
                "none. Add the head with use_pooler=False, or with another pooling."
            )
        if config.hidden_layer is not None:
            raise UnsupportedError(
                f"Head {name!r} reads hidden_layer={config.hidden_layer!r}, but the trained pooler "
                'reads the last layer. Choose another pooling, such as "mean" or "first_token".'
            )

    def _install_head(self, head: PredictionHead) -> None:
        self.heads.put(head.name, head)
        head._owner = weakref.ref(self)
        self._changed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled models take the heads that came with them for their own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for head in self.heads.values():
            if head._owner is None:
                head._owner = weakref.ref(self)

    def _changed(self) -> None:
        super()._changed()
        config = self._attachment.backbone.config
        config.prediction_heads = {name: head.to_dict() for name, head in self.heads.items()}
        self._show_labels()

    # --- what is active -----------------------------------------------------------------------

    @property
    def active_head(self) -> str | list[str] | None:
        """The active head, a list of several, or None; assigning activates."""
        names = [route.head for route in self._attachment.runtime.active.heads]
        return names or None if len(names) != 1 else names[0]

    @active_head.setter
    def active_head(self, head: str | Sequence[str] | None) -> None:
        """Activates heads; each sees every row.

        Raises:
            UnknownNameError: If one does not exist; nothing is changed then.
        """
        runtime = self._attachment.runtime
        self._activate(runtime.active.setup, self._heads_named(head))

    def _activate(
        self,
        setup: Block | None,
        heads: tuple[HeadRoute, ...],
        skip_layers: tuple[int, ...] | None = None,
    ) -> None:
        super()._activate(setup, heads, skip_layers)
        self._show_labels()

    def _heads_named(self, head: str | Sequence[str] | None) -> tuple[HeadRoute, ...]:
        if not isinstance(head, str | list | tuple | None):
            raise ConfigError(f"A head is given by its name or a list of names, not by {head!r}.")
        names = [] if head is None else [head] if isinstance(head, str) else list(head)
        for name in names:
            if name not in self.heads:
                raise UnknownNameError("head", name, self.heads)
        return tuple(HeadRoute(name) for name in names)

    def _heads_for(
        self, block: Block | None, current: tuple[HeadRoute, ...]
    ) -> tuple[HeadRoute, ...]:
        """The heads of the adapters' names; those that are active where there are none."""
        for name in () if block is None else block.names():
            self.get_adapter(name)
        everywhere = tuple(r for r in current if r.chain is None)
        if not self.heads:
            return everywhere
        routing = route(block)
        ends = {number: chain[-1] for number, chain in enumerate(routing.chains) if chain}
        named = {number: step_name(step) for number, step in ends.items()}
        found = {number: name for number, name in named.items() if name in self.heads}
        if not found:
            return everywhere
        if len(found) < len(named):
            missing = next(name for name in named.values() if name not in self.heads)
            raise UnknownNameError(
                "head", missing, self.heads, "Every branch needs one, or none of them has one."
            )
        if routing.single:
            return (HeadRoute(found[0]),)
        return tuple(HeadRoute(name, number) for number, name in found.items())

    def _make_plan(
        self,
        block: Block | None,
        heads: tuple[HeadRoute, ...],
        skip_layers: tuple[int, ...] = (),
    ) -> Any:
        for head in heads:
            if head.head not in self.heads:
                raise UnknownNameError("head", head.head, self.heads)
        return super()._make_plan(block, heads, skip_layers)

    def _call_heads(
        self, block: Block | None, adapter_names: Setup, head: Any, current: tuple[HeadRoute, ...]
    ) -> tuple[HeadRoute, ...]:
        if isinstance(head, Rows):
            return routes_of_rows(head, self.heads.keys(), route(block))
        if head is not None:
            return self._heads_named(head)
        if adapter_names is not None and not route(block).single:
            return self._heads_for(block, current)
        return tuple(r for r in current if r.chain is None)

    def _active_head_modules(self) -> list[nn.Module]:
        return [self.heads[r.head] for r in self._attachment.runtime.active.heads]

    # --- files --------------------------------------------------------------------------------

    def save_head(
        self, save_directory: str | Path, head_name: str | None = None, format: str = "adapterhub"
    ) -> None:
        """Saves a head alone.

        Args:
            save_directory: The directory; it is made where it does not exist.
            head_name: The head; None is the active one.
            format: The layout of files.

        Raises:
            UnknownNameError: If there is no such head.
            CheckpointError: If the directory cannot be used.
        """
        name = self.active_head if head_name is None else head_name
        head = self._saved_head(name) if isinstance(name, str) else None
        if head is None:
            raise UnknownNameError("head", name, self.heads)
        self._write_head(head, save_directory, format)

    def load_head(
        self,
        save_directory: str | Path,
        load_as: str | None = None,
        id2label: Mapping[int, str] | None = None,
        overwrite_ok: bool = False,
        set_active: bool = True,
        revision: str | None = None,
    ) -> str:
        """Loads a head alone, converted where it was saved by a static class.

        Args:
            save_directory: A directory, or the id of a repository on the hub.
            load_as: Name for the head; a static head has none of its own.
            id2label: Label names instead of the saved ones.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.
            revision: Branch, tag or commit on the hub.

        Returns:
            The head's name.

        Raises:
            CheckpointError: If the files cannot be read, or do not fit this model.
            ConfigError: If the name is taken.
        """
        bundle = self._read(save_directory, revision)
        if bundle.head is None:
            raise CheckpointError(f"{bundle.source} holds no head.")
        heads = self._prepare_head(bundle, load_as, id2label, overwrite_ok)
        self._install_prepared(heads)
        if set_active:
            self.active_head = heads[0].name
        return str(heads[0].name)

    def _saved_head(self, name: str) -> SavedHead | None:
        if name not in self.heads:
            return None
        head = self.heads[name]
        embeddings = self._embeddings() if getattr(head.config, "tied", False) else None
        return SavedHead(
            name=name, config=head.to_dict(), tensors=head.state_dict(), embeddings=embeddings
        )

    def _prepare_head(
        self,
        bundle: Bundle,
        name: str | None,
        id2label: Mapping[int, str] | None,
        overwrite_ok: bool,
    ) -> list[PredictionHead]:
        saved = bundle.head
        if saved is None:
            return []
        with reading(bundle.source):
            if isinstance(saved, SavedStaticHead):
                flexible = self._converted(saved, bundle, name, id2label)
            else:
                by = bundle.head_from.provider
                config, tensors = untie(saved.config, saved.tensors, self._embeddings(), by)
                own = saved.name if name is None else name
                flexible = [SavedHead(name=own, config=config, tensors=tensors)]
        for head in flexible:
            self._refuse_taken("head", head.name, overwrite_ok)
        with reading(bundle.source):
            return [self._rebuilt(head, bundle, id2label) for head in flexible]

    def _rebuilt(
        self, head: SavedHead, bundle: Bundle, id2label: Mapping[int, str] | None
    ) -> PredictionHead:
        config = {key: value for key, value in head.config.items() if key != "head_type"}
        if id2label is not None:
            config = {k: v for k, v in config.items() if k != "label2id"} | {"id2label": id2label}
        built = self._build_head(
            head.name, head.config["head_type"], config, bundle.head_from.provider, True
        )
        fill(built, head.tensors, f"{bundle.source}: head {head.name!r}")
        return built

    def _converted(
        self,
        saved: SavedStaticHead,
        bundle: Bundle,
        name: str | None,
        id2label: Mapping[int, str] | None,
    ) -> list[SavedHead]:
        if name is None:
            raise CheckpointError(
                f"{bundle.source} holds the head of a {saved.model_class}, which has no name; "
                "pass load_as=."
            )
        conversion = registry().conversion(saved.model_class)
        if conversion.architecture != self._attachment.spec.name:
            raise CheckpointError(
                f"{bundle.source} holds the head of a {saved.model_class}, which belongs to "
                f"{conversion.architecture!r}; this model is {self._attachment.spec.name!r}."
            )
        if id2label is not None:
            labels = label_names(None, id2label)["label2id"]
            saved = SavedStaticHead(
                model_class=saved.model_class,
                tensors=saved.tensors,
                label2id=labels,
                problem_type=saved.problem_type,
            )
        backbone = self._attachment.backbone
        return convert_to_flexible(saved, conversion, name, backbone.config, self._embeddings())

    def _install_prepared(self, prepared: list[PredictionHead] | None) -> None:
        for head in prepared or ():
            self._install_head(head)
