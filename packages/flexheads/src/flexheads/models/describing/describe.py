"""A proposal for the specification of an architecture that no package knows."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexheads.errors import UnsupportedError
from flexheads.models.describing.projection_names import attention_projections, mlp_projections
from flexheads.models.describing.residual_walk import Addition, Walk
from flexheads.models.describing.spec_source import spec_source
from flexheads.models.describing.tracing import Event, Trace
from flexheads.sites.finding import find_layers
from flexheads.specs import ArchitectureSpec, LayerSpec

_TINY = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


_KINDS = {
    "input_ids": "tokens",
    "pixel_values": "pixels",
    "input_features": "features",
    "input_values": "waveform",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` has found.

    Attributes:
        spec: The proposal.
        notes: What it could not find or is not sure of.
    """

    spec: ArchitectureSpec
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """Python source that makes the specification, notes as comments."""
        return spec_source(self.spec, self.notes)


def describe(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> Description:
    """Proposes the specification of a transformers model, by looking at what it computes.

    A copy of the model with random weights is called, so take a small one. Residual sites are those
    where a module's output and the stream give what follows, number by number, in every layer;
    projections are told by their names, or by what they are given. Print the result, paste it into
    a package, and let `flexheads.testing.architecture_checks` prove it.

    Args:
        model: The model; its base model is described.
        inputs: What to call it with, where it reads neither tokens nor images.

    Raises:
        UnsupportedError: If no stack of layers with a residual stream is found.
    """
    base = model.base_model
    # Some releases call an inner module by the name of base models.
    reads = inspect.signature(type(base).forward).parameters
    backbone = _randomised(
        base if getattr(model, "main_input_name", "") in reads or inputs else model
    )
    given = _inputs(backbone) if inputs is None else dict(inputs)
    trace, notes = Trace(backbone, given), []  # type: ignore[var-annotated]
    stacks = []
    for path, layers in _stacks(backbone, trace):
        found = _layer_spec(backbone, given, trace, path, layers, notes)
        if found is not None:
            stacks.append(found)
    if not stacks:
        raise UnsupportedError(
            f"{type(backbone).__name__} has no stack of layers whose results are added to a "
            "stream; write its specification by hand."
        )
    return Description(_assemble(backbone, given, trace, tuple(stacks), notes), tuple(notes))


@torch.no_grad()
def _randomised(model: nn.Module) -> Any:
    """A copy whose tensors are all different, so that equal numbers mean something."""
    twin: Any = copy.deepcopy(model).eval().float()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(0.1 * noise)
    return twin


def _inputs(model: Any) -> dict[str, Tensor]:
    """Inputs of the kind that a model reads."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.randn(2, config.num_channels, *sizes, generator=generator)}
    if model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"{type(model).__name__} reads {model.main_input_name}; pass inputs= to describe()."
        )
    ids = torch.randint(5, config.vocab_size, (2, 6), generator=generator)
    given = {"input_ids": ids}
    if "attention_mask" in _arguments(model):
        given["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids.flip(1)
    return given


def _arguments(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(type(model).forward).parameters)


# --- stacks of layers ----------------------------------------------------------------------------


def _stacks(model: nn.Module, trace: Trace) -> Iterator[tuple[str, list[Event]]]:
    """The lists of layers, by path: those that hand on hidden states of one size."""
    taken: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in taken)
        if inside or not isinstance(module, nn.ModuleList):
            continue
        members = list(module)
        names = {name for member in members for name, _ in member.named_children()}
        if len(names) == 1 and all(_only_list(member) is not None for member in members):
            path = f"{path}.*.{names.pop()}"
            members = [layer for member in members for layer in _only_list(member) or ()]
        called = [event for layer in members if (event := trace.last(layer)) is not None]
        if called and all(_hands_on(trace, event) for event in called):
            taken.append(path.partition(".*")[0])
            yield path, called


def _only_list(module: nn.Module) -> nn.ModuleList | None:
    children = list(module.children())
    only = children[0] if len(children) == 1 else None
    alike = isinstance(only, nn.ModuleList) and len({type(layer) for layer in only}) == 1
    return only if alike else None  # type: ignore[return-value]


def _hands_on(trace: Trace, event: Event) -> bool:
    if event.given is None or event.made is None or event.given.shape != event.made.shape:
        return False
    return sum(inner.is_linear for inner in trace.inside(event)) > 1


# --- one stack ------------------------------------------------------------------------------------


def _layer_spec(
    model: Any,
    inputs: Mapping[str, Tensor],
    trace: Trace,
    path: str,
    layers: list[Event],
    notes: list[str],
) -> LayerSpec | None:
    """What is found in the last layer, where it holds in all of them."""
    walks = [Walk(trace, layer) for layer in layers]
    walk, layer = walks[-1], layers[-1]
    if not walk.additions:
        notes.append(f"{path}: no result is added to a stream there.")
        return None
    if not walk.complete:
        notes.append(f"{path}: the stream was lost behind {walk.additions[-1].output.path}.")
    roles: dict[str, Any] = {}
    for addition in walk.additions:
        inner = [
            e
            for e in walk.events
            if e.leaf and addition.begun <= e.begun and e.ended <= addition.output.ended
        ]
        found = attention_projections(model, inputs, trace, layer, inner)
        if found is None:
            own = mlp_projections(layer, inner)
            mixes = not own and addition is not walk.additions[-1]
            found = {"attention" if mixes else "feed_forward": None, **own}
        residual = next(role for role, value in found.items() if value is None)
        if residual in roles:
            notes.append(f"{path}: {addition.output.path} is a further {residual}; left out.")
            continue
        fused = {**roles.get("fused", {}), **found.pop("fused", {})}
        roles |= {**found, "fused": fused, residual: addition.site(layer.path)}
    notes += [
        f"{path}: no {role} was found."
        for role in ("attention", "feed_forward", "query", "mlp_in")
        if role not in roles
    ]
    for number, other in enumerate(walks[:-1]):
        if _sites(other, layers[number]) != _sites(walk, layer):
            notes.append(f"{path}: layer {number} is built in another way than the last one.")
    side = path.partition(".")[0]
    two_sided = getattr(model.config, "is_encoder_decoder", False)
    return LayerSpec(
        path=path,
        side=side if two_sided and side in ("encoder", "decoder") else None,  # type: ignore[arg-type]
        norms=_norms(layers),
        **roles,
    )


def _sites(walk: Walk, layer: Event) -> list[Any]:
    def norm(addition: Addition) -> Any:
        return dataclasses.replace(addition.site(layer.path), residual="", residual_from="input")

    return [norm(addition) for addition in walk.additions]


def _norms(layers: list[Event]) -> tuple[str, ...]:
    """The norms of the hidden states that every layer has."""
    width = layers[-1].made.shape[-1]  # type: ignore[union-attr]
    each = [
        [path for path, module in layer.module.named_modules() if _is_norm(module, width)]
        for layer in layers
    ]
    return tuple(path for path in each[-1] if all(path in others for others in each))


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.shape == (width,)


# --- the rest -------------------------------------------------------------------------------------


def _assemble(
    model: Any,
    inputs: Mapping[str, Tensor],
    trace: Trace,
    stacks: tuple[LayerSpec, ...],
    notes: list[str],
) -> ArchitectureSpec:
    config = model.config
    tokens, both = "input_ids" in inputs, {"input_ids", "pixel_values"} <= inputs.keys()
    kind = next((kind for name, kind in _KINDS.items() if name in inputs), "tokens")
    own_layers = {path for stack in stacks for path, _ in find_layers(model, stack.path, "")}
    own = tuple(stack.path.partition(".*")[0] for stack in stacks)  # type: ignore[union-attr]
    widths = {e.made.shape[-1] for e in trace.events if e.made is not None and e.path in own_layers}
    norms = [
        path
        for path, module in model.named_modules()
        if any(_is_norm(module, width) for width in widths)
        and not path.startswith(tuple(f"{p}." for p in own))
    ]
    two_sided = any(stack.side for stack in stacks)
    pooling = "last_token" if two_sided or (tokens and _is_causal(model, inputs)) else "first_token"
    embeddings = _embeddings(trace, stacks[0], tokens)
    if embeddings is None:
        notes.append("embeddings: no module gives what enters the first layer.")
    return ArchitectureSpec(
        name=config.model_type,
        model_types=(config.model_type,),
        backbone=f"{type(model).__module__}:{type(model).__qualname__}",
        embeddings=embeddings,
        layers=stacks,
        norms=tuple(norms),
        inputs="tokens_and_pixels" if both else kind,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
        pooler=getattr(trace.output, "pooler_output", None) is not None,
        tiny={key: getattr(config, key) for key in _TINY if _is_number(config, key)},
    )


def _is_number(config: Any, key: str) -> bool:
    return isinstance(getattr(config, key, None), int)


def _embeddings(trace: Trace, stack: LayerSpec, tokens: bool) -> str | None:
    """The outermost module whose output enters the first layer, or that embeds tokens."""
    list_path = str(stack.path).partition(".*")[0]
    first = next(e for e in trace.events if re.match(rf"{re.escape(list_path)}\.0(\.|$)", e.path))
    before = [e for e in trace.events if 0 < e.ended < first.begun and e.path]
    same = [
        e
        for e in before
        if e.made is not None
        and first.given is not None
        and e.made.shape == first.given.shape
        and torch.allclose(e.made, first.given)
    ]
    if not same and tokens:
        same = [e for e in before if isinstance(e.module, nn.Embedding)]
    return min(same, key=lambda e: (e.path.count("."), e.begun)).path if same else None


def _is_causal(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a change of the last token leaves the first positions as they are."""
    ids = inputs["input_ids"].clone()
    ids[:, -1] = torch.where(ids[:, -1] == ids.min(), ids.max(), ids.min())
    with torch.no_grad():
        one, other = model(**inputs)[0], model(**{**inputs, "input_ids": ids})[0]
    return bool(torch.allclose(one[:, 0], other[:, 0], atol=1e-6))
