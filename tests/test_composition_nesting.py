"""Any nesting means what one rule says, and what has no meaning is refused with its place."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads import Average, BatchSplit, Fuse, Parallel, Rows, Split, Stack
from flexheads.checkpoints.hub.setup import hub_setup, setup_from_hub
from flexheads.composition import Block, Child, from_json, to_json
from flexheads.errors import CompositionError
from flexheads.routing import Routing, route
from flexheads.testing import randomise, tiny_inputs, tiny_model
from flexheads.testing.block_matrix import way_of

B21, B12 = {"batch_sizes": [2, 1]}, {"batch_sizes": [1, 2]}

RESOLVED: dict[str, tuple[Block, Routing]] = {
    "a Stack of BatchSplits is cut at every border": (
        Stack(BatchSplit("a", "b", **B21), "x", BatchSplit("c", "d", **B12)),
        Routing((("a", "x", "c"), ("a", "x", "d"), ("b", "x", "d")), sizes=(1, 1, 1)),
    ),
    "Parallels in a Parallel are one": (
        Parallel(Parallel("a", "b"), "c"),
        Routing((("a",), ("b",), ("c",)), repeat=3),
    ),
    "Parallels in a Stack belong to each other": (
        Stack(Parallel("a", "b"), Parallel("c", "d")),
        Routing((("a", "c"), ("b", "d")), repeat=2),
    ),
    "a branch of a Parallel may share out its copy": (
        Parallel(BatchSplit("a", "b", **B21), "c", None),
        Routing((("a",), ("b",), ("c",), ()), repeat=3, sizes=(2, 1, 3, 3)),
    ),
    "all branches of a BatchSplit may repeat theirs": (
        BatchSplit(Parallel("a", "b"), Parallel("c", "d"), **B21),
        Routing((("a",), ("c",), ("b",), ("d",)), repeat=2, sizes=(2, 1, 2, 1)),
    ),
    "rows are those of their branch": (
        BatchSplit(Rows(["a", None]), BatchSplit("b", "c", batch_sizes=1), batch_sizes=2),
        Routing(((), ("a",), ("b",), ("c",)), index=(1, 0, 2, 3)),
    ),
    "a mean of blocks that share out rows is one for each": (
        Average(BatchSplit("a", "b", **B21), "c"),
        Routing(((Average("a", "c"),), (Average("b", "c"),)), sizes=(2, 1)),
    ),
    "what stands before a fused adapter may differ from row to row": (
        Fuse(Stack(BatchSplit("a", "b", **B21), "c"), "d"),
        Routing(((Fuse(Stack("a", "c"), "d"),), (Fuse(Stack("b", "c"), "d"),)), sizes=(2, 1)),
    ),
    "one branch is checked against its rows too": (
        BatchSplit("a", batch_sizes=3),
        Routing((("a",),), sizes=(3,)),
    ),
}


@pytest.mark.parametrize("what", RESOLVED)
def test_what_a_nesting_means(what: str) -> None:
    setup, expected = RESOLVED[what]
    assert route(setup) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    "BatchSplit[1]: rows are repeated 1 times here, but 2 times at BatchSplit[0]": (
        BatchSplit(Parallel("a", "b"), "c", **B21),
        "put the Parallel around it",
    ),
    "Stack[1]: Parallel repeats the batch 3 times here, but 2 times at Stack[0]": (
        Stack(Parallel("a", "b"), Parallel("a", "b", "c")),
        "the same number of branches",
    ),
    "Stack[1] > BatchSplit[1]: what stands here is for 2 rows, but one row goes here": (
        Stack("x", BatchSplit("a", Rows(["a", "b"]), batch_sizes=1)),
        "",
    ),
    "Stack[1] > Average[1] shares out 1 rows of the batch": (
        Stack("x", Average(BatchSplit("a", "b", batch_sizes=2), Rows(["a"]))),
        "here they have to be as many",
    ),
    "Split[1]: what stands here shares out 4 positions, but 3 come here": (
        Split("a", Split("a", "b", splits=2), splits=[4, 3]),
        "",
    ),
    "Stack[1] shares out 6 positions": (
        Stack(Split("a", "b", splits=[3, 4]), Split("a", "b", splits=3)),
        "Stack[0] shares out 7",
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_meaning_is_refused_with_its_place(words: str) -> None:
    setup, advice = REFUSED[words]
    with pytest.raises(CompositionError) as refused:
        route(setup)
    assert words in str(refused.value)
    assert advice in str(refused.value)


def test_what_cannot_be_built_says_where() -> None:
    for build, words in (
        (lambda: Fuse("a", Stack("b", Average("c", "d"))), r"Fuse\[1\] > Stack\[1\]: Average"),
        (lambda: Fuse(Parallel("a", "b"), "c"), r"Fuse\[0\]: Parallel.*put the Fuse inside"),
        (lambda: Stack("a", None), r"Stack\[1\].*not None"),
        (lambda: Fuse("a", None), r"Fuse\[1\].*not None"),
        (lambda: Rows("abc"), "a list"),
        (lambda: Rows(["a", 3]), r"Rows\[1\].*3"),
        (lambda: Rows([]), "at least one"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1, -1]), "batch_sizes"),
        (lambda: BatchSplit("a", "b", batch_sizes=["1", 2]), "batch_sizes"),
    ):
        with pytest.raises(CompositionError, match=words):
            build()


# --- every nesting --------------------------------------------------------------------------------

ROWS, LENGTH, NAMES = 3, 7, "abc"


@pytest.fixture(scope="module")
def model() -> Any:
    found = tiny_model("bert").double()
    for seed, (name, config) in enumerate(zip(NAMES, ("seq_bn", "lora", "par_bn"), strict=True)):
        found.add_adapter(name, config)
        randomise(found.adapters[name], std=0.2, seed=seed)
    return found


@torch.no_grad()
def run(model: Any, setup: Child, inputs: Any = None) -> Tensor:
    inputs = tiny_inputs(model.config, ROWS, LENGTH) if inputs is None else inputs
    found: Tensor = model(**inputs, adapter_names=[] if setup is None else setup)[0]
    return found


def any_setup(random_: random.Random, depth: int, rows: int, length: int) -> Any:
    """A setup of any blocks in any order, for so many rows and positions."""
    kinds = ["name", "name", "Stack", "Average", "Split", "BatchSplit", "Rows"]
    kind = random_.choice(kinds) if depth else "name"

    def inner(rows: int = rows, length: int = length) -> Any:
        return any_setup(random_, depth - 1, rows, length)

    if kind == "name":
        return random_.choice([*NAMES, None])
    if kind == "Stack":
        return Stack(*(child or "a" for child in (inner(), inner())))
    if kind == "Average":
        return Average(inner(), inner(), weights=[1, random_.randint(1, 3)])
    if kind == "Split" and length > 1:
        cut = random_.randint(1, length - 1)
        return Split(inner(length=cut), inner(length=length - cut), splits=[cut, length - cut])
    if kind == "BatchSplit" and rows > 1:
        cut = random_.randint(1, rows - 1)
        return BatchSplit(inner(cut), inner(rows - cut), batch_sizes=[cut, rows - cut])
    return Rows([inner(1) for _ in range(rows)])


@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_as_under_its_own_chain(model: Any, seed: int) -> None:
    random_ = random.Random(seed)
    setup = Parallel(*(any_setup(random_, 3, ROWS, LENGTH) for _ in range(1 + seed % 3)))
    found = run(model, setup)
    for copy, row in itertools.product(range(len(setup)), range(ROWS)):
        alone = run(model, way_of(setup, row, ROWS, copy))[row]
        torch.testing.assert_close(found[copy * ROWS + row], alone, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("seed", range(12))
def test_setups_are_values(seed: int) -> None:
    setup = Parallel(any_setup(random.Random(seed), 3, ROWS, LENGTH), "a")
    through_files = json.loads(json.dumps([to_json(setup), hub_setup(setup)]))
    twins = [from_json(through_files[0]), setup_from_hub(through_files[1])]
    for twin in (*twins, pickle.loads(pickle.dumps(setup)), eval(repr(setup))):
        assert (twin, hash(twin)) == (setup, hash(setup))
        assert route(twin) == route(setup)
    assert setup != Parallel("a", "b")


def test_the_bare_model_can_be_a_branch(model: Any) -> None:
    bare, a = run(model, None), run(model, "a")
    torch.testing.assert_close(run(model, BatchSplit("a", None, **B21))[2], bare[2])
    torch.testing.assert_close(run(model, Parallel(None, "a"))[:ROWS], bare)
    torch.testing.assert_close(run(model, Average("a", None, weights=[1, 0])), a)
    torch.testing.assert_close(run(model, Average("a", None, weights=[0, 1])), bare)
    torch.testing.assert_close(run(model, Split(None, None, splits=[3, 4])), bare)
    assert not torch.allclose(run(model, Split("a", None, splits=[3, 4])), bare, atol=1e-3)


@pytest.mark.parametrize(
    "setup",
    [
        BatchSplit("a", "b", batch_sizes=2),
        Rows(["a", "b"]),
        Stack("a", Rows(["a", "b"])),
        Parallel(Rows(["a", "b"]), "c"),
        BatchSplit("a", batch_sizes=2),
    ],
    ids=repr,
)
def test_a_batch_with_other_rows_is_refused(model: Any, setup: Block) -> None:
    with pytest.raises(CompositionError, match=r"\b3\b|\b6\b"):
        run(model, setup)


# --- what the peer allows -------------------------------------------------------------------------

PEER = {
    Stack: (Fuse, Split, Parallel, BatchSplit, Average),
    Fuse: (Stack,),
    Split: (Split, Stack, BatchSplit, Average),
    Parallel: (Stack, BatchSplit, Average),
    BatchSplit: (Stack, Split, BatchSplit, Average),
    Average: (Stack, Split, BatchSplit),
}
"""What `adapters` 1.3.0 lets stand inside what."""


def block(kind: Any, child: Any, rows: int, length: int) -> Any:
    if kind is BatchSplit:
        return kind(child, child, batch_sizes=rows // 2)
    return kind(child, child, **({"splits": length // 2} if kind is Split else {}))


@pytest.mark.parametrize(
    ("outer", "inner"), [(outer, inner) for outer, kinds in PEER.items() for inner in kinds]
)
def test_all_that_the_peer_allows_is_allowed(outer: Any, inner: Any) -> None:
    rows = 4 if outer is not BatchSplit else 2
    length = 8 if outer is not Split else 4
    assert route(block(outer, block(inner, "a", rows, length), 4, 8)).chains
