"""Finding an architecture's sites in a live model, and keeping just the hooks that are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexheads.composition import Block, Fuse
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.plan import HeadRoute, Plan
from flexheads.routing import Chain, chain_of, route
from flexheads.sites.attention import AttachedAttention
from flexheads.sites.base import CALL, AttachedSite, compiled
from flexheads.sites.call import CallInputs
from flexheads.sites.combine import combine
from flexheads.sites.embedding import AttachedEmbedding
from flexheads.sites.hidden import AttachedHidden
from flexheads.sites.linear import AttachedLinear
from flexheads.sites.output import AttachedOutput
from flexheads.sites.residual import AttachedResidual
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
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
EMBEDDINGS, TOKENS = "embeddings", "tokens"


def find_module(root: nn.Module, path: Path, owner: str) -> nn.Module:
    """The module at the first of the paths that resolves.

    Raises:
        ConfigError: If none resolves; the message names all that were tried.
    """
    for candidate in (path,) if isinstance(path, str) else path:
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    raise ConfigError(
        f"{owner}: {type(root).__name__} has no module at {path!r}. The spec does not fit the "
        "installed transformers; add the new path as an alternative."
    )


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
        self.spec = spec
        self.runtime = Runtime()
        self.model = model
        self.backbone: Any = backbone
        self.sites: dict[str, AttachedSite] = {}
        self.depth = 0
        self._handles: dict[tuple[str, str], RemovableHandle] = {}
        self._call = CallInputs(self.runtime, backbone)
        for site in self._find_sites(model):
            self.sites[site.address] = site
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    def _find_sites(self, model: PreTrainedModel) -> Iterator[AttachedSite]:
        owner, config = f"Architecture {self.spec.name!r}", self.backbone.config
        if self.spec.embeddings is not None:
            host = find_module(self.backbone, self.spec.embeddings, owner)
            outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            width = getattr(config, "embedding_size", None) or config.hidden_size
            yield AttachedEmbedding(EMBEDDINGS, host, width, self.runtime, outputs)
        tokens = self.backbone.get_input_embeddings()
        if self.spec.inputs == "tokens" and isinstance(tokens, nn.Embedding):
            width = tokens.embedding_dim
            yield AttachedOutput(TOKENS, TOKENS, None, tokens, width, self.runtime)
        for stack in range(len(self.spec.layers)):
            layers = self.spec.layers[stack]
            for index, layer in enumerate(
                find_module(self.backbone, layers.path, owner).children()
            ):
                yield from self._find_layer_sites(layer, layers, stack, index, owner)
                self.depth += 1
        for number, path in enumerate(self.spec.norms):
            host = find_module(self.backbone, path, owner)
            yield AttachedOutput(
                f"norms.{number}", "norm", None, host, config.hidden_size, self.runtime
            )

    def _find_layer_sites(
        self, layer: nn.Module, layers: LayerSpec, stack: int, index: int, owner: str
    ) -> Iterator[AttachedSite]:
        number, start = self.depth, f"layers.{self.depth}"
        width, runtime = self.backbone.config.hidden_size, self.runtime
        for role in RESIDUAL_ROLES:
            site: ResidualSite | None = getattr(layers, role)
            if site is not None:
                output = find_module(layer, site.output, owner)
                norm = None if site.norm is None else find_module(layer, site.norm, owner)
                yield AttachedResidual(
                    f"{start}.{role}",
                    role,
                    number,
                    layer,
                    width,
                    runtime,
                    output=output,
                    residual=find_module(layer, site.residual, owner),
                    residual_from=site.residual_from,
                    norm=norm,
                )
        for role in LINEAR_ROLES:
            path: Path | None = getattr(layers, role)
            if path is not None:
                host = find_module(layer, path, owner)
                block = layers.fused.get(role)
                yield AttachedLinear(f"{start}.{role}", role, number, host, runtime, block)
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
                    config=self.backbone.config,
                    stack=stack,
                    index=index,
                    side=layers.side,
                )
        yield AttachedHidden(
            f"{start}.{HIDDEN_ROLE}", HIDDEN_ROLE, number, layer, width, runtime, side=layers.side
        )
        for place, path in enumerate(layers.norms):
            host = find_module(layer, path, owner)
            yield AttachedOutput(f"{start}.norms.{place}", "norm", number, host, width, runtime)

    def paths(self) -> dict[str, str]:
        """For every site its path in AdapterHub files, relative to the backbone."""
        found = {name: name for name in (EMBEDDINGS, TOKENS) if name in self.sites}
        number = 0
        for layers in self.spec.layers:
            stack = find_module(self.backbone, layers.path, self.spec.name)
            for index in range(len(stack)):  # type: ignore[arg-type]
                start = f"{_first(layers.path)}.{index}"
                for role in (*RESIDUAL_ROLES, *LINEAR_ROLES, *ATTENTION_ROLES):
                    path = layers.adapterhub.get(role, getattr(layers, role))
                    if path is not None and not isinstance(path, ResidualSite):
                        found[f"layers.{number}.{role}"] = f"{start}.{_first(path)}"
                found[f"layers.{number}.{HIDDEN_ROLE}"] = start
                for place, path in enumerate(layers.norms):
                    found[f"layers.{number}.norms.{place}"] = f"{start}.{_first(path)}"
                number += 1
        found |= {f"norms.{place}": _first(path) for place, path in enumerate(self.spec.norms)}
        return found

    def sync(self, adapters: Iterable[Mapping[str, nn.Module]]) -> None:
        """Registers the hooks that these adapters rely on and removes all others.

        Args:
            adapters: The parts of each adapter, by address.

        Raises:
            UnsupportedError: If new hooks would go unseen, because a part of the model is compiled
                by itself. (A model that is compiled as a whole sees them, see `Runtime.version`.)
        """
        needed = {
            ("" if hook == CALL else address, hook)
            for parts in adapters
            for address, part in parts.items()
            for hook in self.sites[address].needed(part)
        }
        new = [key for key in needed if key not in self._handles]
        inside = (module for module in self.model.modules() if module is not self.model)
        if new and any(compiled(module) for module in inside):
            raise UnsupportedError(
                "A part of the model is compiled, so hooks added now would be ignored. Add the "
                "first adapter of each kind before compiling, or compile the whole model."
            )
        old = [key for key in self._handles if key not in needed]
        for key in old:
            self._handles.pop(key).remove()
        for address, hook in sorted(new):
            site = self.sites[address] if address else self._call
            self._handles[address, hook] = site.register(hook)
        self.runtime.version += bool(old or new)

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
        routing = route(setup)
        rows = None if routing.single else RowMap(routing)
        ops = {}
        for address in dict.fromkeys(a for name in adapters for a in adapters[name]):
            site = self.sites[address]
            if site.layer is not None and site.layer in skip_layers:
                continue
            chains = [self._assemble(c, site, adapters, fusions or {}) for c in routing.chains]
            if any(chains):
                ops[address] = site.op(chains, rows)
        return Plan(setup, routing, heads, ops, tuple(skip_layers))

    def _assemble(
        self,
        chain: Chain,
        site: AttachedSite,
        adapters: Mapping[str, Mapping[str, nn.Module]],
        fusions: Mapping[str, Mapping[str, nn.Module]],
    ) -> list[Any]:
        """The parts of a chain at one site, in order."""
        parts: list[Any] = []
        for step in chain:
            if isinstance(step, str):
                if site.address in adapters[step]:
                    parts.append(adapters[step][site.address])
                continue
            branches = [self._assemble(chain_of(child), site, adapters, fusions) for child in step]
            if any(branches):
                own = fusions.get(step.name, {}) if isinstance(step, Fuse) else {}
                parts.append(combine(site, step, branches, own.get(site.address)))
        return parts


def _first(path: Path) -> str:
    return path if isinstance(path, str) else path[0]
