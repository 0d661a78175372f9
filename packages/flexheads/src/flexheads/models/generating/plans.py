"""One plan for a whole generation, for models with flexible heads and with their own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flexheads.composition import Setup
from flexheads.models.adapters.mixin import AdapterModelMixin
from flexheads.models.calls.task_ids import at_rows
from flexheads.models.generating.rows import (
    GenerationPlan,
    as_generation,
    repeat_route,
    repeat_setup,
    repeated,
    rows_in,
    rows_named,
)
from flexheads.plan import Plan
from flexheads.sites.repeat import Once


class GenerationPlansMixin(AdapterModelMixin):
    """Runs transformers' ``generate`` under one plan from beginning to end.

    Nothing of the setup is handed through transformers' loop: the plan holds for the running thread
    from the first call of the encoder to the last of the decoder.
    """

    main_input_name: str

    def _generate_under(
        self,
        plan: Plan,
        generate: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What transformers' ``generate`` returns under a plan.

        Args:
            plan: The plan.
            generate: The method of this model.
            args: Its arguments.
            kwargs: Its arguments by name.

        Raises:
            CompositionError: If the plan does not fit the batch.
        """
        names = tuple(inspect.signature(generate).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if plan.routing.repeat > 1:
            inputs = repeated(inputs, plan)
        own = self._generation_plan(plan)
        own.check_rows(rows_in(inputs, (names[0], self.main_input_name)))
        with self._enter(own):
            return generate(**inputs)

    def _call_plan(self, adapter_names: Setup, head: Any = None) -> Plan:
        """The plan of one call: inside of a generation that one's, unless it names another."""
        held = self._attachment.runtime.entered()
        if isinstance(held, GenerationPlan) and adapter_names is None and head is None:
            return held
        return super()._call_plan(adapter_names, head)

    def _generation_plan(self, plan: Plan) -> GenerationPlan:
        """A plan as that of a generation, whose inputs are repeated for `Parallel` already.

        It is kept as other plans are, so that compiled code meets the same one again.
        """
        plans = self._attachment.runtime.plans
        kept = plans.get(("generation", plan))
        if isinstance(kept, GenerationPlan):
            return kept
        routing = dataclasses.replace(plan.routing, repeat=1)

        @functools.cache
        def expanded(times: int) -> GenerationPlan:
            heads = tuple(repeat_route(route, times) for route in plan.heads)
            if routing.index is not None:
                own = dataclasses.replace(plan, heads=heads)
                return as_generation(at_rows(own, routing.repeated(times)))
            setup = repeat_setup(plan.setup, routing, times)
            return as_generation(self._make_plan(setup, heads, plan.skip_layers))

        own = as_generation(
            plan,
            routing=routing,
            named=rows_named(plan),
            expanded=expanded,
            copies=plan.routing.repeat,
        )
        plans.keep(("generation", plan), own)
        return own

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Some classes repeat the rows before the encoder reads them."""
        name, original = "_prepare_encoder_decoder_kwargs_for_generation", super()
        return self._encode(getattr(original, name), inputs_tensor, model_kwargs, *args, **kwargs)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The same under its newer name."""
        name, original = "_prepare_text_encoder_decoder_kwargs_for_generation", super()
        return self._encode(getattr(original, name), inputs_tensor, model_kwargs, *args, **kwargs)

    def _encode(
        self,
        original: Callable[..., Any],
        inputs: Tensor,
        given: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Runs the encoder under the plan of the generation.

        Where branches differ in the decoder only, it reads one copy of the batch.

        Args:
            original: Transformers' method.
            inputs: What the encoder reads.
            given: What goes with it.
            args: Further arguments of the method.
            kwargs: Further arguments by name.
        """
        plan = self._attachment.runtime.entered()
        if not isinstance(plan, GenerationPlan):
            return original(inputs, given, *args, **kwargs)
        plan = plan.for_rows(inputs.shape[0])
        if plan.repeat_at is None or plan.copies == 1:
            with self._enter(plan):
                return original(inputs, given, *args, **kwargs)
        once = Once(inputs.shape[0] // plan.copies, plan.copies)
        with self._enter(dataclasses.replace(plan, copies=1)):  # transformers may come here twice
            encoded = original(inputs[: once.rows], once.first(given), *args, **kwargs)
        return {**given, "encoder_outputs": once.everywhere(encoded["encoder_outputs"])}
