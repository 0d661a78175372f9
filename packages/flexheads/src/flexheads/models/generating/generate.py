"""Generation with flexible heads: transformers' ``generate``, under one plan to the end."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from flexheads.composition import Rows, Setup
from flexheads.errors import UnsupportedError
from flexheads.heads.language_modeling import LanguageModelHead
from flexheads.models.calls.tasks import take_tasks
from flexheads.models.generating.plans import GenerationPlansMixin
from flexheads.models.generating.rows import rows_without, sees_all
from flexheads.models.heads.add import AddHeadsMixin
from flexheads.plan import Plan
from flexheads.specs import ArchitectureSpec

_FORWARD = ("last_token", "eos")
"""Where models are pooled that read from left to right; a first token could tell nothing there."""


class GenerationWithHeadsMixin(GenerationPlansMixin, AddHeadsMixin):
    """``generate`` for a class with flexible heads; it stands before transformers' own mixin."""

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
        plan = self._plan_of_call(adapter_names, head, kwargs.pop("task_ids", None))
        self._check_writes(plan)
        original: Any = super()
        return self._generate_under(plan, original.generate, args, kwargs)

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
        head = self._active_lm_head()
        return None if head is None else head.output_embeddings(self._embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Gives the active head an output matrix and a bias; see transformers."""
        if (head := self._active_lm_head()) is not None:
            head.set_output_embeddings(new_embeddings)
            self._changed()

    def _active_lm_head(self) -> LanguageModelHead | None:
        if "_attachment" not in self.__dict__:  # transformers asks while the model is being built
            return None
        active = [self.heads[route.head] for route in self._attachment.runtime.chosen().heads]
        only = active[0] if len(active) == 1 else None
        return only if isinstance(only, LanguageModelHead) else None

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
        whole = [route.head for route in plan.heads if sees_all(route, plan)]
        own = [route for route in plan.heads if not sees_all(route, plan)]
        if len(whole) > 1 or (whole and own):
            raise UnsupportedError(
                f"{[route.head for route in plan.heads]} would all score the same rows; generate "
                "with one language-model head: head=, active_head, or one for each row with Rows."
            )
        if not whole and (without := rows_without(own, plan)):
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
