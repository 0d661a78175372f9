"""Setups nested at random, on models of unlike kinds: each row is as under its own chain alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flexheads import Average, BatchSplit, Parallel, Rows, Stack
from flexheads.composition import Block, Child
from flexheads.errors import CompositionError, UnsupportedError
from flexheads.routing import route
from flexheads.testing import randomise, tiny_inputs, tiny_model
from flexheads.testing.block_matrix import way_of

ARCHITECTURES = {"deberta-v2": "deberta", "gemma2": "gemma", "t5": "t5", "vit": "vit"}
"""Relative positions, windows, two sides, and images without a mask; each with its package."""
METHODS = {
    "bottleneck": "double_seq_bn",
    "upper": "seq_bn[leave_out=[0]]",
    "parallel": "par_bn",
    "lora": "lora[r=2]",
    "dora": "dora[r=2]",
    "norms": "ln_tuning",
    "edits": "loreft[dropout=0.0]",
    "prefix": "prefix_tuning[prefix_length=2,bottleneck_size=8]",
    "prompt": "prompt_tuning[prompt_length=2]",
    "longer": "prompt_tuning[prompt_length=4]",
    "gated": "seq_bn[use_gating=True]",
}
BATCH = 4


@functools.cache
def model_of(architecture: str) -> Any:
    pytest.importorskip(f"flexheads_{ARCHITECTURES[architecture]}")
    model = randomise(tiny_model(architecture), std=0.1)
    for seed, (name, config) in enumerate(METHODS.items()):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2, seed=seed)
    return model


def setups(rows: int, depth: int) -> st.SearchStrategy[Child]:
    """Setups for so many rows, nested so deep."""
    names = st.sampled_from(sorted(METHODS))
    if not depth:
        return names | st.none()
    below = setups(rows, depth - 1)
    blocks = [
        st.lists(below.filter(bool), min_size=2, max_size=3).map(lambda own: Stack(*own)),
        st.tuples(below, below).map(lambda own: Parallel(*own)),
        st.tuples(names, names).map(lambda own: Average(*own, weights=[1, 3])),
        st.tuples(*[setups(1, depth - 1)] * rows).map(lambda own: Rows(list(own))),
    ]
    if rows > 1:
        blocks.append(st.integers(1, rows - 1).flatmap(lambda first: split(first, rows, depth)))
    return st.one_of(names, *blocks)


def split(first: int, rows: int, depth: int) -> st.SearchStrategy[Child]:
    sizes = [first, rows - first]
    parts = st.tuples(*(setups(size, depth - 1) for size in sizes))
    return parts.map(lambda own: BatchSplit(*own, batch_sizes=sizes))


def states(output: Any) -> dict[str, torch.Tensor]:
    found = {"last": output.last_hidden_state}
    for name in ("hidden_states", "decoder_hidden_states", "encoder_hidden_states"):
        found |= {f"{name} {n}": state for n, state in enumerate(output.get(name) or ())}
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(setup=setups(BATCH, 3))
def test_each_row_is_as_under_its_own_chain(architecture: str, setup: Child) -> None:
    model = model_of(architecture)
    assume(isinstance(setup, Block))
    inputs = tiny_inputs(model.config, batch=BATCH)
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        try:
            copies = route(setup).repeat  # type: ignore[arg-type]
            found = states(model(**inputs, adapter_names=setup, output_hidden_states=True))
        except (CompositionError, UnsupportedError):
            assume(False)
        for row, copy in [(row, copy) for copy in range(copies) for row in range(BATCH)]:
            own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            way = way_of(setup, row, BATCH, copy) or []
            alone = states(model(**own, adapter_names=way, output_hidden_states=True))
            for name, expected in alone.items():
                seen = slice(None)
                if mask is not None and (architecture != "t5" or "encoder" in name):
                    seen = mask[row].bool()  # type: ignore[assignment]
                one, other = found[name][copy * BATCH + row][seen], expected[0][seen]
                scale = other.abs().max().clamp(min=1e-3)
                torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=2e-5, msg=name)
