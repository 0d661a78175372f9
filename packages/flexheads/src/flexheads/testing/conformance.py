"""The checks that every architecture package passes; one line adopts them.

In a package's tests::

    from flexheads.testing import architecture_checks

    @architecture_checks("acme")
    def test_conformance(check):
        check()
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from flexheads.methods.config import load_config
from flexheads.models.calls.inputs import batch_size
from flexheads.plugins import registry, resolve
from flexheads.sites.base import first_argument, first_tensor
from flexheads.sites.residual import AttachedResidual
from flexheads.specs import HeadConversion
from flexheads.testing.block_checks import BLOCK_CHECKS, check_block
from flexheads.testing.fitting import lacks, other_config, refusal
from flexheads.testing.head_checks import check_head, check_head_refusals, head_types
from flexheads.testing.repeat_checks import check_shared_layers
from flexheads.testing.static_checks import check_conversion, check_generation, same
from flexheads.testing.tiny import randomise, tiny_config, tiny_inputs, tiny_model, tiny_output

CONFIGS = ("seq_bn", "double_seq_bn", "par_bn", "seq_bn_inv", "lora", "ia3", "vera", "dora")
"""The configurations that the checks try of the core's first methods; of others, the first one."""


def architecture_checks(architecture: str) -> Any:
    """A pytest decorator: one test for each check of one architecture.

    Args:
        architecture: The architecture's name, as its package registers it.
    """
    import pytest

    checks = dict(_checks(architecture))
    return pytest.mark.parametrize("check", checks.values(), ids=checks.keys())


_NEVER_NEUTRAL = ("prefix_tuning", "prompt_tuning", "union")
"""Methods by whose definition a new adapter changes outputs: more keys, more tokens."""

_COMPLETED = {"trainable_tokens": "trainable_tokens[token_indices=[3, 4, 5, 6, 7, 8, 9]]"}
"""Configurations of which some field must be given."""


def configurations() -> tuple[str, ...]:
    """The configurations that the checks try: `CONFIGS`, and one of each further method."""
    found = list(CONFIGS)
    for method in registry().methods.values():
        named = list(method.identifiers)
        if named and not set(named) & set(CONFIGS):
            found.append(_COMPLETED.get(named[0], named[0]))
    return tuple(found)


def _generates(conversion: HeadConversion) -> bool:
    """Whether a static class writes from left to right, so that generation makes sense."""
    spec = registry().architecture(conversion.architecture)
    writes = {rule.head_type for rule in conversion.heads} & {"causal_lm", "seq2seq_lm"}
    return bool(writes) and spec.pooling in ("last_token", "eos")


def _checks(architecture: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for check in (
        check_residual_sites,
        check_bare_backbone,
        check_head_refusals,
        check_whole_model,
        check_training,
        check_attention_implementations,
        check_gradient_checkpointing,
        check_shared_layers,
    ):
        yield check.__name__.removeprefix("check_"), functools.partial(check, architecture)
    for config in configurations():
        yield f"adapter-{config}", functools.partial(check_adapter, architecture, config)
    for conversion in registry().conversions_for(architecture):
        name = conversion.static_class
        if not hasattr(transformers, name):
            continue  # this release does not have it yet
        yield f"conversion-{name}", functools.partial(check_conversion, name)
        if _generates(conversion):
            yield f"generation-{name}", functools.partial(check_generation, name)
    for head_type in head_types(architecture):
        yield f"head-{head_type}", functools.partial(check_head, architecture, head_type)
    for block in BLOCK_CHECKS:
        yield f"block-{block}", functools.partial(check_block, architecture, block)


def check_residual_sites(architecture: str) -> None:
    """Output plus residual is what comes next: the paths of the spec name the right modules.

    Next is the site's norm; where the norm comes first, the residual of the layer's next site, or
    behind the last one the layer's result.
    """
    model = tiny_model(architecture)
    sites = [s for s in model._attachment.sites.values() if isinstance(s, AttachedResidual)]
    assert sites, "The spec names no residual site."
    seen: dict[str, dict[str, Tensor]] = {site.address: {} for site in sites}
    shared = set()  # their sum is a part of the next one's
    for number, site in enumerate(sites):
        own = seen[site.address]
        _note(own, "x", site.output, "output", since="r" if site.shares_output else None)
        _note(own, "r", site.residual, site.residual_from)
        if site.beside is not None:
            _note(own, "beside", site.beside, "output")
        following = sites[number + 1] if number + 1 < len(sites) else None
        if site.norm is not None:
            _note(own, "total", site.norm, "input")
        elif following is not None and following.layer == site.layer:
            if following.beside is not None:  # the layer never adds the two alone
                shared.add(site.address)
                continue
            _note(own, "total", following.residual, following.residual_from)
        else:
            _note(own, "total", site.host, "output")
    tiny_output(model)
    for site in sites:
        address, tensors = site.address, seen[site.address]
        named = {"x", "r", *(("total",) if address not in shared else ())}
        named |= {"beside"} if site.beside is not None else set()
        assert set(tensors) == named, f"{address}: not all modules were called."
        if address in shared:
            continue
        total = tensors["x"] + (0 if site.added else tensors["r"]) + tensors.get("beside", 0)
        expected = tensors["total"].reshape(total.shape)  # some layers fold rows into positions
        same(total, expected, f"{address}: x + r is not what follows")


def _note(
    seen: dict[str, Tensor], key: str, module: nn.Module, which: str, since: str | None = None
) -> None:
    """Notes a module's first input, or its output; that of the first call behind another note."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[key] = first_argument(args, kwargs)

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        if since is None or (since in seen and key not in seen):
            seen[key] = first_tensor(output)

    if which == "input":
        module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        module.register_forward_hook(behind)


def check_bare_backbone(architecture: str) -> None:
    """Without adapters the model is the bare backbone, bit for bit, under the same key names."""
    model = tiny_model(architecture)
    torch.manual_seed(0)
    bare = resolve(registry().architecture(architecture).backbone)(model.config).eval()
    bare.load_state_dict(model._attachment.backbone.state_dict())
    with torch.no_grad():
        expected = bare(**tiny_inputs(model.config)).to_tuple()[0]
    assert torch.equal(tiny_output(model), expected), "The bare model is not the backbone."


def check_adapter(architecture: str, config: str) -> None:
    """An adapter acts, comes back from its file bit for bit, and leaves nothing behind.

    Where the spec lacks what it needs, adding it is refused instead, and changes nothing.
    """
    model = tiny_model(architecture)
    before = tiny_output(model)
    if lacks(model, config):
        refusal(lambda: model.add_adapter("a", config=config), config)
        assert torch.equal(tiny_output(model), before), (
            f"{config}: refused, but something has changed."
        )
        return
    model.add_adapter("a", config=config, set_active=True)
    if load_config(config).tag not in _NEVER_NEUTRAL:
        same(tiny_output(model), before, f"{config} should begin as the identity", tolerance=1e-6)
    randomise(model.adapters["a"])
    acting = tiny_output(model)
    assert not torch.allclose(acting, before, atol=1e-3), f"{config} has no effect."
    with tempfile.TemporaryDirectory() as directory:
        model.save_adapter(directory, "a")
        other = tiny_model(architecture)
        other.load_adapter(directory, set_active=True)
        assert torch.equal(tiny_output(other), acting), f"{config}: the file gives another adapter."
    model.delete_adapter("a")
    assert torch.equal(tiny_output(model), before), f"{config}: deleting leaves something behind."


def check_whole_model(architecture: str) -> None:
    """A saved model comes back with its adapters and heads; its backbone alone does too."""
    model = tiny_model(architecture)
    if model.spec.pooling is not None:
        model.add_classification_head("b", num_labels=3)
    model.add_adapter("b", set_active=True)
    model.add_adapter("a", config=other_config(model))
    randomise(model.adapters)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        other = type(model).from_pretrained(directory)
        backbone_class = type(model).backbone_class
        if backbone_class.base_model_prefix:  # or transformers cannot read this class from others
            backbone = backbone_class.from_pretrained(directory)
        else:
            backbone = other._attachment.backbone
    assert other.adapters.keys() == ("b", "a"), "Adapters are missing or in another order."
    assert torch.equal(tiny_output(other), tiny_output(model)), "The saved model is another one."
    mine, saved = model._attachment.backbone.state_dict(), backbone.state_dict()
    assert all(torch.equal(saved[key], mine[key]) for key in mine), "The backbone has changed."


def check_training(architecture: str) -> None:
    """A training step gives gradients to the adapter and its head, and to nothing else."""
    model = tiny_model(architecture).train()
    if model.spec.pooling is None:
        return
    model.add_classification_head("a", num_labels=3)
    model.add_adapter("a")
    model.add_adapter("other")
    model.train_adapter("a")
    inputs = tiny_inputs(model.config)
    model(**inputs, labels=torch.zeros(batch_size(inputs), dtype=torch.long)).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n for n, _ in model.named_parameters() if n.startswith(("adapters.a.", "heads.a."))}
    assert with_gradient == wanted, f"Gradients differ: {sorted(with_gradient ^ wanted)}."


def check_attention_implementations(architecture: str) -> None:
    """Eager and sdpa attention give the same outputs with adapters active."""
    backbone: Any = resolve(registry().architecture(architecture).backbone)
    if not getattr(backbone, "_supports_sdpa", True):
        return  # this release of transformers has eager attention alone for it
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(architecture, attn_implementation=implementation)
        model.add_adapter("a", config="double_seq_bn", set_active=True)
        randomise(model.adapters)
        outputs.append(tiny_output(model))
    eager, sdpa = outputs
    same(sdpa, eager, "sdpa against eager")


def check_gradient_checkpointing(architecture: str) -> None:
    """Recomputing activations in the backward pass gives the same gradients.

    They are sums over the layers that read an encoder's result, in another order.
    """
    if not resolve(registry().architecture(architecture).backbone).supports_gradient_checkpointing:
        return  # transformers has none for it
    gradients = []
    for recompute in (False, True):
        changes = _without_dropout(architecture)
        model = tiny_model(architecture, **changes)
        model.train()
        model.add_adapter("a")
        model.train_adapter("a")
        randomise(model.adapters)
        if recompute:
            _checkpoint(model._attachment.backbone)
        # Some of the features: the mean square of all is what a final norm holds constant.
        hidden = model(**tiny_inputs(model.config)).to_tuple()[0][..., :4]
        hidden.pow(2).mean().backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-5, "The loss does not depend on the adapter."
        same(recomputed / plain.abs().max(), plain / plain.abs().max(), "recomputed gradients")


def _without_dropout(architecture: str) -> dict[str, Any]:
    """Configuration changes that make training repeatable, without a cache."""
    config = tiny_config(architecture).to_dict()
    named = {key: value for key, value in config.items() if "drop" in key or key.endswith("_pdrop")}
    numbers = {key: 0.0 for key, value in named.items() if isinstance(value, float)}
    return {**numbers, "use_cache": False}


def _checkpoint(backbone: Any) -> None:
    """Switches recomputation on, under the name that the installed transformers prefers."""
    new = getattr(backbone, "activation_checkpointing_enable", None)
    (new or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
