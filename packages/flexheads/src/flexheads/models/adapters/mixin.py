"""Adapters on any transformers model: adding, activating, training, merging, deleting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexheads.composition import Block, Fuse, Setup, parse_composition
from flexheads.errors import ConfigError, FlexheadsError, UnknownNameError, UnsupportedError
from flexheads.methods.base import Adapter, AddressedModules, is_shared
from flexheads.methods.config import AdapterConfig, load_config
from flexheads.methods.fusion import AdapterFusion
from flexheads.models.adapters.compiling import CompilingMixin
from flexheads.models.adapters.merging import MergingMixin
from flexheads.models.adapters.summary import AdapterSummary, summarise
from flexheads.models.calls.any_rows import plan_for_rows
from flexheads.models.calls.task_ids import at_rows, by_first_row, with_task_ids
from flexheads.models.container import NamedModules, all_parameters
from flexheads.plan import HeadRoute, Plan
from flexheads.plugins import registry, resolve
from flexheads.routing import route
from flexheads.sites.attach import Attachment
from flexheads.sites.base import place
from flexheads.sites.plan_cache import PlanCache
from flexheads.sites.runtime import plan_checkpoints
from flexheads.specs import ArchitectureSpec


class AdapterModelMixin(CompilingMixin, MergingMixin):
    """Named adapters on a transformers model.

    Attributes:
        adapters: The adapters by name, each one module with all its parameters.
        adapter_fusions: The AdapterFusions by name, likewise.
    """

    adapter_fusions: NamedModules[AdapterFusion]

    def _attach(self, spec: ArchitectureSpec, backbone: PreTrainedModel) -> None:
        """Gives the model its adapter support."""
        self._attachment = Attachment(self, backbone, spec)  # type: ignore[arg-type]
        self.adapters = NamedModules("adapter")
        self.adapter_fusions = NamedModules("adapter fusion")
        for container in (self.adapters, self.adapter_fusions):
            container.train(self.training)
        self._merged = {}
        self._changed()

    # --- adapters ---------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: str | Mapping[str, Any] | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
        **upstream: Any,
    ) -> None:
        """Adds a new adapter.

        Args:
            adapter_name: Its name; any string.
            config: Its configuration; see `flexheads.methods.load_config`. None is ``"seq_bn"``.
            overwrite_ok: Replace an adapter of that name.
            set_active: Activate it, and the head of that name if there is one.
            upstream: For transformers' own method of this name, which takes a PEFT configuration
                first; such a call is passed on.

        Raises:
            ConfigError: If the name is taken, or the configuration does not fit the model.
            UnsupportedError: If the model cannot carry the method.
        """
        if hasattr(adapter_name, "peft_type") or upstream:
            self._refuse_peft()
            first = () if upstream else (adapter_name, *filter(None, [config]))
            named = {"adapter_name": adapter_name, **upstream} if upstream else {}
            super().add_adapter(*first, **named)  # type: ignore[misc]
            return
        self._refuse_taken("adapter", adapter_name, overwrite_ok)
        self._install(self._build_adapter(adapter_name, load_config(config)))
        if set_active:
            self.set_active_adapters(adapter_name)

    def _refuse_peft(self) -> None:
        """Keeps PEFT, which picks modules by how their names end, from picking those of adapters.

        Raises:
            UnsupportedError: If there are any.
        """
        if self.adapters:
            raise UnsupportedError(
                "PEFT picks modules by how their names end, so it may change the adapters "
                f"{list(self.adapters)}. Add those of PEFT first, and these afterwards."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; where it was active, no adapter is.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        if adapter_name not in self.adapters and adapter_name in getattr(self, "peft_config", ()):
            super().delete_adapter(adapter_name)  # type: ignore[misc]
            return
        if adapter_name not in self.adapters:
            raise UnknownNameError("adapter", adapter_name, self.adapters)
        if adapter_name in self._merged:
            self.reset_adapter()
        setup = self.active_adapters
        keep = None if setup is not None and adapter_name in setup.names() else setup
        heads = self._attachment.runtime.active.heads
        self.adapters.drop(adapter_name)
        self._sync(self.adapters.values())
        self._changed()
        self._activate(keep, heads if keep is setup else self._heads_for(keep, heads))

    def get_adapter(self, adapter_name: str) -> Adapter:
        """The adapter's module.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        return self.adapters[adapter_name]

    def has_adapters(self) -> bool:
        """Whether the model has any adapter."""
        return bool(self.adapters)

    def adapter_to(
        self,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Moves an adapter to a device or dtype.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        self.adapters[name].to(device=device, dtype=dtype)

    def adapter_summary(self, as_dict: bool = False) -> AdapterSummary | list[dict[str, Any]]:
        """A table of the adapters: method, parameters, share of the model, active, trainable.

        Args:
            as_dict: Give the rows as plain data instead.
        """
        summary = summarise(self)
        return summary.rows if as_dict else summary

    def _build_adapter(self, name: str, config: AdapterConfig) -> Adapter:
        """A new adapter that is not in the model yet, where and how its layers are."""
        method_class = resolve(registry().method_for_tag(config.tag).method)
        method = method_class(config)
        sites = self._attachment.sites
        parts = method.build(sites, self._attachment.backbone.config)
        if not parts:
            raise ConfigError(f"The configuration of adapter {name!r} adapts nothing: {config!r}.")
        for address, part in parts.items():
            backbone = self._attachment.backbone
            place(part, backbone if is_shared(address) else sites[address].host, backbone)
            if dtype := getattr(part, "own_dtype", None) or getattr(config, "dtype", None):
                part.to(dtype=getattr(torch, dtype))
        return Adapter(name, config, method, parts).train(self.training)

    def _refuse_taken(self, kind: str, name: str, overwrite_ok: bool) -> None:
        if not isinstance(name, str):
            raise ConfigError(f"The name of the {kind} should be a string, not {name!r}.")
        if name in getattr(self, f"{kind}s") and not overwrite_ok:
            raise ConfigError(
                f"There is already one {kind.replace('_', ' ')} named {name!r}. Pass "
                "overwrite_ok=True to replace it, or choose another name (load_as= when loading)."
            )

    def _install(self, adapter: Adapter) -> None:
        """Puts an adapter into the model, in place of one of its name."""
        if adapter.name in self._merged:
            self.reset_adapter()
        others = [a for name, a in self.adapters.items() if name != adapter.name]
        self._sync([*others, adapter])
        self.adapters.put(adapter.name, adapter)
        self._changed()

    def _sync(self, adapters: Iterable[Adapter], *fusions: AdapterFusion) -> None:
        """Registers the hooks that these rely on, with the fusions in the model, and no others."""
        modules: list[AddressedModules] = [*adapters, *self.adapter_fusions.values(), *fusions]
        for module in modules:
            if module.hooks is None:
                module.hooks = self._attachment.hooks_for(module.parts)
        self._attachment.sync(module.hooks for module in modules if module.hooks is not None)

    def _changed(self) -> None:
        """Brings what is derived from adapters and heads up to date."""
        config = self._attachment.backbone.config
        config.adapters = {name: a.described() for name, a in self.adapters.items()}
        runtime = self._attachment.runtime
        runtime.plans = PlanCache()
        active = runtime.active
        try:
            runtime.active = self._make_plan(active.setup, active.heads, active.skip_layers)
        except UnknownNameError:
            # Something that was active is being deleted; the caller decides what holds next.
            runtime.active = Plan()

    # --- what is active ---------------------------------------------------------------------

    @property
    def active_adapters(self) -> Block | None:
        """The active setup, or None; assigning is `set_active_adapters`."""
        return self._attachment.runtime.active.setup

    @active_adapters.setter
    def active_adapters(self, setup: Setup) -> None:
        self.set_active_adapters(setup)

    def set_active_adapters(self, setup: Setup, skip_layers: Sequence[int] | None = None) -> None:
        """Activates adapters, and the head of the same name where there is one.

        Nothing is trained or frozen by this.

        Args:
            setup: A name, a list of names (a Stack), a block, or None for no adapter.
            skip_layers: Numbers of layers in which no adapter acts (AdapterDrop,
                arXiv:2010.11918).

        Raises:
            UnknownNameError: If an adapter does not exist; nothing is changed then.
            CompositionError: If the setup has no meaning.
        """
        block = parse_composition(setup)
        skip = tuple(skip_layers or ())
        if wrong := [layer for layer in skip if not 0 <= layer < self._attachment.depth]:
            raise ConfigError(
                f"skip_layers names layers {wrong}, but the model has {self._attachment.depth}."
            )
        heads = self._heads_for(block, self._attachment.runtime.active.heads)
        self._activate(block, heads, skip)

    def _activate(
        self,
        setup: Block | None,
        heads: tuple[HeadRoute, ...],
        skip_layers: tuple[int, ...] | None = None,
    ) -> None:
        """Makes a setup the active one; None keeps the layers that are skipped."""
        runtime = self._attachment.runtime
        skip = runtime.active.skip_layers if skip_layers is None else skip_layers
        if self._attachment.repeater.skip(skip):
            self._sync(self.adapters.values())
        runtime.active = self._make_plan(setup, heads, skip)

    def _heads_for(
        self, block: Block | None, current: tuple[HeadRoute, ...]
    ) -> tuple[HeadRoute, ...]:
        """The heads that a setup brings along; models with static heads have none to choose."""
        return current

    def _heads_named(self, head: str | Sequence[str]) -> tuple[HeadRoute, ...]:
        """The heads of these names.

        Raises:
            UnsupportedError: If the model has no heads with names.
        """
        raise UnsupportedError(
            f"A {type(self).__name__} has one head, its own, so head={head!r} cannot be chosen."
        )

    def _make_plan(
        self,
        block: Block | None,
        heads: tuple[HeadRoute, ...],
        skip_layers: tuple[int, ...] = (),
    ) -> Plan:
        plans = self._attachment.runtime.plans
        names = () if block is None else block.names()
        if unknown := [name for name in names if name not in self.adapters]:
            raise UnknownNameError("adapter", unknown[0], self.adapters, "Add or load it first.")
        routing = route(block)
        if routing.index is None or routing.repeat > 1 or torch.compiler.is_compiling():
            return self._new_plan(block, heads, skip_layers)
        assert block is not None
        plan = plan_for_rows(
            plans,
            block,
            routing,
            skip_layers,
            lambda name: None if name in self._merged else repr(self.adapters[name].config),
            lambda own: self._new_plan(own, (), skip_layers),
        )
        own = dataclasses.replace(plan, setup=block, heads=by_first_row(heads, routing))
        return at_rows(own, routing)

    def _new_plan(
        self, block: Block | None, heads: tuple[HeadRoute, ...], skip_layers: tuple[int, ...]
    ) -> Plan:
        names = () if block is None else block.names()
        parts = {n: {} if n in self._merged else self.adapters[n].parts for n in names}
        fuses = [b.name for b in (block.blocks() if block else ()) if isinstance(b, Fuse)]
        fusions = {name: self.adapter_fusions[name].parts for name in fuses}
        return self._attachment.plan(block, parts, heads, fusions, skip_layers)

    def _plan_of_call(self, adapter_names: Setup, head: Any = None, task_ids: Any = None) -> Plan:
        """The plan of one call, with the rows of a `MultiTask`."""
        return with_task_ids(self._call_plan(adapter_names, head), task_ids)

    def _call_plan(self, adapter_names: Setup, head: Any = None) -> Plan:
        """The plan of one call; None means what is active, an empty list no adapter."""
        runtime = self._attachment.runtime
        active = runtime.chosen()  # read once: another thread may set it meanwhile
        if adapter_names is None and head is None:
            return active
        block = active.setup if adapter_names is None else parse_composition(adapter_names)
        skip = active.skip_layers if adapter_names is None else ()
        if torch.compiler.is_compiling():  # what is built while tracing must not outlive it
            heads = self._call_heads(block, adapter_names, head, active.heads)
            return self._make_plan(block, heads, skip)
        key = (block, tuple(head) if isinstance(head, list) else head, active.heads, skip)
        plans = runtime.plans
        plan = plans.get(key)
        if plan is None:
            heads = self._call_heads(block, adapter_names, head, active.heads)
            plan = plans.keep(key, self._make_plan(block, heads, skip))
        return plan

    def _kept_plan(
        self, block: Block | None, heads: tuple[HeadRoute, ...], skip: tuple[int, ...]
    ) -> Plan:
        """The plan of a setup with heads of its own; one that is kept, where there is one."""
        plans, key = self._attachment.runtime.plans, ("chosen", block, heads, skip)
        if torch.compiler.is_compiling():
            return self._make_plan(block, heads, skip)
        return plans.get(key) or plans.keep(key, self._make_plan(block, heads, skip))

    def _call_heads(
        self, block: Block | None, adapter_names: Setup, head: Any, current: tuple[HeadRoute, ...]
    ) -> tuple[HeadRoute, ...]:
        return current

    def _enter(self, plan: Plan) -> Any:
        """The context of one call."""
        attachment = self._attachment
        if attachment.runtime.version < 0:  # read so that compiled code is traced anew, see Runtime
            raise FlexheadsError("The hooks of this model are in an impossible state.")
        if self.training:
            plan_checkpoints(attachment.checkpointed, attachment.runtime)
        return attachment.runtime.scope(plan)

    # --- training ---------------------------------------------------------------------------

    def freeze_model(self, freeze: bool = True) -> None:
        """Freezes (or unfreezes) the backbone; adapters and heads stay as they are."""
        for parameter in self._backbone_parameters():
            parameter.requires_grad_(not freeze)

    def _backbone_parameters(self) -> list[nn.Parameter]:
        """The backbone's; where the model is its own, adapters and a head may hang in it."""
        backbone = self._attachment.backbone
        parts: list[nn.Module] = [backbone]
        if backbone is self:
            parts = [backbone.get_submodule(name) for name in self._attachment.own_children()]
        return list(dict.fromkeys(p for part in parts for p in part.parameters()))

    def train_adapter(self, setup: Setup) -> None:
        """Makes exactly these adapters and their heads trainable, and activates them.

        The heads are those of the adapters' names; where there is none, the active head.

        Args:
            setup: The adapters, as for `set_active_adapters`.

        Raises:
            UnknownNameError: If an adapter does not exist; nothing is changed then.
            UnsupportedError: If one of them is merged.
        """
        block = parse_composition(setup)
        if merged := [n for n in (block.names() if block else ()) if n in self._merged]:
            raise UnsupportedError(f"{merged} are merged; call reset_adapter() before training.")
        self.set_active_adapters(block)
        for parameter in filter(attrgetter("requires_grad"), all_parameters(self)):
            parameter.requires_grad_(False)
        trained = [self.adapters[name] for name in (block.names() if block else ())]
        for module in [*trained, *self._active_head_modules()]:
            module.requires_grad_(True)
        self.freeze_model()  # a static head can be tied to the embeddings

    def _active_head_modules(self) -> list[nn.Module]:
        """The heads that belong to the active setup."""
        return []
