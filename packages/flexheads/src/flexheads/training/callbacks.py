"""What a trainer logs of several heads."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from flexheads.heads.outputs import MultiHeadOutput
from flexheads.models.heads.loss_weights import LearnedLossWeight


class LossLog(TrainerCallback):
    """Puts the loss of each head, and learned loss weights, into what the trainer logs.

    ``loss/ner`` is the mean of the head's own loss, without a weight, over the batches since the
    last entry that had labels for it; ``weight/ner`` is what it is multiplied by.

    Callbacks see an entry in turn, so reporters that come before this one see it without; put it
    first where that matters: ``trainer.callback_handler.callbacks.insert(0, LossLog())``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch the model."""
        self.on_train_end(args, state, control)
        self._sums, self._counts = {}, {}
        self._handle = kwargs["model"].register_forward_hook(self._watch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watches no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds to an entry about training."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        found = {f"loss/{head}": float(s) / self._counts[head] for head, s in self._sums.items()}
        model = kwargs["model"]
        for head, weight in model.loss_weights.items():
            if isinstance(weight, LearnedLossWeight):
                found[f"weight/{head}"] = weight.weight(model.heads[head])
        self._sums, self._counts = {}, {}
        logs |= found
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def _watch(self, model: Any, inputs: Any, output: Any) -> None:
        if not model.training or not isinstance(output, MultiHeadOutput):
            return
        for head, loss in output.losses.items():
            self._sums[head] = self._sums.get(head, 0.0) + loss.detach()
            self._counts[head] = self._counts.get(head, 0) + 1
