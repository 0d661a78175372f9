"""Several adapters at once: stacked, in parallel, and each on its own part of the batch."""

from __future__ import annotations

from typing import Any

import pytest

import flexheads
from flexheads.testing import randomise

from .comparing import assert_same_gradients, assert_same_outputs
from .library import adapters
from .pairs import adapter_keys, copy_adapter, our_model, peer_model

pytestmark = pytest.mark.peer

PREFIX = "prefix_tuning[prefix_length=4, bottleneck_size=8]"
BLOCKS: dict[str, tuple[str, Any, Any]] = {
    "stack": ("seq_bn", flexheads.Stack("a", "b"), adapters.Stack("a", "b")),
    "stack_double": ("double_seq_bn", flexheads.Stack("a", "b"), adapters.Stack("a", "b")),
    "parallel": ("seq_bn", flexheads.Parallel("a", "b"), adapters.Parallel("a", "b")),
    "batch_split": (
        "double_seq_bn",
        flexheads.BatchSplit("a", "b", batch_sizes=[2, 1]),
        adapters.BatchSplit("a", "b", batch_sizes=[2, 1]),
    ),
    "batch_split_lora": (
        "lora",
        flexheads.BatchSplit("a", "b", batch_sizes=[1, 2]),
        adapters.BatchSplit("a", "b", batch_sizes=[1, 2]),
    ),
    "stack_prefix": (PREFIX, flexheads.Stack("a", "b"), adapters.Stack("a", "b")),
    "parallel_prefix": (PREFIX, flexheads.Parallel("a", "b"), adapters.Parallel("a", "b")),
    "batch_split_prefix": (
        PREFIX,
        flexheads.BatchSplit("a", "b", batch_sizes=[1, 2]),
        adapters.BatchSplit("a", "b", batch_sizes=[1, 2]),
    ),
    "stack_parallel": (
        "seq_bn",
        flexheads.Stack("c", flexheads.Parallel("a", "b")),
        adapters.Stack("c", adapters.Parallel("a", "b")),
    ),
    "stack_batch_split": (
        "seq_bn",
        flexheads.Stack("c", flexheads.BatchSplit("a", "b", batch_sizes=[2, 1])),
        adapters.Stack("c", adapters.BatchSplit("a", "b", batch_sizes=[2, 1])),
    ),
    "parallel_stack": (
        "double_seq_bn",
        flexheads.Parallel(flexheads.Stack("c", "a"), "b"),
        adapters.Parallel(adapters.Stack("c", "a"), "b"),
    ),
    "parallels_in_stack": (
        "seq_bn",
        flexheads.Stack(flexheads.Parallel("a", "b"), flexheads.Parallel("c", "d")),
        adapters.Stack(adapters.Parallel("a", "b"), adapters.Parallel("c", "d")),
    ),
    "split": (
        "seq_bn",
        flexheads.Split("a", "b", splits=[3, 4]),
        adapters.Split("a", "b", splits=[3, 4]),
    ),
}

RIGHT = {
    "par_bn": ("BatchSplit",),
    "compacter[reduction_factor=4]": ("BatchSplit", "Parallel"),
    "ia3": ("BatchSplit",),
}
"""Where each row of the peer is as under its adapter alone, beside what `BLOCKS` has.

Low-rank methods under Parallel crash there unless attention is computed by the fused kernel.
"""

for config, kinds in RIGHT.items():
    for kind in kinds:
        sizes = {"batch_sizes": [1, 2]} if kind == "BatchSplit" else {}
        ours_and_theirs = (getattr(lib, kind)("a", "b", **sizes) for lib in (flexheads, adapters))
        BLOCKS[f"{kind} of {config}"] = (config, *ours_and_theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_compositions(block: str) -> None:
    fields, our_setup, peer_setup = BLOCKS[block]
    ours, theirs, keys = our_model(), peer_model(), {}
    for seed, name in enumerate(our_setup.names()):
        ours.add_adapter(name, fields)
        theirs.add_adapter(name, config=fields)
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
        keys |= adapter_keys(ours, name)
    ours.double().set_active_adapters(our_setup)
    theirs.double().set_active_adapters(peer_setup)
    assert_same_outputs(ours, theirs)
    assert_same_gradients(ours, theirs, keys)
