"""The matrix of configurations and blocks: each cell compared with what it means by definition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.composition import (
    Average,
    BatchSplit,
    Block,
    Child,
    Fuse,
    MultiTask,
    Parallel,
    Rows,
    Split,
    Stack,
)
from flexheads.errors import CompositionError, ConfigError, UnsupportedError
from flexheads.plugins import registry
from flexheads.sites.base import first_argument, first_tensor
from flexheads.testing.tiny import randomise, tiny_inputs, tiny_model

ROWS, LENGTH = 3, 7
TASKS = (2, 0, 2)
"""The task of each row."""
WEIGHTS, SPLITS = (0.25, 0.75), (3, 4)

BLOCKS: Mapping[str, Block] = {
    "Stack": Stack("a", "b"),
    "Fuse": Fuse("a", "copy"),
    "Split": Split("a", "b", splits=SPLITS),
    "Average": Average("a", "b", weights=WEIGHTS),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[2, 1]),
    "Parallel": Parallel("a", "b"),
    "Rows": Rows(["b", "a", "b"]),
    "Rows with None": Rows(["b", None, "a"]),
    "MultiTask": MultiTask("a", "copy", "b"),
    "Stack in Parallel": Parallel(Stack("a", "b"), Stack("b", "a"), Parallel("a", "b")),
    "BatchSplits in Stack": Stack(
        BatchSplit("a", "b", batch_sizes=[2, 1]), BatchSplit("b", "copy", batch_sizes=[1, 2])
    ),
    "Average in Rows": Rows([Average("a", "b"), "b", Average("b", Stack("a", "copy"))]),
    "BatchSplit in Split": Split(BatchSplit("a", "b", batch_sizes=[2, 1]), "copy", splits=SPLITS),
}
"""What is tried, by the name of its column; for a batch of `ROWS` rows of `LENGTH` tokens."""


class Bench:
    """A tiny model with adapters of one configuration: *a*, *b*, and *copy*, which is *a* again.

    Args:
        architecture: The architecture.
        config: The configuration.
        other: The configuration of *b*; None is the same.
    """

    def __init__(self, architecture: str, config: Any, other: Any = None) -> None:
        self.model: Any = tiny_model(architecture).double()
        self.inputs = tiny_inputs(self.model.config, ROWS, LENGTH)
        self.configs = {"a": config, "b": other or config, "copy": config}
        for seed, (name, own) in enumerate(self.configs.items()):
            self.model.add_adapter(name, own)
            randomise(self.model.adapters[name], std=0.2, seed=seed)
        self.model.adapters["copy"].load_state_dict(self.model.adapters["a"].state_dict())
        self._alone: dict[Child, Tensor] = {}
        self._seen: dict[tuple[str, Child], list[Tensor]] = {}

    def cell(self, block: str) -> str:
        """``"correct"``, or ``"refused: "`` and the reason.

        Args:
            block: The name of a column.

        Raises:
            AssertionError: If it is something else than its definition says.
        """
        setup = BLOCKS[block]
        try:
            with torch.no_grad():
                self._check(setup)
        except (CompositionError, ConfigError, UnsupportedError) as error:
            return f"refused: {_reason(error)}"
        return "correct"

    def _check(self, setup: Block) -> None:
        if isinstance(setup, Fuse):
            self._check_fuse(setup)
        elif any(isinstance(block, _SHARING) for block in setup.blocks()):
            self._check_rows(setup)
        else:
            self._check_places(setup)

    # --- rows -------------------------------------------------------------------------------------

    def _check_rows(self, setup: Block) -> None:
        """Every row is as under its own chain alone."""
        found = self._run(setup)
        copies = found.shape[0] // ROWS
        for copy in range(copies):
            for row in range(ROWS):
                way = way_of(setup, row, ROWS, copy)
                _equal(found[copy * ROWS + row], self._alone_under(way)[row], f"{setup}: {way}")

    def _alone_under(self, way: Child) -> Tensor:
        if way not in self._alone:
            self._alone[way] = self._run(way)
        return self._alone[way]

    def _run(self, setup: Child) -> Tensor:
        how: dict[str, Any] = {"adapter_names": [] if setup is None else setup}
        if isinstance(setup, MultiTask):
            how["task_ids"] = torch.tensor(TASKS)
        found: Tensor = self.model(**self.inputs, **how)[0]
        return found

    def _check_fuse(self, setup: Fuse) -> None:
        """What is the same for all adapters is what attention over them gives."""
        if setup.name not in self.model.adapter_fusions:
            self.model.add_adapter_fusion(setup, config="static")
        _equal(self._run(setup), self._alone_under("a"), "Fuse of twice the same")

    # --- places -----------------------------------------------------------------------------------

    def _check_places(self, setup: Block) -> None:
        """At every place alone, the block gives what its definition makes of its branches' results.

        Deeper places of later layers see what the first have changed; so each acts by itself here.
        """
        plan, sites, acting = self._plan(setup), self.model._attachment.sites, 0
        half = self.model._attachment.depth // 2
        for address in plan.ops:
            site = sites[address]
            if site.layer not in (None, 0, half):
                continue
            if site.kind in ("attention", "prompt"):
                _equal(*self._joined(setup, address), f"{setup} at {address}")
                acting += 1
                continue
            bare, a, b, found = (self._at(address, way) for way in (None, "a", "b", setup))
            call = next((n for n, x in enumerate(bare) if not _same(x, a[n], b[n])), None)
            if call is None:
                continue
            acting += 1
            expected = self._expected(setup, address, bare[call], a[call], b[call])
            _equal(found[call], expected, f"{setup} at {address}")
        assert acting, f"{setup}: nothing acts."

    def _expected(self, setup: Block, address: str, bare: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if isinstance(setup, Average):
            return WEIGHTS[0] * a + WEIGHTS[1] * b
        if isinstance(setup, Split):
            return torch.cat([a[:, : SPLITS[0]], b[:, SPLITS[0] :]], dim=1)
        for name, other in (("a", b), ("b", a)):
            if address not in self._plan(name).ops:
                return other
        kind = self.model._attachment.sites[address].kind
        parts = [self._plan(name).ops[address].chains[0][0] for name in ("a", "b")]
        if kind == "linear" and not any(part.changes_input for part in parts):
            config = self.model.adapters["b"].config
            scales = getattr(config, "composition_mode", "add") == "scale"
            return a * b / bare if scales else a + b - bare
        return self._one_behind_the_other(address, bare, a)

    def _one_behind_the_other(self, address: str, bare: Tensor, a: Tensor) -> Tensor:
        """What *b* makes of the result of *a*, which stands in for that of the model there."""
        site = self.model._attachment.sites[address]
        first, second = (self._plan(name).ops[address].chains[0][0] for name in ("a", "b"))
        module, where = _place(site, None)
        if site.kind == "residual":
            module, where = site.output, "output"
            if not first.replaces_norm:
                a = self._seen_at(module, where, address, None)[0] + (a - bare)
            elif site.norm is None:  # what the layer adds again is taken away
                a = a + self._seen_at(site.residual, site.residual_from, address, None)[0]
        elif getattr(first, "changes_input", False):
            hidden = second.enter(first.enter(self._seen_at(module, "input", address, None)[0]))
            changed = own = site.projection.run(hidden)
            for part in (first, second):
                given = own if part.wants_own_result else changed
                changed = changed + part(hidden, given, site.projection) - given
            whole: Tensor = site.projection.into(bare, changed)
            return whole
        with _hooked(module, functools.partial(_replaced, a), where):
            return self._at(address, "b", fresh=True)[0]

    def _at(self, address: str, way: Child, fresh: bool = False) -> list[Tensor]:
        """What goes on from a place in each call of its module, with nothing acting elsewhere."""
        key = (address, way)
        if fresh or key not in self._seen:
            plans = (self._plan(name) for name in ("a", "b"))
            acting = next(plan for plan in plans if address in plan.ops)
            module, where = _place(self.model._attachment.sites[address], acting)
            found = self._seen_at(module, where, address, way)
            if fresh:
                return found
            self._seen[key] = found
        return self._seen[key]

    def _seen_at(self, module: nn.Module, where: str, address: str, way: Child) -> list[Tensor]:
        plan, runtime, seen = self._plan(way), self.model._attachment.runtime, []
        ops = {address: plan.ops[address]} if address in plan.ops else {}
        runtime.active = dataclasses.replace(plan, ops=ops)

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            given = first_argument(args, kwargs) if output is None else first_tensor(output)
            seen.append(given)

        register: Any = getattr(module, f"register_forward_{_HOOKS[where]}")
        handle = register(note, with_kwargs=True)
        try:
            self.model(**self.inputs)
        finally:
            handle.remove()
            self.model.set_active_adapters(None)
        return seen

    def _joined(self, setup: Block, address: str) -> tuple[Tensor, Tensor]:
        """What a prefix or a prompt adds under a setup, and what it should be."""
        site = self.model._attachment.sites[address]
        width = getattr(site, "width", 0) or self.model.config.hidden_size
        hidden = torch.ones(1, LENGTH, width, dtype=torch.float64)

        def added(way: Child) -> Tensor:
            op = self._plan(way).ops[address]
            if site.kind == "prompt":
                joined: Tensor = op.join(hidden)
                return joined[:, : joined.shape[1] - LENGTH]
            keys, values, _ = op.prefix(hidden)
            return torch.stack([keys, values]).flatten(0, 2)

        acting = [added(name) for name in ("a", "b") if address in self._plan(name).ops]
        found = added(setup)
        if len(acting) == 1:
            return found, acting[0]
        a, b = acting
        if isinstance(setup, Average):
            return found, WEIGHTS[0] * a + WEIGHTS[1] * b
        return found, torch.cat([b, a], dim=1)  # the last one stands in front

    def _plan(self, way: Child) -> Any:
        return self.model._call_plan([] if way is None else way)


def way_of(setup: Child, row: int, rows: int, copy: int) -> Child:
    """The setup of one row, in which no block shares out or repeats rows any more.

    Args:
        setup: The setup.
        row: The row of the batch, or of the part of it that this setup gets.
        rows: How many there are.
        copy: The copy of the batch, as `Parallel` makes them.
    """
    if not isinstance(setup, Block):
        return setup
    if isinstance(setup, MultiTask):
        return way_of(setup[TASKS[row]], row, rows, copy)
    if isinstance(setup, Rows):
        return way_of(setup[row], 0, 1, copy)
    if isinstance(setup, BatchSplit):
        for child, size in zip(setup, setup.batch_sizes, strict=True):
            if row < size:
                return way_of(child, row, size, copy)
            row -= size
    if isinstance(setup, Parallel):
        for child in setup:
            if copy < (own := _copies(child)):
                return way_of(child, row, rows, copy)
            copy -= own
    return setup.with_children(way_of(child, row, rows, copy) for child in setup)


def _copies(setup: Child) -> int:
    """How often a setup repeats the batch."""
    if not isinstance(setup, Block):
        return 1
    counts = [_copies(child) for child in setup]
    return sum(counts) if isinstance(setup, Parallel) else max(counts)


_SHARING = (BatchSplit, MultiTask, Parallel, Rows)
"""Blocks in which rows go ways of their own."""

_HOOKS = {"output": "hook", "input": "pre_hook"}


def _place(site: Any, plan: Any) -> tuple[nn.Module, str]:
    """The module whose input or output is what goes on from a site."""
    if site.kind == "residual" and site.norm is not None:
        replaced = plan is not None and any(plan.ops[site.address].replaces)
        return site.norm, "output" if replaced else "input"
    if site.kind == "residual":
        return site.output, "output"
    if site.kind == "embedding" and site.acts_on == "input":
        return site.host, "input"
    return site.host, "output"


@contextmanager
def _hooked(module: nn.Module, change: Callable[..., Any], where: str) -> Iterator[None]:
    """Changes what a module gives, or gets, before any other hook sees it."""
    register: Any = getattr(module, f"register_forward_{_HOOKS[where]}")
    handle = register(change, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _replaced(tensor: Tensor, module: nn.Module, args: Any, output: Any = None) -> Any:
    if output is None:
        return (tensor, *args[1:])
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def _reason(error: Exception) -> str:
    """The reason in a message, without the place and without advice."""
    text = str(error)
    _, _, reason = text.partition(": ")
    return (reason or text).partition(". ")[0].partition("; ")[0].rstrip(".")


def _same(*tensors: Tensor) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Asserts that tensors are the same, by the size of the largest."""
    scale = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(
        actual / scale, expected / scale, atol=1e-6, rtol=1e-5, msg=lambda text: f"{what}: {text}"
    )


_FIELDS = {
    "adapter_plus": "reduction_factor=4",
    "compacter": "reduction_factor=4",
    "compacter++": "reduction_factor=4",
    "prefix_tuning": "prefix_length=3,bottleneck_size=8",
    "prefix_tuning_flat": "prefix_length=3",
    "prompt_tuning": "prompt_length=3",
    "trainable_tokens": "token_indices=[0,1,2,3,4,5,6,7,8,9]",
}
"""What the defaults of some configurations are too large for in a tiny model, or lack."""


def configurations() -> list[str]:
    """One configuration for each meaning of the registered identifiers, fit for tiny models."""
    found: dict[str, str] = {}
    for spec in registry().methods.values():
        for name, identifier in spec.identifiers.items():
            found.setdefault(repr(identifier), name)
    return [f"{name}[{_FIELDS[name]}]" if name in _FIELDS else name for name in found.values()]
