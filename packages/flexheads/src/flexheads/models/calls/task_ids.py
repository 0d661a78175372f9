"""``task_ids``: the task of each row, checked, and put into the plan of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexheads.composition import Block, MultiTask, Stack
from flexheads.errors import CompositionError
from flexheads.models.calls.inputs import batch_sizes
from flexheads.plan import HeadRoute, Plan
from flexheads.routing import Routing
from flexheads.sites.rows import KnownRows, TensorRows


def with_task_ids(plan: Plan, task_ids: Any) -> Plan:
    """The plan of a call, with the rows of each chain.

    Args:
        plan: The plan of the setup.
        task_ids: For each row the number of its task, ``(batch,)``, or a list of numbers and
            branches; see `flexheads.composition.MultiTask`. None where the setup has no such block.

    Raises:
        CompositionError: If the setup and this do not go together, or there is no such task.
    """
    tasks = plan.routing.tasks
    if tasks is None:
        if task_ids is not None:
            raise CompositionError(
                f"task_ids given, but {plan.setup!r} has no MultiTask whose branches they could "
                'choose. Activate one, such as MultiTask("a", "b"), or leave task_ids out.'
            )
        return plan
    if task_ids is None:
        raise CompositionError(
            f"{plan.setup!r} needs task_ids: for each row of the batch the number of its task, "
            f"0 to {len(tasks) - 1}."
        )
    if isinstance(task_ids, Tensor):
        if task_ids.dim() != 1 or task_ids.is_floating_point() or task_ids.dtype == torch.bool:
            raise CompositionError(
                f"task_ids should be whole numbers, (batch,), not {tuple(task_ids.shape)} of "
                f"{task_ids.dtype}."
            )
        if torch.compiler.is_compiling():
            return _by_tensor(plan, tasks, task_ids)
        task_ids = task_ids.tolist()
    ids = _ids(plan, task_ids)
    return at_rows(plan, plan.routing.assigned([tasks[number] for number in ids]))


def _ids(plan: Plan, task_ids: Sequence[Any]) -> list[int]:
    block: Any = next(filter(_is_multitask, plan.setup.blocks()))  # type: ignore[union-attr]
    ids: list[int] = block.ids(task_ids)
    return ids


def at_rows(plan: Plan, routing: Routing) -> Plan:
    """A plan that serves any rows, for those that a routing names.

    Its chains are those of the plan, or some of those that the operations of the plan serve. Heads
    of chains without rows are left out.
    """
    used = set(routing.index or ())
    heads = tuple(r for r in plan.heads if r.chain is None or r.routing or r.chain in used)
    served = plan.routing if plan.rows is None else plan.rows.routing
    rows = KnownRows(routing.among(served.chains))
    return dataclasses.replace(plan, routing=routing, heads=heads, rows=rows)


def _by_tensor(plan: Plan, tasks: Sequence[int], task_ids: Tensor) -> Plan:
    """The plan of compiled code, which is the same for all numbers that a tensor may hold."""
    own = [route.chain for route in plan.heads if route.chain is not None and route.routing is None]
    chains = range(len(plan.routing.chains))
    if own and sorted(own) != list(chains):
        ways = plan.routing.chains
        lacking = [Stack(*ways[c]) if ways[c] else None for c in chains if own.count(c) != 1]
        raise CompositionError(
            "In compiled code nobody knows how many rows a head sees, so the branches of MultiTask "
            f"need one head each, or none; {lacking} have not. Name heads for all rows with head=, "
            "or call the model without compilation."
        )
    index = task_ids.long()
    if list(tasks) != list(range(len(tasks))):  # some tasks have a branch in common
        index = torch.tensor(tasks, device=index.device)[index]
    rows = TensorRows(index, len(plan.routing.chains))
    return Plan(
        plan.setup, plan.routing, plan.heads, plan.ops, plan.skip_layers, rows, plan.repeat_at
    )


def told_by_tensor(plan: Plan) -> bool:
    """Whether each row has the head of its branch, and nothing but a tensor tells which that is."""
    by_tensor = isinstance(plan.rows, TensorRows)
    return by_tensor and any(r.chain is not None and r.routing is None for r in plan.heads)


def _is_multitask(block: Block) -> bool:
    return isinstance(block, MultiTask)


def by_first_row(heads: Sequence[HeadRoute], routing: Routing) -> tuple[HeadRoute, ...]:
    """The heads of chains in the order in which rows first name them."""
    index = list(routing.index or ())

    def place(route: HeadRoute) -> int:
        own = route.chain is not None and route.routing is None
        return index.index(route.chain) if own else -1  # type: ignore[arg-type]

    return tuple(sorted(heads, key=place))


def check_rows(plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Refuses a batch that has not the rows that a call names, before anything is computed.

    Args:
        plan: The plan of the call.
        inputs: Its inputs, before rows are repeated.

    Raises:
        CompositionError: If so.
    """
    if isinstance(plan.rows, TensorRows):
        named = plan.rows.index.shape[0]
    elif plan.routing.index is not None:
        named = len(plan.routing.index) // plan.routing.repeat
    else:
        return
    sizes = batch_sizes(inputs)
    if sizes and named not in sizes:
        what = "task_ids" if any(map(_is_multitask, plan.setup.blocks())) else "Rows"  # type: ignore[union-attr]
        raise CompositionError(f"{what} names {named} rows, but the batch has {sizes[0]}.")
