"""Bottlenecks at residual sites equal their definition, in post-LN and pre-LN layers alike."""

import itertools

import pytest
import torch

from flexheads import AdapterPlusConfig, DoubleSeqBnConfig, ParBnConfig, Rows, SeqBnConfig, Stack
from flexheads.testing import randomise

VARIANTS = [
    {
        "original_ln_before": before,
        "original_ln_after": after,
        "residual_before_ln": skip,
        "ln_after": ln_after,
        "adapter_residual_before_ln": inside,
    }
    for before, after, skip, ln_after, inside in itertools.product(
        (True, False), (True, False), (True, False, "post_add"), (True, False), (True, False)
    )
    if not (skip == "post_add" and not before) and not (inside and not ln_after)
]
OTHERS = [
    ParBnConfig(reduction_factor=4, mh_adapter=True),
    ParBnConfig(reduction_factor=4, ln_after=True, original_ln_after=False),
    AdapterPlusConfig(reduction_factor=4),
    DoubleSeqBnConfig(reduction_factor=4, ln_before=True, use_gating=True, scaling="channel"),
    SeqBnConfig(reduction_factor={"0": 2, "default": 8}, scaling="learned", leave_out=[0]),
]
CONFIGS = [
    *(DoubleSeqBnConfig(reduction_factor=4, **variant) for variant in VARIANTS),
    *OTHERS,
]


def block(parts, x, r, norm):
    """One sub-layer's end, as the adapters library defines it.

    ``x`` is the sub-layer's result, ``r`` the residual, ``norm`` the post-layer-norm or None.
    """
    replaces = False
    for part in parts:
        config = part.config
        if config.is_parallel:
            delta, skip = part.delta(r), x
        else:
            hidden, skip = x, x if config.residual_before_ln is True else None
            if config.original_ln_before:
                hidden = x + r
                if config.residual_before_ln == "post_add":
                    skip = hidden
                hidden = hidden if norm is None else norm(hidden)
            skip = hidden if skip is None else skip
            delta = part.delta(hidden)
        inside = config.adapter_residual_before_ln and not config.is_parallel
        if inside:
            delta = delta + skip
        if config.ln_after:
            delta = part.norm_after(delta)
        x = delta if inside else delta + skip
        replaces = not config.original_ln_after
    if replaces:
        return x
    return x + r if norm is None else norm(x + r)


def reference(model, names, ids):
    """The toy's forward, written out with adapters in it; no adapter is active meanwhile."""
    hidden = model.embeddings(ids)
    for number, layer in enumerate(model.layers):
        for role, run, norm in (
            ("attention", layer.mix, layer.mix_norm),
            ("feed_forward", layer.mlp, layer.mlp_norm),
        ):
            address = f"layers.{number}.{role}"
            adapters = [model.adapters[name].parts for name in names]
            parts = [own[address] for own in adapters if address in own]
            first = layer.norm_first
            x = run(norm(hidden) if first else hidden)
            hidden = block(parts, x, hidden, None if first else norm)
    return hidden


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-LN", "pre-LN"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@torch.no_grad()
def test_each_variant_equals_its_definition(toy, ids, config, norm_first):
    model = toy(norm_first)
    model.add_adapter("a", config=config)
    expected = reference(randomised(model), ["a"], ids)
    assert not torch.allclose(expected, reference(model, [], ids), atol=1e-2)
    assert_same(model(ids, adapter_names="a"), expected)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-LN", "pre-LN"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(4), range(4))))
@torch.no_grad()
def test_a_stack_runs_one_after_the_other(toy, ids, first, second, norm_first):
    configs = [SeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=2), *OTHERS[1:3]]
    model = toy(norm_first)
    model.add_adapter("a", config=configs[first])
    model.add_adapter("b", config=configs[second])
    expected = reference(randomised(model), ["a", "b"], ids)
    assert_same(model(ids, adapter_names=["a", "b"]), expected)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-LN", "pre-LN"])
@torch.no_grad()
def test_each_row_runs_its_own_chain(toy, norm_first):
    ids = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(1))
    model = toy(norm_first)
    for name, config in zip("abcd", [SeqBnConfig(reduction_factor=4), *OTHERS[:3]], strict=True):
        model.add_adapter(name, config=config)
    randomised(model)
    rows = ["b", None, "d", ["a", "c"], "c", "b"]
    mixed = model(
        ids, adapter_names=Rows([r if not isinstance(r, list) else Stack(*r) for r in rows])
    )
    for number, row in enumerate(rows):
        names = [] if row is None else list(row)
        alone = reference(model, names, ids[number : number + 1])
        assert_same(mixed.last_hidden_state[number], alone[0])


def randomised(model):
    randomise(model.adapters)
    return model


def assert_same(actual, expected):
    actual = getattr(actual, "last_hidden_state", actual)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
