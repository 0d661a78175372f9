"""What the loss of each head counts in the loss of several: fixed, or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from flexheads.errors import ConfigError, UnknownNameError
from flexheads.heads.base import PredictionHead
from flexheads.heads.losses import NUMBERS
from flexheads.models.container import NamedModules
from flexheads.models.heads.add import AddHeadsMixin

LEARNED: Literal["learned"] = "learned"
"""What stands for a weight that is trained."""


class LossWeight(nn.Module):
    """A fixed weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def weight(self, head: PredictionHead) -> float:
        """What the loss of a head is multiplied by."""
        return self.value

    def forward(self, loss: Tensor, head: PredictionHead) -> Tensor:
        """What the loss of a head adds to that of all."""
        return loss * self.value

    def described(self) -> Any:
        """How a saved configuration says it."""
        return self.value


class LearnedLossWeight(LossWeight):
    """A weight by the uncertainty of the task (Kendall et al., arXiv:1705.07115).

    With ``s`` the logarithm of the variance, a loss ``L`` adds ``exp(-s) * L + s / 2``, and that of
    a head that predicts numbers ``exp(-s) * L / 2 + s / 2``. It starts with ``s = 0``.
    """

    def __init__(self) -> None:
        super().__init__(1.0)
        self.log_variance = nn.Parameter(torch.zeros(()))

    def weight(self, head: PredictionHead) -> float:
        return float(self._weight(head).detach())

    def forward(self, loss: Tensor, head: PredictionHead) -> Tensor:
        return loss * self._weight(head) + self.log_variance / 2

    def described(self) -> Any:
        return LEARNED

    def _weight(self, head: PredictionHead) -> Tensor:
        numbers = set(head.losses) <= set(NUMBERS)
        return torch.exp(-self.log_variance) * (0.5 if numbers else 1.0)


class LossWeightsMixin(AddHeadsMixin):
    """Weights of the losses of heads that run together.

    Attributes:
        loss_weights: The weights by head; a head without one counts as it is.
    """

    loss_weights: NamedModules[LossWeight]

    def set_loss_weights(
        self, weights: Mapping[str, float | Literal["learned"]] | Literal["learned"] | None
    ) -> None:
        """Says what the loss of each head counts where several heads run.

        Learned weights are parameters of the model, so set them before an optimizer is made.

        Args:
            weights: For each head a number, or ``"learned"`` for one that is trained, by the
                uncertainty of the task (arXiv:1705.07115); heads that are not named keep theirs.
                ``"learned"`` is that for every head that there is; None takes all weights away.

        Raises:
            UnknownNameError: If there is no such head; nothing is changed then.
            ConfigError: If a weight is no number from 0 on.
        """
        given = dict.fromkeys(self.heads, LEARNED) if weights == LEARNED else weights or {}
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"Loss weights are given by head, or as {LEARNED!r}, not {weights!r}."
            )
        built = {name: self._loss_weight(name, value) for name, value in given.items()}
        for name in list(self.loss_weights) if weights is None else ():
            self.loss_weights.drop(name)
        for name, weight in built.items():
            self.loss_weights.put(name, weight)

    def get_loss_weights(self) -> dict[str, float]:
        """What the loss of each head is multiplied by at present."""
        return {
            name: self.loss_weights[name].weight(head) if name in self.loss_weights else 1.0
            for name, head in self.heads.items()
        }

    def _loss_weight(self, name: str, value: Any) -> LossWeight:
        if name not in self.heads:
            raise UnknownNameError("head", name, self.heads, "Add it before its loss is weighted.")
        if value == LEARNED:
            device = next((p.device for p in self.heads[name].parameters()), None)
            return LearnedLossWeight().to(device)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"The loss weight of head {name!r} is {value!r}, and should be a number from 0 on, "
                f"or {LEARNED!r}."
            )
        return LossWeight(float(value))

    def _total_loss(self, outputs: Sequence[tuple[str, Any]]) -> Tensor | None:
        """The weighted sum of the losses of those heads that had labels."""
        losses = []
        for name, output in outputs:
            loss = output.get("loss")
            if loss is not None and name in self.loss_weights:
                loss = self.loss_weights[name](loss, self.heads[name])
            losses += [] if loss is None else [loss]
        return cast(Tensor, sum(losses[1:], losses[0])) if losses else None

    def delete_head(self, head_name: str) -> None:
        """Removes a head, and its loss weight; where it was active it is no more.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        super().delete_head(head_name)
        if head_name in self.loss_weights:
            self.loss_weights.drop(head_name)

    def _active_head_modules(self) -> list[nn.Module]:
        routes = self._attachment.runtime.active.heads
        weights = [self.loss_weights[r.head] for r in routes if r.head in self.loss_weights]
        return [*super()._active_head_modules(), *weights]
