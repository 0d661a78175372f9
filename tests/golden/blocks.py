"""What is right where the peer's numbers for a block are no target: averages, fused stacks.

What the peer does there: it divides an average by the number of adapters once more, takes the
first member of an Average of invertible adapters, and inside a Fuse it leaves out the residual and
the norm between the members of a Stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.composition import Average, Block, Fuse, Stack
from flexheads.sites.residual import AttachedResidual

from .cases import Case, block_of, model_for, run
from .common import assert_close, read_config, tensors_of


def check_averaged(case: Case, model: Any) -> None:
    """An Average equals one adapter with the members side by side, each weighed."""
    got = run(case, model)
    plain = _without_averages(model, block_of(case.entry["setup"]))
    assert_close(got, run(case, model, plain))


def _without_averages(model: Any, block: Any) -> Any:
    if isinstance(block, Average):
        name = ",".join(block.names())
        _add_side_by_side(model, name, block)
        return name
    if isinstance(block, Block):
        return type(block)(*(_without_averages(model, child) for child in block))
    return block


def _add_side_by_side(model: Any, name: str, block: Average) -> None:
    members = [model.adapters[child] for child in block]
    config = members[0].config
    states = [member.state_dict() for member in members]
    if config.tag == "bottleneck":
        config = config.replace(reduction_factor=config.reduction_factor / len(members))
    elif config.composition_mode == "add":
        config = config.replace(r=config.r * len(members), alpha=config.alpha * len(members))
    model.add_adapter(name, config)
    wide = {
        key: _side_by_side(key, [state[key] for state in states], block.weights)
        for key in states[0]
    }
    model.adapters[name].load_state_dict(wide)


def _side_by_side(key: str, tensors: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    weighed = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    if ".down." in key or key.endswith("lora_A"):
        return torch.cat(tensors)
    if key.endswith("up.weight") or (key.endswith("lora_B") and tensors[0].shape[1] > 1):
        return torch.cat(weighed, dim=1)
    return torch.stack(weighed).sum(0)


def check_fused_stack(case: Case, model: Any) -> None:
    """Behind each adapter of a Stack the next one sees the layer's own result with it added.

    Scores of a fusion are large here, and a softmax of them magnifies rounding, so both are
    computed in double precision.
    """
    block = block_of(case.entry["setup"])
    assert isinstance(block, Fuse)
    model, plain = model.double(), model_for(case.other("base")).double()
    adapters = {name: _weights(case.folder / f) for name, f in case.entry["adapters"].items()}
    (fusion,) = (
        _weights(case.folder / f, "model_adapter_fusion") for f in case.entry["fusions"].values()
    )
    paths = plain._attachment.paths()
    for site in plain._attachment.sites.values():
        if not isinstance(site, AttachedResidual) or site.role != "feed_forward":
            continue
        at = f".{paths[site.address]}."
        parts = {
            name: {
                k.partition(f"{at}adapters.{name}.")[2]: t.double()
                for k, t in own.items()
                if at in k
            }
            for name, own in adapters.items()
        }
        attention = {
            k.rpartition(f".{block.name}.")[2]: t.double() for k, t in fusion.items() if at in k
        }
        _hook(site, lambda total, norm, p=parts, a=attention: _fused(block, total, norm, p, a))
    assert_close(run(case, model), run(case, plain, None))


def _fused(block: Fuse, total: Tensor, norm: Any, parts: Any, attention: Any) -> Tensor:
    """What the fusion adds, written out."""
    ups = []
    for child in block:
        own, up = total, torch.zeros(())
        for name in child if isinstance(child, Stack) else (child,):
            up = _up(norm(own), parts[name])
            own = own + up
        ups.append(up)
    query = _linear(norm(total), attention, "query")
    scores = [(query * _linear(up, attention, "key")).sum(-1) for up in ups]
    shares = torch.stack(scores, dim=-1).softmax(-1)
    values = [_linear(up, attention, "value") for up in ups]
    return torch.stack([shares[..., n, None] * v for n, v in enumerate(values)]).sum(0)


def _up(hidden: Tensor, part: Mapping[str, Tensor]) -> Tensor:
    inner = torch.relu(_linear(hidden, part, "adapter_down.0"))
    return _linear(inner, part, "adapter_up")


def _linear(hidden: Tensor, tensors: Mapping[str, Tensor], word: str) -> Tensor:
    return torch.nn.functional.linear(
        hidden, tensors[f"{word}.weight"], tensors.get(f"{word}.bias")
    )


def _weights(folder: Any, part: str = "adapter") -> dict[str, Tensor]:
    config = read_config(folder).get("config", {}) if part == "adapter" else {}
    assert config.get("non_linearity", "relu") == "relu"
    return tensors_of(folder, part)


def _hook(site: AttachedResidual, delta: Callable[[Tensor, Any], Tensor]) -> None:
    """Adds `delta` of (the sum, the norm) where the sub-layer meets the residual."""
    seen: dict[str, Tensor] = {}
    if site.norm is not None:
        norm = site.norm.forward
        site.norm.register_forward_pre_hook(lambda m, args: args[0] + delta(args[0], norm))
        return

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen["r"] = args[0] if args else next(iter(kwargs.values()))

    def add(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = x + delta(x + seen["r"], lambda hidden: hidden)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    site.residual.register_forward_pre_hook(note, with_kwargs=True)
    site.output.register_forward_hook(add)
