"""Finding an architecture's sites in a live model, and keeping just the hooks that are needed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexheads.composition import Block
from flexheads.errors import UnsupportedError
from flexheads.plan import HeadRoute, Plan
from flexheads.plugins import resolve
from flexheads.sites.attention import AttachedAttention
from flexheads.sites.base import CALL, AttachedSite, Hooks, compiled, input_embeddings
from flexheads.sites.call import CallInputs
from flexheads.sites.composed import fitted, layer_width
from flexheads.sites.embedding import AttachedEmbedding
from flexheads.sites.finding import alternatives, find_layers, find_module, find_stack, first
from flexheads.sites.hidden import AttachedHidden
from flexheads.sites.hooking import run_first
from flexheads.sites.linear import AttachedLinear
from flexheads.sites.output import AttachedOutput
from flexheads.sites.planning import Planner
from flexheads.sites.prompt import PROMPT, AttachedPrompt
from flexheads.sites.relative_bias import share_projections
from flexheads.sites.repeat import REPEAT, Repeater
from flexheads.sites.residual import AttachedResidual, share_outputs
from flexheads.sites.runtime import Runtime, may_checkpoint
from flexheads.sites.tokens import AttachedTokens
from flexheads.specs import ArchitectureSpec, LayerSpec, Path, ResidualSite

RESIDUAL_ROLES = ("attention", "cross_attention", "feed_forward")
LINEAR_ROLES = (
    "query",
    "key",
    "value",
    "attention_output",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "mlp_in",
    "mlp_out",
)
ATTENTION_ROLES = ("self_attention", "encoder_attention")
HIDDEN_ROLE = "output"
EMBEDDINGS, LATE_EMBEDDINGS, TOKENS = "embeddings", "late_embeddings", "tokens"


class Attachment:
    """The sites of one model, by logical address, and the hooks that are registered on them.

    Hooks come with the first adapter that relies on them and go with the last, so a model without
    adapters runs the bare backbone. All of them ask the runtime what to do, so switching between
    adapters registers nothing.

    Args:
        model: The model; its base model is the backbone.
        spec: The backbone's architecture.
    """

    def __init__(
        self, model: PreTrainedModel, backbone: PreTrainedModel, spec: ArchitectureSpec
    ) -> None:
        self.spec = spec = fitted(spec, backbone)
        self.runtime = Runtime()
        self.model = model
        self.backbone: Any = backbone
        self.sites: dict[str, AttachedSite] = {}
        self.depth = 0
        self._handles: dict[tuple[str, str], RemovableHandle] = {}
        self._needs: dict[Hooks, Hooks] = {}
        entry, owner = spec.entry, f"Architecture {spec.name!r}"
        self._called = backbone if entry is None else find_module(backbone, entry, owner)
        self._call = CallInputs(self.runtime, self._called, spec.layers, model is self._called)
        for site in self._find_sites(model):
            self.sites[site.address] = site
        share_outputs(self.sites.values())
        share_projections(self.sites.values())
        norms = {id(s.host): s.address for s in self.sites.values() if s.kind == "norm"}
        self._norms = {
            site.address: norms[id(site.norm)]
            for site in self.sites.values()
            if isinstance(site, AttachedResidual) and id(site.norm) in norms
        }
        self.repeater = self._repeater()
        self._planner = Planner(self.sites, self._norms, self.repeater)
        self.checkpointed = may_checkpoint(model, self.sites.values())

    def _find_sites(self, model: PreTrainedModel) -> Iterator[AttachedSite]:
        owner = f"Architecture {self.spec.name!r}"
        for address in (EMBEDDINGS, LATE_EMBEDDINGS):
            path: Path | None = getattr(self.spec, address)
            if path is None or self._lacks(path):
                continue
            host = find_module(self.backbone, path, owner)
            outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            config = self._config_for(path)
            width = getattr(config, "embedding_size", None) or config.hidden_size
            acts_on = self.spec.embeddings_from if address == EMBEDDINGS else "output"
            yield AttachedEmbedding(address, host, width, self.runtime, outputs, acts_on)
        tokens = input_embeddings(self.backbone)
        # Two sides share the weights of that module, but need not call the module itself.
        single = all(layers.side is None for layers in self.spec.layers)
        if self.spec.inputs == "tokens" and single and isinstance(tokens, nn.Embedding):
            outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            yield AttachedTokens(TOKENS, tokens, self.runtime, outputs)
        yield from self._find_prompt(model, owner)
        for stack, layers in enumerate(self.spec.layers):
            if self._lacks(layers.path):
                continue
            found = find_layers(self.backbone, layers.path, owner)
            for index, (_, layer) in enumerate(found):
                for site in self._find_layer_sites(layer, layers, stack, index, owner):
                    site.folded = layers.folded
                    yield site
                self.depth += 1
        for number, path in enumerate(self.spec.norms):
            if self._lacks(path):
                continue
            host, width = (
                find_module(self.backbone, path, owner),
                self._config_for(path).hidden_size,
            )
            yield AttachedOutput(f"norms.{number}", "norm", None, host, width, self.runtime)

    def _repeater(self) -> Repeater:
        """What lets branches of a setup share layers, where the architecture allows that."""
        layers: list[nn.Module] = []
        start, spec, model = 0, self.spec, self.model
        # A class with a head that holds the backbone's parts itself reads inputs behind them.
        by_itself = model is not self.backbone or isinstance(model, resolve(spec.backbone))
        for stack in spec.layers if spec.shares_layers and by_itself else ():
            if not self._lacks(stack.path):
                start = len(layers)
                layers += [layer for _, layer in find_layers(self.backbone, stack.path, "")]
        return Repeater(self.runtime, self._called, layers, start, model is not self._called)

    def _config_for(self, path: Path) -> Any:
        """The configuration of the part of the model that a path leads into."""
        named, config = first(path).partition(".")[0], self.backbone.config
        for layers in self.spec.layers:
            if layers.config is not None and first(layers.path).partition(".")[0] == named:
                return getattr(config, layers.config, config)
        return config

    def _find_prompt(self, model: PreTrainedModel, owner: str) -> Iterator[AttachedSite]:
        """The place for prompts, where the architecture has one."""
        spec, backbone = self.spec, self.backbone
        sides = {layers.side for layers in spec.layers}
        if spec.embeddings is None or self._lacks(spec.embeddings):
            return
        if (len(spec.layers) > 1 and sides == {None}) or spec.fixed_positions(backbone.config):
            return
        encoder = backbone.get_encoder() if "encoder" in sides else None
        if "encoder" in sides and encoder is None:
            return
        tokens = input_embeddings(encoder or backbone)
        path, embeddings = spec.layers[0].path, None
        place = spec.prompts or ("tokens" if spec.pooling == "last_token" else "embeddings")
        if encoder is None and place == "embeddings":
            embeddings = self.sites[EMBEDDINGS].host
            width = self.sites[EMBEDDINGS].width
        elif isinstance(tokens, nn.Embedding):
            width = tokens.embedding_dim
        else:
            return
        layers = find_stack(backbone, path, owner)
        holder = next(m for m in backbone.modules() if any(c is layers for c in m.children()))
        called: Any = self._called
        yield AttachedPrompt(
            model, called, embeddings, holder, width, self.runtime, encoder=encoder
        )

    def _lacks(self, path: Path) -> bool:
        """Whether a path is about a part of a model of several that this backbone lacks."""
        several = [layers for layers in self.spec.layers if layers.part is not None]
        parts = [first(layers.path).partition(".")[0] for layers in several]
        named = first(path).partition(".")[0]
        return named in parts and not hasattr(self.backbone, named)

    def own_children(self) -> tuple[str, ...]:
        """The names of the backbone's direct children that are the backbone.

        A class with a head can be its own backbone: it holds the backbone's parts and the head's
        side by side.
        """
        spec, backbone = self.spec, self.backbone
        if isinstance(backbone, resolve(spec.backbone)):
            return tuple(n for n, _ in backbone.named_children() if not n.startswith("adapter"))
        paths = [spec.embeddings, *spec.norms, *(layers.path for layers in spec.layers)]
        named = {
            alternative.partition(".")[0]
            for path in paths
            if path is not None
            for alternative in alternatives(path)
        }
        tokens = input_embeddings(backbone)
        return tuple(n for n, m in backbone.named_children() if n in named or m is tokens)

    def _find_layer_sites(
        self, layer: nn.Module, layers: LayerSpec, stack: int, index: int, owner: str
    ) -> Iterator[AttachedSite]:
        number, start = self.depth, f"layers.{self.depth}"
        config, runtime = self._config_for(layers.path), self.runtime
        width = layer_width(layer, layers, config, owner)
        for role in RESIDUAL_ROLES:
            site: ResidualSite | None = getattr(layers, role)
            if site is not None:
                modules = _residual_modules(layer, site, owner, config)
                address = f"{start}.{role}"
                yield AttachedResidual(address, role, number, layer, width, runtime, **modules)
        for role in LINEAR_ROLES:
            path: Path | None = getattr(layers, role)
            if path is not None:
                host = find_module(layer, path, owner)
                block = layers.fused.get(role)
                yield AttachedLinear(f"{start}.{role}", role, number, host, runtime, block, config)
        for role in ATTENTION_ROLES:
            path = getattr(layers, role)
            if path is not None:
                host = find_module(layer, path, owner)
                yield AttachedAttention(
                    f"{start}.{role}",
                    role,
                    number,
                    host,
                    runtime,
                    config=config,
                    stack=stack,
                    index=index,
                    side=layers.side,
                    location=layers.adapterhub.get(f"{role}.prefix"),
                    projections=_projections(layer, layers, role, owner),
                )
        yield AttachedHidden(
            f"{start}.{HIDDEN_ROLE}", HIDDEN_ROLE, number, layer, width, runtime, side=layers.part
        )
        for place, path in enumerate(layers.norms):
            host = find_module(layer, path, owner)
            yield AttachedOutput(f"{start}.norms.{place}", "norm", number, host, width, runtime)

    def paths(self) -> dict[str, str]:
        """For every site its path in AdapterHub files, relative to the backbone."""
        found = {TOKENS: TOKENS} if TOKENS in self.sites else {}
        for address in (EMBEDDINGS, LATE_EMBEDDINGS):
            if address in self.sites:
                found[address] = self.spec.adapterhub.get(EMBEDDINGS, "")
        number, renamed = 0, self.renamed()
        for layers in self.spec.layers:
            if self._lacks(layers.path):
                continue
            for start, _ in find_layers(self.backbone, layers.path, self.spec.name):
                for role in (*RESIDUAL_ROLES, *LINEAR_ROLES, *ATTENTION_ROLES):
                    path = getattr(layers, role)
                    if role not in renamed:
                        path = layers.adapterhub.get(role, path)
                    if path is not None and not isinstance(path, ResidualSite):
                        found[f"layers.{number}.{role}"] = f"{start}.{first(path)}"
                found[f"layers.{number}.{HIDDEN_ROLE}"] = start
                for place, path in enumerate(layers.norms):
                    found[f"layers.{number}.norms.{place}"] = f"{start}.{first(path)}"
                number += 1
        found |= {f"norms.{place}": first(path) for place, path in enumerate(self.spec.norms)}
        return found

    def renamed(self) -> dict[str, str]:
        """The roles of projections that AdapterHub files call by one another's names."""
        found: dict[str, str] = {}
        for layers in self.spec.layers:
            own = {first(p): role for role in LINEAR_ROLES if (p := getattr(layers, role))}
            given = {r: p for r, p in layers.adapterhub.items() if r in LINEAR_ROLES}
            named = {role: own.get(path, role) for role, path in given.items()}
            found |= {role: other for role, other in named.items() if role != other}
        return found

    def run(self, model: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a model's own forward; where it is its own backbone, prompts enter here."""
        prompt, own = self.sites.get(PROMPT), functools.partial(forward, model)
        if model is not self.backbone:
            return own(*args, **kwargs)
        enter = prompt.run if isinstance(prompt, AttachedPrompt) else lambda run, a, k: run(*a, **k)
        noting = functools.partial(self._call.run, functools.partial(enter, own))
        return self.repeater.run(noting, args, kwargs)

    def hooks_for(self, parts: Mapping[str, nn.Module]) -> Hooks:
        """The hooks that an adapter relies on.

        Args:
            parts: Its parts, by address.
        """
        needed = frozenset(
            ("" if hook.partition(".")[0] == CALL else address, hook)
            for address, part in parts.items()
            for hook in (*self.sites[address].needed(part), *self.sites[address].folding)
        )
        layers = [n for address in parts if (n := self.sites[address].layer) is not None]
        needed |= self.repeater.needed(min(layers, default=None))
        # Adapters of one kind have one and the same value, which is quickly told from others.
        return self._needs.setdefault(needed, needed)

    def sync(self, needs: Iterable[Hooks]) -> None:
        """Registers the hooks that adapters rely on and removes all others.

        Args:
            needs: What `hooks_for` gives for each adapter.

        Raises:
            UnsupportedError: If new hooks would go unseen, because a part of the model is compiled
                by itself. (A model that is compiled as a whole sees them, see `Runtime.version`.)
        """
        needed: Hooks = frozenset().union(*set(needs))
        if needed:
            needed |= self.repeater.needed(self.repeater.skipped)
        if needed == self._handles.keys():
            return
        new = [key for key in needed if key not in self._handles]
        inside = (module for module in self.model.modules() if module is not self.model)
        if new and any(compiled(module) for module in inside):
            if any(address != REPEAT for address, _ in new):
                raise UnsupportedError(
                    "A part of the model is compiled, so hooks added now would be ignored. Add the "
                    "first adapter of each kind before compiling, or compile the whole model."
                )
            new = []  # rows are repeated with the inputs of the model then
        old = [key for key in self._handles if key not in needed]
        for key in old:
            self._handles.pop(key).remove()
        owners: Any = {"": self._call, REPEAT: self.repeater, **self.sites}
        for address, hook in sorted(new):
            self._handles[address, hook] = owners[address].register(hook)
        if any(hook == "leave" for _, hook in new):  # a norm's own hook runs before it
            for key in [key for key in self._handles if key[0] in self._norms.values()]:
                run_first(self._handles[key])
        self.runtime.version += 1

    def replace_host(self, old: nn.Module, new: nn.Module) -> None:
        """Takes the sites of one module to another that stands in its place."""
        for address, site in self.sites.items():
            if site.host is not old:
                continue
            site.host = new
            for key in [key for key in self._handles if key[0] == address]:
                self._handles[key].remove()
                self._handles[key] = site.register(key[1])
                self.runtime.version += 1

    def plan(
        self,
        setup: Block | None,
        adapters: Mapping[str, Mapping[str, nn.Module]],
        heads: tuple[HeadRoute, ...] = (),
        fusions: Mapping[str, Mapping[str, nn.Module]] | None = None,
        skip_layers: Sequence[int] = (),
    ) -> Plan:
        """The plan for a setup.

        Args:
            setup: The composition.
            adapters: The parts of every adapter that the setup names, by address.
            heads: The heads that run.
            fusions: The parts of every AdapterFusion that the setup names, by address.
            skip_layers: Numbers of layers in which nothing acts.

        Raises:
            CompositionError: If a block has no meaning for the adapters inside.
        """
        return self._planner.plan(setup, adapters, heads, fusions, skip_layers)


def _projections(
    layer: nn.Module, layers: LayerSpec, role: str, owner: str
) -> tuple[nn.Module, nn.Module] | None:
    """The key and the value projection of an attention, where they are modules of their own."""
    words = ("key", "value") if role == "self_attention" else ("cross_key", "cross_value")
    paths = [None if word in layers.fused else getattr(layers, word) for word in words]
    found = [find_module(layer, path, owner) for path in paths if path is not None]
    return (found[0], found[1]) if len(found) == 2 else None


def _residual_modules(
    layer: nn.Module, site: ResidualSite, owner: str, config: Any
) -> dict[str, Any]:
    """What a residual site takes, by argument of `AttachedResidual`."""
    beside = site.beside if getattr(config, site.beside_if or "", True) else None
    norm = None if getattr(config, site.norm_unless or "", False) else site.norm
    return {
        "beside": None if beside is None else find_module(layer, beside, owner),
        "alone": site.alone,
        "output": find_module(layer, site.output, owner),
        "residual": find_module(layer, site.residual, owner),
        "residual_from": site.residual_from,
        "norm": None if norm is None else find_module(layer, norm, owner),
        "added": site.added,
    }
