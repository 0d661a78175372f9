"""A new adapter changes no output, whatever its method, where the definition allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexheads import BnConfig, ConfigUnion, load_config
from flexheads.plugins import registry
from flexheads.testing import tiny_inputs, tiny_model

# Identifiers that change outputs from the start, and why.
EXCEPTIONS = {
    "prefix_tuning": "new keys and values take part in attention",
    "prefix_tuning_flat": "new keys and values take part in attention",
    "prompt_tuning": "new tokens are attended to",
    "mam": "holds prefix tuning",
    "unipelt": "holds prefix tuning",
}
# What an identifier needs beside its defaults.
NEEDS: dict[str, dict[str, Any]] = {"trainable_tokens": {"token_indices": [3, 5]}}


def identifiers() -> list[str]:
    return sorted(name for method in registry().methods.values() for name in method.identifiers)


@pytest.fixture(scope="module")
def model() -> Any:
    """Wide enough for every default reduction factor; it has no adapters."""
    return tiny_model("bert", hidden_size=128, intermediate_size=64)


def check(model: Any, config: Any) -> None:
    given = tiny_inputs(model.config)
    with torch.no_grad():
        before = model(**given).last_hidden_state
        model.add_adapter("new", config, set_active=True, overwrite_ok=True)
        after = model(**given).last_hidden_state
    assert model.active_adapters is not None
    model.delete_adapter("new")
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in identifiers() if name not in EXCEPTIONS])
def test_a_new_adapter_changes_nothing(name: str, model: Any) -> None:
    check(model, load_config(name, **NEEDS.get(name, {})))


@pytest.mark.parametrize("start", ["bert", "mam_adapter", "houlsby"])
@pytest.mark.parametrize("base", ["double_seq_bn", "par_bn", "compacter", "seq_bn_inv"])
def test_however_the_other_weights_start(start: str, base: str, model: Any) -> None:
    check(model, load_config(base, init_weights=start, use_gating=True, scaling="learned"))


def test_glow(model: Any) -> None:
    check(model, load_config("seq_bn_inv", inv_adapter="glow"))


@pytest.mark.parametrize("fields", [{"ln_before": True}, {"ln_after": True}], ids=list)
def test_norms_of_its_own(fields: dict[str, bool], model: Any) -> None:
    check(model, BnConfig(True, True, 16, "gelu", **fields))


@pytest.mark.parametrize(
    "name", ["seq_bn", "compacter", "seq_bn_inv", "loreft", "noreft", "direft"]
)
def test_it_learns_from_there(name: str, model: Any) -> None:
    """Something trainable has a gradient, in every part."""
    model.add_adapter("new", load_config(name, init_weights_seed=1))
    model.train_adapter("new")
    state = model(**tiny_inputs(model.config)).last_hidden_state
    (state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum().backward()
    for address, part in model.adapters["new"].parts.items():
        found = [p.grad for p in part.parameters() if p.grad is not None]
        assert any(bool(grad.abs().max() > 0) for grad in found), address
    model.delete_adapter("new")


def test_the_exceptions_are_installed() -> None:
    assert set(NEEDS) <= set(identifiers())
    assert set(EXCEPTIONS) - set(identifiers()) <= {"mam", "unipelt"}


DRAWN_FROM_NOTHING = ("ia3", "ln_tuning", "trainable_tokens", "oft", "boft")
"""They start at ones, at zeros, or at the model's own weights."""

SEEDED = [name for name in identifiers() if name not in DRAWN_FROM_NOTHING]


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_says_how_an_adapter_starts(name: str, model: Any) -> None:
    """And it leaves the numbers that are drawn elsewhere alone."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        config = seeded(load_config(name), 7 if len(states) < 2 else 8)
        before = torch.get_rng_state()
        model.add_adapter("new", config)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({k: t.clone() for k, t in model.adapters["new"].state_dict().items()})
        model.delete_adapter("new")
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def seeded(config: Any, seed: int) -> Any:
    """The configuration with a seed; of a union, every member has it."""
    if not isinstance(config, ConfigUnion):
        return config.replace(init_weights_seed=seed)
    return ConfigUnion(*(seeded(member, seed) for member in config.configs))
