"""Adapters on any transformers model: adding, activating, training, merging, deleting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexheads.composition import Block, Setup, parse_composition
from flexheads.errors import ConfigError, FlexheadsError, UnknownNameError, UnsupportedError
from flexheads.methods.base import Adapter, is_shared
from flexheads.methods.config import AdapterConfig, load_config
from flexheads.models.base import TransformersModel
from flexheads.models.container import NamedModules
from flexheads.plan import HeadRoute, Plan
from flexheads.plugins import registry, resolve
from flexheads.sites.attach import Attachment
from flexheads.sites.base import place
from flexheads.sites.linear import AttachedLinear, Projection
from flexheads.sites.runtime import plan_checkpoints
from flexheads.specs import ArchitectureSpec

_PLANS_KEPT = 256

_Original = tuple[Projection, Tensor, Tensor | None]
"""A projection, and the weight and bias that it had before merging."""


class AdapterModelMixin(TransformersModel):
    """Named adapters on a transformers model.

    Attributes:
        adapters: The adapters by name, each one module with all its parameters.
    """

    adapters: NamedModules[Adapter]
    _attachment: Attachment
    _merged: dict[str, list[_Original]]

    def _attach(self, spec: ArchitectureSpec, backbone: PreTrainedModel) -> None:
        """Gives the model its adapter support."""
        self._attachment = Attachment(self, backbone, spec)  # type: ignore[arg-type]
        self.adapters = NamedModules("adapter")
        self.adapters.train(self.training)
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
        self._attachment.sync(a.parts for a in self.adapters.values())
        self._changed()
        heads = heads if keep is setup else self._heads_for(keep, heads)
        self._attachment.runtime.active = self._make_plan(keep, heads)

    def get_adapter(self, adapter_name: str) -> Adapter:
        """The adapter's module.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        return self.adapters[adapter_name]

    def _build_adapter(self, name: str, config: AdapterConfig) -> Adapter:
        """A new adapter that is not in the model yet, where and how its layers are."""
        method_class = resolve(registry().method_for_tag(config.tag).method)
        method = method_class(config)
        sites = self._attachment.sites
        parts = method.build(sites, self._attachment.backbone.config)
        if not parts:
            raise ConfigError(f"The configuration of adapter {name!r} adapts nothing: {config!r}.")
        for address, part in parts.items():
            place(part, self._attachment.backbone if is_shared(address) else sites[address].host)
        return Adapter(name, config, method, parts).train(self.training)

    def _refuse_taken(self, kind: str, name: str, overwrite_ok: bool) -> None:
        if not isinstance(name, str):
            raise ConfigError(f"The name of the {kind} should be a string, not {name!r}.")
        if name in getattr(self, f"{kind}s") and not overwrite_ok:
            raise ConfigError(
                f"There is already one {kind} named {name!r}. Pass overwrite_ok=True to replace "
                "it, or choose another name (load_as= when loading)."
            )

    def _install(self, adapter: Adapter) -> None:
        """Puts an adapter into the model, in place of one of its name."""
        if adapter.name in self._merged:
            self.reset_adapter()
        others = [a.parts for name, a in self.adapters.items() if name != adapter.name]
        self._attachment.sync([*others, adapter.parts])
        self.adapters.put(adapter.name, adapter)
        self._changed()

    def _changed(self) -> None:
        """Brings what is derived from adapters and heads up to date."""
        config = self._attachment.backbone.config
        config.adapters = {name: a.config.to_dict() for name, a in self.adapters.items()}
        runtime = self._attachment.runtime
        runtime.plans.clear()
        active = runtime.active
        try:
            runtime.active = self._make_plan(active.setup, active.heads)
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

    def set_active_adapters(self, setup: Setup) -> None:
        """Activates adapters, and the head of the same name where there is one.

        Nothing is trained or frozen by this.

        Args:
            setup: A name, a list of names (a Stack), a block, or None for no adapter.

        Raises:
            UnknownNameError: If an adapter does not exist; nothing is changed then.
            CompositionError: If the setup has no meaning.
        """
        block = parse_composition(setup)
        self._activate(block, self._heads_for(block, self._attachment.runtime.active.heads))

    def _activate(self, setup: Block | None, heads: tuple[HeadRoute, ...]) -> None:
        self._attachment.runtime.active = self._make_plan(setup, heads)

    def _heads_for(
        self, block: Block | None, current: tuple[HeadRoute, ...]
    ) -> tuple[HeadRoute, ...]:
        """The heads that a setup brings along; models with static heads have none to choose."""
        return current

    def _make_plan(self, block: Block | None, heads: tuple[HeadRoute, ...]) -> Plan:
        names = () if block is None else block.names()
        if unknown := [name for name in names if name not in self.adapters]:
            raise UnknownNameError("adapter", unknown[0], self.adapters, "Add or load it first.")
        parts = {n: {} if n in self._merged else self.adapters[n].parts for n in names}
        return self._attachment.plan(block, parts, heads)

    def _call_plan(self, adapter_names: Setup, head: Any = None) -> Plan:
        """The plan of one call; None means what is active, an empty list no adapter."""
        runtime = self._attachment.runtime
        active = runtime.active  # read once: another thread may set it meanwhile
        if adapter_names is None and head is None:
            return active
        block = active.setup if adapter_names is None else parse_composition(adapter_names)
        if torch.compiler.is_compiling():  # what is built while tracing must not outlive it
            return self._make_plan(block, self._call_heads(block, adapter_names, head))
        key = (block, tuple(head) if isinstance(head, list) else head, active.heads)
        plan = runtime.plans.get(key)
        if plan is None:
            plan = self._make_plan(block, self._call_heads(block, adapter_names, head))
            if len(runtime.plans) >= _PLANS_KEPT:
                runtime.plans.clear()
            if runtime.active is active:
                runtime.plans[key] = plan
        return plan

    def _call_heads(
        self, block: Block | None, adapter_names: Setup, head: Any
    ) -> tuple[HeadRoute, ...]:
        return self._attachment.runtime.active.heads

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
        """The backbone's parameters; where the model is its own backbone, adapters hang in it."""
        own = {id(parameter) for parameter in self.adapters.parameters()}
        return [p for p in self._attachment.backbone.parameters() if id(p) not in own]

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
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        trained = [self.adapters[name] for name in (block.names() if block else ())]
        for module in [*trained, *self._active_head_modules()]:
            module.requires_grad_(True)
        self.freeze_model()  # a static head can be tied to the embeddings

    def _active_head_modules(self) -> list[nn.Module]:
        """The heads that belong to the active setup."""
        return []

    # --- merging ----------------------------------------------------------------------------

    def merge_adapter(self, adapter_name: str) -> None:
        """Folds an adapter into the weights it acts on; `reset_adapter` takes it out again.

        The original weights are kept aside, so that they come back bit for bit.

        Raises:
            UnknownNameError: If there is none of that name.
            UnsupportedError: If the method cannot be folded in, or an adapter is merged already.
        """
        adapter = self.adapters[adapter_name]
        if self._merged:
            raise UnsupportedError(
                f"{next(iter(self._merged))!r} is merged already; call reset_adapter() first."
            )
        kept: list[_Original] = []
        folded = []
        with torch.no_grad():
            for address, part in adapter.parts.items():
                site = self._attachment.sites[address]
                if not isinstance(site, AttachedLinear):
                    raise UnsupportedError(f"{type(adapter.method).__name__} cannot be merged.")
                weight, bias = site.projection.weight, site.projection.bias
                folded.append(adapter.method.merged(part, weight, bias))
                own = None if bias is None else bias.clone()
                kept.append((site.projection, weight.clone(), own))
            for (projection, _, _), new in zip(kept, folded, strict=True):
                projection.write(*new)
        self._merged[adapter_name] = kept
        self._changed()

    def reset_adapter(self) -> None:
        """Takes a merged adapter out of the weights again, bit for bit."""
        for kept in self._merged.values():
            for projection, weight, bias in kept:
                projection.write(weight, bias)
        self._merged.clear()
        self._changed()
