"""What fits an architecture, and what a model of it gives: for the checks."""

from __future__ import annotations

from collections.abc import Callable

from flexheads.errors import CompositionError, UnsupportedError
from flexheads.methods.config import load_config
from flexheads.models.with_heads import ModelWithHeads
from flexheads.sites.attention import AttachedAttention


def lacks(model: ModelWithHeads, config: str) -> bool:
    """Whether an architecture has no site of a kind that a configuration needs."""
    fields, spec = load_config(config), model._attachment.spec
    members = (fields, *getattr(fields, "configs", ()))
    if {role for own in members for role in getattr(own, "roles", ())} - spec.roles:
        return True
    if fields.tag == "prompt_tuning":
        if spec.pooling is None or spec.embeddings is None:
            return True
        return spec.fixed_positions(model.config)
    if fields.tag == "trainable_tokens":
        two_sides = any(layers.side is not None for layers in spec.layers)
        return spec.inputs != "tokens" or two_sides
    if fields.tag == "ln_tuning":
        return "norms" not in spec.roles and not spec.norms
    if "prefix_tuning" in {own.tag for own in members}:
        sites = [s for s in model._attachment.sites.values() if isinstance(s, AttachedAttention)]
        return not sites or any(site.mechanism is None for site in sites)
    return spec.embeddings is None and bool(fields.get("inv_adapter"))


def other_config(model: ModelWithHeads) -> str:
    """A configuration of another method than bottlenecks, where there is one that fits."""
    return "par_bn" if lacks(model, "lora") else "lora"


def refusal(call: Callable[[], object], what: str) -> str:
    """Asserts that something is refused, and returns the reason."""
    try:
        call()
    except (UnsupportedError, CompositionError) as error:
        return str(error)
    raise AssertionError(f"{what} needs what the spec does not name, but is taken.")
