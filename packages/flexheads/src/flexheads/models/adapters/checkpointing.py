"""Gradient checkpointing that ends where gradients end: at the lowest layer with an adapter."""

from __future__ import annotations

from typing import Any


class CheckpointingMixin:
    """Switches checkpointing on without asking for gradients of the embeddings.

    Transformers asks for them where a checkpoint may be a reentrant one, which passes on gradients
    only if one of its inputs has them. Here each checkpoint sees to that by itself, see
    `flexheads.sites.runtime.PlannedCheckpoint`, so that frozen layers below the lowest adapter
    stay out of the backward pass.
    """

    def gradient_checkpointing_enable(self: Any, *args: Any, **kwargs: Any) -> None:
        """Switches checkpointing on; see transformers for the arguments."""
        asked_before = getattr(self, "_require_grads_hook", None) is not None
        super().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[misc]
        asks_now = getattr(self, "_require_grads_hook", None) is not None
        if asks_now and not asked_before and not getattr(self, "_hf_peft_config_loaded", False):
            self.disable_input_require_grads()
