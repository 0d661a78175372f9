"""Multiple choice: one score for each of several continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import MultipleChoiceModelOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PooledHead
from flexheads.heads.classification import check_top_k
from flexheads.heads.config import PooledConfig, by_number, check_names
from flexheads.heads.features import Features
from flexheads.heads.inputs import Choices, Samples
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MultipleChoiceConfig(PooledConfig):
    """Configuration of `MultipleChoiceHead`.

    Attributes:
        num_choices: Choices per example, for inputs that come flat as
            ``(batch * choices, sequence)``; None where every input tells.
        label2id: Name of each choice, to its number.
    """

    num_choices: int | None = None
    label2id: Mapping[str, int] | None = None
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_choices is not None:
            check_names(self.label2id, self.num_choices)


class MultipleChoiceHead(PooledHead):
    """Scores each choice. Logits are ``(batch, choices)``."""

    head_type = "multiple_choice"
    config_class = MultipleChoiceConfig
    samples: ClassVar[Samples] = Choices()

    @property
    def num_outputs(self) -> int:
        return 1

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            choices = self._choices(shape.choices, shape.rows)
            where, examples = f"labels of head {self.name!r}", shape.rows // choices
            check_indices(where, given, choices, [(examples,), (examples, 1)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)``, the number of the right choice.

        Raises:
            ConfigError: If neither the input nor the configuration tells the number of choices, or
                they contradict each other.
        """
        logits = scores.view(-1, self._choices(features.choices, scores.shape[0]))
        given = labels.get("labels")
        return MultipleChoiceModelOutput(
            loss=None if given is None else self.loss(logits, given),
            logits=logits,
            hidden_states=features.output.get("hidden_states"),
            attentions=features.output.get("attentions"),
        )

    def decode(
        self,
        output: Any,
        source: Source | None = None,
        *,
        top_k: int | None = None,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        """The choices of each example, the best first.

        Args:
            output: What `forward` returned.
            source: The inputs; its texts, one for each choice of each example, are repeated.
            top_k: How many choices at most; None gives all.
            options: None more.

        Returns:
            For each example a list of ``{"choice", "label", "score"}``: number, name and
            probability, and the ``"text"`` where the source has it.

        Raises:
            ConfigError: If `top_k` is smaller than 1.
        """
        check_top_k(top_k)
        shares = output.logits.float().softmax(-1)
        names = by_number(self.config.label2id or {})
        found = []
        for row, texts in zip(shares.tolist(), group_texts(source, *shares.shape), strict=True):
            choices = [
                {"choice": number, "label": names.get(number, f"LABEL_{number}"), "score": score}
                | texts[number]
                for number, score in enumerate(row)
            ]
            found.append(sorted(choices, key=lambda choice: -choice["score"])[:top_k])
        return found

    def _choices(self, given: int | None, rows: int) -> int:
        choices = check_choices(self.name, given, self.config.num_choices, rows)
        if choices is None:
            raise ConfigError(
                f"Head {self.name!r} cannot tell the number of choices: give inputs of shape "
                "(batch, choices, sequence), or set num_choices."
            )
        return choices


def check_choices(head: str, given: int | None, own: int | None, rows: int) -> int | None:
    """The number of choices of a call; None where nothing tells.

    Args:
        head: The head's name, for messages.
        given: Choices per example in the input, where it has that dimension.
        own: ``num_choices`` of the configuration.
        rows: Rows of the input, with those of all choices.

    Raises:
        ConfigError: If the two contradict each other, or the rows do not divide into choices.
    """
    if given is not None and own is not None and given != own:
        raise ConfigError(
            f"Head {head!r} has num_choices={own}, but the input has {given} choices per example. "
            "Give that many, or add the head with num_choices=None, so that every input tells."
        )
    choices = own if given is None else given
    if choices is not None and rows % choices:
        raise ConfigError(
            f"Head {head!r} has num_choices={choices}, but the input has {rows} rows, which do not "
            f"divide into groups of {choices}."
        )
    return choices


def group_texts(source: Source | None, groups: int, choices: int) -> list[list[dict[str, Any]]]:
    """The text of each choice of each group as ``{"text": text}``; empty where there is none."""
    texts = None if source is None else source.texts
    if texts is None or len(texts) != groups * choices:
        return [[{} for _ in range(choices)] for _ in range(groups)]
    named = [{"text": text} for text in texts]
    return [named[begin : begin + choices] for begin in range(0, len(named), choices)]
