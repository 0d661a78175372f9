"""Generation with flexible heads: transformers' ``generate``, under one plan to the end."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from flexheads.composition import BatchSplit, Block, Rows, Setup, Stack
from flexheads.errors import UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.language_modeling import LanguageModelHead
from flexheads.heads.outputs import head_output
from flexheads.models.add_heads import AddHeadsMixin
from flexheads.models.container import NamedModules
from flexheads.models.inputs import batch_size, repeat_rows
from flexheads.models.tasks import take_tasks
from flexheads.plan import HeadRoute, Plan
from flexheads.routing import Chain, Routing
from flexheads.sites.rows import RowMap
from flexheads.specs import ArchitectureSpec

_FORWARD = ("last_token", "eos")
"""Where models are pooled that read from left to right; a first token could tell nothing there."""

_ADDED = ("cache_position",)
"""What transformers hands to each step by itself, in releases before 5."""


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationPlan(Plan):
    """The plan of a whole generation, which repeats rows for beams and returned sequences.

    Attributes:
        rows: How many rows it names; None where it holds for any number.
        expanded: The plan in which each row stands so many times, one behind the other.
    """

    rows: int | None = None
    expanded: Callable[[int], GenerationPlan] | None = None

    def check_rows(self, rows: int | None) -> None:
        """Refuses a batch that the plan is not for, before rows are repeated.

        Raises:
            CompositionError: If so.
        """
        for routing in (self.routing, *(route.routing for route in self.heads)):
            if rows is not None and routing is not None and not routing.single:
                routing.rows(rows)

    def for_rows(self, rows: int) -> GenerationPlan:
        """The plan for a batch of `rows` rows; this one where it names them, or cannot fit."""
        if self.expanded is None or not self.rows or rows == self.rows or rows % self.rows:
            return self
        return self.expanded(rows // self.rows)


class GenerationWithHeadsMixin(AddHeadsMixin):
    """``generate`` for a class with flexible heads; it stands before transformers' own mixin.

    Nothing of the setup is handed through transformers' loop: the plan holds for the running thread
    from the first call of the encoder to the last of the decoder.
    """

    main_input_name: str
    spec: ClassVar[ArchitectureSpec]
    backbone_class: ClassVar[type[PreTrainedModel]]

    def generate(
        self,
        *args: Any,
        adapter_names: Setup = None,
        head: str | list[str] | Rows | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates with the language-model head that is active; see transformers for the rest.

        Each row of the batch follows its own adapters and head, its beams and returned sequences
        too. `Parallel` repeats the batch, so that it returns the rows of its first branch, then
        those of the second, and so on.

        Args:
            args: As for transformers' ``generate``.
            adapter_names: The adapters of this generation; None is the active setup, an empty list
                none.
            head: The head of this generation; None is the active one, `Rows` one for each row.
            kwargs: As for transformers' ``generate``; ``task`` and ``tasks`` as for `forward`.

        Returns:
            What transformers returns.

        Raises:
            UnsupportedError: If a row has no language-model head, or more than one, or one whose
                vocabulary has another size than that of another row; or if the model reads in both
                directions.
            UnknownNameError: If an adapter or a head does not exist.
            CompositionError: If the setup does not fit the batch.
        """
        adapter_names, head = take_tasks(kwargs, self, adapter_names, head)
        plan = self._call_plan(adapter_names, head)
        self._check_writes(plan)
        original: Any = super()
        names = tuple(inspect.signature(original.generate).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if plan.routing.repeat > 1:
            inputs = _repeated(inputs, plan)
        own = self._generation_plan(plan)
        own.check_rows(_rows_in(inputs, (names[0], self.main_input_name)))
        with self._enter(own):
            return original.generate(**inputs)

    def _call_plan(self, adapter_names: Setup, head: Any = None) -> Plan:
        """The plan of one call: inside of a generation that one's, unless it names another."""
        held = self._attachment.runtime.entered()
        if isinstance(held, GenerationPlan) and adapter_names is None and head is None:
            return held
        return super()._call_plan(adapter_names, head)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's encoder; see transformers."""
        return self._attachment.backbone.get_encoder(*args, **kwargs)

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's decoder, or the backbone where it is one; see transformers."""
        return self._attachment.backbone.get_decoder(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """A linear layer on the output matrix and the bias of the active head, or None.

        It is a view: training it trains the head, and a matrix that is tied is the embeddings.
        """
        if "_attachment" not in self.__dict__:  # transformers asks while the model is being built
            return None
        active = [self.heads[route.head] for route in self._attachment.runtime.active.heads]
        if len(active) != 1 or not isinstance(active[0], LanguageModelHead):
            return None
        return active[0].output_embeddings(self._embeddings())

    def _generation_plan(self, plan: Plan) -> GenerationPlan:
        """A plan as that of a generation, whose inputs are repeated for `Parallel` already.

        It is kept as other plans are, so that compiled code meets the same one again.
        """
        kept = self._attachment.runtime.plans.get(("generation", plan))
        if isinstance(kept, GenerationPlan):
            return kept
        routing = dataclasses.replace(plan.routing, repeat=1)

        @functools.cache
        def expanded(times: int) -> GenerationPlan:
            setup = _repeat_setup(plan.setup, routing, times)
            heads = tuple(_repeat_route(route, times) for route in plan.heads)
            return _as_generation(self._make_plan(setup, heads, plan.skip_layers))

        own = _as_generation(plan, routing=routing, rows=_rows_named(plan), expanded=expanded)
        self._keep_plan(("generation", plan), own)
        return own

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Some classes repeat the rows before the encoder reads them."""
        name, original = "_prepare_encoder_decoder_kwargs_for_generation", super()
        return self._encode(getattr(original, name), inputs_tensor, *args, **kwargs)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The same under its newer name."""
        name, original = "_prepare_text_encoder_decoder_kwargs_for_generation", super()
        return self._encode(getattr(original, name), inputs_tensor, *args, **kwargs)

    def _encode(
        self, original: Callable[..., Any], inputs: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        plan = self._attachment.runtime.entered()
        if not isinstance(plan, GenerationPlan):
            return original(inputs, *args, **kwargs)
        with self._enter(plan.for_rows(inputs.shape[0])):
            return original(inputs, *args, **kwargs)

    # --- who may generate -----------------------------------------------------------------------

    def _check_writes(self, plan: Plan) -> None:
        """Refuses to generate where a row has no head to write with, or several.

        Raises:
            UnsupportedError: If so, or where the model reads in both directions.
        """
        self._check_direction()
        heads = [self.heads[route.head] for route in plan.heads]
        if not heads and issubclass(self.backbone_class, GenerationMixin):
            return  # it scores the vocabulary itself
        for head in heads:
            self._check_head(head)
        whole = [route.head for route in plan.heads if _sees_all(route, plan)]
        own = [route for route in plan.heads if not _sees_all(route, plan)]
        if len(whole) > 1 or (whole and own):
            raise UnsupportedError(
                f"{[route.head for route in plan.heads]} would all score the same rows; generate "
                "with one language-model head: head=, active_head, or one for each row with Rows."
            )
        if not whole and (without := _rows_without(own, plan)):
            raise UnsupportedError(
                f"Nothing scores the vocabulary for {without}. Activate a language-model head with "
                "active_head, or name one with head=; heads here: "
                + (", ".join(f"{n} ({h.head_type})" for n, h in self.heads.items()) or "none")
                + "."
            )
        sizes = {head.name: head.num_outputs for head in heads}
        if len(set(sizes.values())) > 1:
            raise UnsupportedError(
                f"The heads of the rows have vocabularies of different sizes: {sizes}. Generate "
                "with each in a call of its own."
            )

    def _check_direction(self) -> None:
        config = self.config
        two_sides = getattr(config, "is_encoder_decoder", False)
        if two_sides or self.spec.pooling in _FORWARD or getattr(config, "is_decoder", False):
            return
        raise UnsupportedError(
            f"This {type(self).__name__} reads in both directions, so it cannot write one token "
            "after the other. Load it with is_decoder=True."
        )

    def _check_head(self, head: Any) -> None:
        two_sides = getattr(self.config, "is_encoder_decoder", False)
        if not generates(head):
            raise UnsupportedError(
                f"Head {head.name!r} is of type {head.head_type}, which does not generate; "
                f"{'seq2seq_lm' if two_sides else 'causal_lm'} does."
            )
        if getattr(head.config, "side", None) is not None:
            raise UnsupportedError(
                f"Head {head.name!r} reads the {head.config.side} alone; what is written comes "
                "from the decoder."
            )
        if head.writes_labels and not two_sides:
            raise UnsupportedError(
                f"Head {head.name!r} is of type {head.head_type}, for a decoder beside an encoder; "
                f"{type(self).__name__} has none. Use causal_lm."
            )


def generates(head: Any) -> bool:
    """Whether a head, or a class of heads, can write one token after the other."""
    return bool(getattr(head, "generates", False))


# --- rows ---------------------------------------------------------------------------------------


def joined(outputs: Sequence[tuple[HeadRoute, Any]], plan: Plan, backbone: Any) -> Any:
    """One output with the scores of every row in the order of the batch.

    Args:
        outputs: The output of each head, for the rows of its chain.
        plan: The plan of the call.
        backbone: The backbone's output.
    """
    route, first = outputs[0]
    if len(outputs) == 1 and _sees_all(route, plan):
        return first
    parts = [output.logits for _, output in sorted(outputs, key=lambda pair: pair[0].chain or 0)]
    logits = RowMap(route.routing or plan.routing).merge(parts)
    return head_output(type(first), backbone, loss=None, logits=logits)


def keeping(
    positions: int | Tensor,
    labels: Sequence[Mapping[str, Any]],
    plan: Plan,
    heads: NamedModules[PredictionHead],
) -> list[Mapping[str, Any]]:
    """The labels of each head, and for language-model heads the positions that are asked for.

    Args:
        positions: How many of the last, or which; 0 is all.
        labels: The labels of each head of the plan.
        plan: The plan of the call.
        heads: The model's heads.
    """
    if isinstance(positions, int) and not positions:
        return list(labels)
    scoring = [isinstance(heads[route.head], LanguageModelHead) for route in plan.heads]
    return [
        {**given, "logits_to_keep": positions} if scores else given
        for given, scores in zip(labels, scoring, strict=True)
    ]


def step_of(
    plan: Plan, names: Sequence[str], inputs: dict[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one call, and its inputs without those that only some classes know.

    Args:
        plan: The plan in force; one of a generation names fewer rows than its calls may have.
        names: The arguments of the backbone's forward.
        inputs: The inputs, some of which transformers adds in a generation.
    """
    if not isinstance(plan, GenerationPlan):
        return plan, inputs
    unknown = () if "kwargs" in names else set(_ADDED) - set(names)
    known = {name: value for name, value in inputs.items() if name not in unknown}
    return plan.for_rows(batch_size(known)), known


def _sees_all(route: HeadRoute, plan: Plan) -> bool:
    return route.chain is None or (route.routing or plan.routing).single


def _rows_without(routes: Sequence[HeadRoute], plan: Plan) -> str:
    """The rows that none of the heads sees, as words; empty where each is seen."""
    if not routes:
        return "the batch"
    routing = routes[0].routing or plan.routing
    left = set(range(len(routing.chains))) - {route.chain for route in routes}
    if routing.index is not None:
        left &= set(routing.index)
        return f"rows {[r for r, chain in enumerate(routing.index) if chain in left]}" * bool(left)
    return f"the rows of {[routing.chains[chain] for chain in sorted(left)]}" * bool(left)


def _rows_named(plan: Plan) -> int | None:
    """How many rows a plan names; None where it holds for any number."""
    for routing in (plan.routing, *(route.routing for route in plan.heads)):
        if routing is not None and routing.index is not None:
            return len(routing.index)
        if routing is not None and routing.sizes is not None and not routing.single:
            return sum(routing.sizes)
    return None


def _as_generation(plan: Plan, **changes: Any) -> GenerationPlan:
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    return GenerationPlan(**{**fields, **changes})


def _repeat_setup(setup: Block | None, routing: Routing, times: int) -> Block | None:
    """A setup in which each row stands so many times, with chains in the same order."""
    blocks = [_block_of(chain) for chain in routing.chains]
    if routing.index is not None:
        return Rows([blocks[chain] for chain in routing.index for _ in range(times)])
    if routing.sizes is None or routing.single:
        return setup
    return BatchSplit(*blocks, batch_sizes=[size * times for size in routing.sizes])


def _block_of(chain: Chain) -> Setup:
    return Stack(*chain) if chain else None


def _repeat_route(route: HeadRoute, times: int) -> HeadRoute:
    own = route.routing
    if own is None:
        return route
    sizes = None if own.sizes is None else tuple(size * times for size in own.sizes)
    index = None if own.index is None else tuple(c for c in own.index for _ in range(times))
    return dataclasses.replace(
        route, routing=dataclasses.replace(own, sizes=sizes, index=index, repeat=1)
    )


def _rows_in(inputs: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Rows of the inputs of a generation, or None where it begins from nothing."""
    for name in (*names, "input_ids", "inputs_embeds"):
        if isinstance(value := inputs.get(name), Tensor):
            return int(value.shape[0])
    encoded = inputs.get("encoder_outputs")
    return batch_size(encoded) if isinstance(encoded, ModelOutput) else None


def _repeated(inputs: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The inputs of a generation for each branch of `Parallel`.

    Raises:
        UnsupportedError: If they hold a cache, whose rows are not repeated.
    """
    if inputs.get("past_key_values") is not None:
        raise UnsupportedError(
            f"{plan.setup!r} repeats the batch, but not what past_key_values holds. Begin without "
            "a cache, or name the rows with Rows."
        )
    times = plan.routing.repeat
    nested = {
        name: type(value)(**repeat_rows(value, times))
        for name, value in inputs.items()
        if isinstance(value, ModelOutput)
    }
    return {**repeat_rows(inputs, times), **nested}
