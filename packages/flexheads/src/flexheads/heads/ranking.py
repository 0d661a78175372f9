"""Ranking and reward models: one score for a sequence, compared within a group of choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from flexheads.errors import LabelError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Samples, TextsOrChoices
from flexheads.heads.labels import InputShape, check_indices, check_numbers
from flexheads.heads.multiple_choice import check_choices, group_texts
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RankingConfig(PooledConfig):
    """Configuration of `RankingHead`.

    Attributes:
        num_choices: Choices of each group, where the rows come flat and each group's are together;
            None where the input tells, as ``(groups, choices, sequence)``, or rows are only
            scored.
    """

    num_choices: int | None = None


class RankingHead(PooledHead):
    """Scores a sequence, as reward models do: higher is better.

    Logits are ``(groups, choices)``, or ``(batch, 1)`` where there are no groups. Labels say which
    choice of each group is the best, ``(groups,)``, or how good each is, ``(groups, choices)``.
    """

    head_type = "ranking"
    config_class: ClassVar[type[RankingConfig]] = RankingConfig
    samples: ClassVar[Samples] = TextsOrChoices()

    @property
    def losses(self) -> tuple[str, ...]:
        return ("bradley_terry", "listwise")

    @property
    def num_outputs(self) -> int:
        return 1

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        where = f"labels of head {self.name!r}"
        choices = check_choices(self.name, shape.choices, self.config.num_choices, shape.rows)
        if choices is None or choices < 2:
            raise LabelError(
                f"{where} compare choices, but the input has no groups of them: give "
                "(groups, choices, sequence), or set num_choices for rows that come flat."
            )
        groups = shape.rows // choices
        if isinstance(given, Tensor) and given.dim() == 2:
            check_numbers(where, given, [(groups, choices)])
        else:
            check_indices(where, given, choices, [(groups,), (groups, choices)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; for ``labels`` see the class."""
        own = self.config.num_choices
        choices = check_choices(self.name, features.choices, own, scores.shape[0])
        logits, given = scores.view(-1, choices or 1), labels.get("labels")
        loss = None if given is None else self.loss(logits, given)
        return head_output(SequenceClassifierOutput, features.output, loss=loss, logits=logits)

    def decode(
        self, output: Any, source: Source | None = None, **options: Any
    ) -> list[dict[str, float] | list[dict[str, Any]]]:
        """The choices of each group, the best first; without groups the score of each row.

        Returns:
            For each group a list of ``{"choice", "score"}``, with the ``"text"`` where the source
            has it; for each row ``{"score"}`` where there are no groups.
        """
        logits = output.logits.float()
        if logits.shape[1] == 1:
            return [{"score": score} for score in logits.flatten().tolist()]
        texts = group_texts(source, *logits.shape)
        found: list[dict[str, float] | list[dict[str, Any]]] = []
        for row, own in zip(logits.tolist(), texts, strict=True):
            choices = [{"choice": n, "score": s} | own[n] for n, s in enumerate(row)]
            found.append(sorted(choices, key=lambda choice: -choice["score"]))
        return found
