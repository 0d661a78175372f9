"""Blocks are values, and resolve into the rows that follow each chain."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexheads.composition import (
    BatchSplit,
    Parallel,
    Rows,
    Stack,
    from_json,
    parse_composition,
    to_json,
)
from flexheads.errors import CompositionError
from flexheads.routing import route

BLOCKS = [
    Stack("a"),
    Stack("a", "b"),
    Parallel("a", Stack("b", "c")),
    Stack("a", Parallel("b", "c")),
    BatchSplit("a", "b", batch_sizes=[1, 2]),
    Stack("a", BatchSplit("b", Stack("c", "d"), batch_sizes=2)),
    Rows(["a", None, Stack("b", "c")]),
]


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_survives_pickle_json_and_hashing(block):
    assert pickle.loads(pickle.dumps(block)) == block
    assert from_json(to_json(block)) == block
    assert hash(from_json(to_json(block))) == hash(block)


def test_blocks_differ_by_everything_that_they_are():
    assert Stack("a") != Stack("a", "b")
    assert Stack("a", "b") != Parallel("a", "b")
    assert BatchSplit("a", "b", batch_sizes=[1, 2]) != BatchSplit("a", "b", batch_sizes=[2, 1])
    assert len(set(BLOCKS)) == len(BLOCKS)


def test_a_block_cannot_be_changed():
    with pytest.raises(AttributeError, match="immutable"):
        Stack("a").children = ()


@pytest.mark.parametrize(
    ("written", "block"),
    [
        ("a", Stack("a")),
        (["a", "b"], Stack("a", "b")),
        (None, None),
        ([], None),
        (Parallel("a", "b"), Parallel("a", "b")),
        ("", Stack("")),
    ],
)
def test_what_users_write_becomes_a_block(written, block):
    assert parse_composition(written) == block


@pytest.mark.parametrize("written", [[["a", "b"]], 3, Stack, {"a": 1}])
def test_what_is_no_setup_is_refused(written):
    with pytest.raises(CompositionError):
        parse_composition(written)


@pytest.mark.parametrize(
    ("block", "chains", "repeat", "sizes"),
    [
        (None, ((),), 1, None),
        (Stack("a", "b"), (("a", "b"),), 1, None),
        (Parallel("a", Stack("b", "c")), (("a",), ("b", "c")), 2, None),
        (Stack("x", Parallel("a", "b"), "y"), (("x", "a", "y"), ("x", "b", "y")), 2, None),
        (BatchSplit("a", Stack("c", "b"), batch_sizes=[1, 2]), (("a",), ("c", "b")), 1, (1, 2)),
        (
            Parallel(
                BatchSplit("a", "b", batch_sizes=[1, 2]), BatchSplit("c", "d", batch_sizes=[2, 1])
            ),
            (("a",), ("b",), ("c",), ("d",)),
            2,
            (1, 2, 2, 1),
        ),
    ],
)
def test_a_setup_resolves_into_chains(block, chains, repeat, sizes):
    routing = route(block)
    assert (routing.chains, routing.repeat, routing.sizes) == (chains, repeat, sizes)


def test_rows_are_grouped_by_their_chain():
    routing = route(Rows(["a", None, "b", "a"]))
    assert routing.chains == ((), ("a",), ("b",))  # in an order of their own
    assert routing.rows(4) == ([1], [0, 3], [2])


@pytest.mark.parametrize(
    "block",
    [
        Stack(Parallel("a", "b"), Parallel("c", "d", "e")),
        BatchSplit(Parallel("a", "b"), "c", batch_sizes=1),
        Parallel(BatchSplit("a", "b", batch_sizes=2), BatchSplit("b", "c", batch_sizes=1)),
        Stack(BatchSplit("a", "b", batch_sizes=1), Rows(["b"])),
        Rows([Parallel("a", "b"), "a"]),
        BatchSplit(BatchSplit("a", "b", batch_sizes=[1, 1]), "c", batch_sizes=[3, 1]),
    ],
    ids=repr,
)
def test_a_block_without_a_meaning_is_refused(block):
    with pytest.raises(CompositionError):
        route(block)


@pytest.mark.parametrize(
    ("block", "batch", "message"),
    [
        (BatchSplit("a", "b", batch_sizes=[1, 2]), 4, "shares out 3 rows"),
        (Rows(["a", "b"]), 3, "names 2 rows"),
        (Parallel("a", "b"), 3, "shares out 2 rows"),
    ],
)
def test_a_batch_of_another_size_is_refused(block, batch, message):
    with pytest.raises(CompositionError, match=message):
        route(block).rows(batch)


def test_batch_split_names_its_sizes():
    with pytest.raises(CompositionError, match="batch_sizes"):
        BatchSplit("a", "b", batch_sizes=[1, 2, 3])


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12))
def test_every_row_of_rows_has_exactly_one_chain(rows):
    routing = route(Rows(rows))
    groups = routing.rows(len(rows))
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    for chain, group in zip(routing.chains, groups, strict=True):
        assert all((rows[row],) == chain or (rows[row] is None and not chain) for row in group)
