"""What a head sees of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from flexheads.errors import UnsupportedError
from flexheads.heads.layers import LayerMix
from flexheads.heads.pooling import pool


class Features:
    """What a head sees of one forward pass.

    Attributes:
        hidden: The last hidden state, ``(batch, sequence, hidden)``.
        pooler_output: The trained pooler's result, ``(batch, hidden)``, or None.
        attention_mask: ``(batch, sequence)``, or None.
        input_ids: ``(batch, sequence)``, or None.
        pooling: What stands for the sequence, see `flexheads.specs.Pooling`.
        pad, eos: The token ids that pad and that end a sequence, or None.
        scale: What language-model heads multiply the hidden states by.
        choices: Choices per example where the input was ``(batch, choices, sequence)``, or None.
        embeddings: The weight of the input embeddings, ``(vocabulary, embedding size)``.
        undo: The inverse of the invertible adapters that were active.
        rescore: Corrects scores from the embeddings for tokens whose rows an adapter replaces.
        output: The backbone's whole output.
        hidden_states: The hidden states of every layer, where a head asked for them.
        first: Where a prompt stands before the input, the state at the first position of both:
            `pooled` reads it, as the poolers of models do.
        patches_from: Where the positions of patches begin, in a model of images.
        read: Mask and ids of the positions of the encoder, where the model has a decoder too.
    """

    def __init__(
        self,
        output: Any,
        *,
        pooling: str | None = "first_token",
        pad: int | None = None,
        eos: int | None = None,
        scale: float = 1.0,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        choices: int | None = None,
        embeddings: Tensor | None = None,
        undo: Callable[[Tensor], Tensor] | None = None,
        rescore: Callable[[Tensor, Tensor], Tensor] | None = None,
        first: Tensor | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
        patches_from: int = 1,
        read: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.output, self.pooling = output, pooling
        self.pad, self.eos, self.scale = pad, eos, scale
        self.hidden: Tensor = output.last_hidden_state
        self.pooler_output: Tensor | None = output.get("pooler_output")
        self.attention_mask, self.input_ids = attention_mask, input_ids
        self.choices, self.embeddings = choices, embeddings
        self.undo = undo or (lambda hidden: hidden)
        self.rescore = rescore or (lambda hidden, logits: logits)
        self.hidden_states = hidden_states
        self._first, self._read = first, read
        self.patches_from = patches_from
        self._pooled: dict[str, Tensor] = dict(output.get("pooled") or {})
        if first is not None:
            self._pooled["first_token"] = first

    def pooled(self, pooling: str | None = None) -> Tensor:
        """One vector per row: ``(batch, hidden)``; each kind is computed once.

        Args:
            pooling: What stands for the sequence; None is the architecture's own.

        Raises:
            UnsupportedError: If the model has no pooler, or the tokens that tell where the
                sequence ends were not given.
        """
        kind = pooling or str(self.pooling)
        if kind not in self._pooled:
            self._pooled[kind] = pool(self, kind)
        return self._pooled[kind]

    def at(self, layer: int | LayerMix | None) -> Features:
        """The same features, read at another layer.

        Args:
            layer: Number of the hidden states, or what mixes them; None is what the model returns
                as its last.

        Raises:
            UnsupportedError: If there is no such layer, or the layers have different sizes.
        """
        if layer is None:
            return self
        states = self.hidden_states or ()
        if len({state.shape for state in states}) > 1:
            raise UnsupportedError("The layers of this model have different sizes; read the last.")
        if isinstance(layer, int) and not -len(states) <= layer < len(states):
            raise UnsupportedError(
                f"hidden_layer={layer}, but this model has {len(states)} hidden states."
            )
        hidden = states[layer] if isinstance(layer, int) else layer(states)
        return self._with(lambda value: value, self.undo, self.rescore, hidden)

    @property
    def encoder(self) -> Features:
        """The features of the encoder of a model that has a decoder too.

        Raises:
            UnsupportedError: If the model has no such sides.
        """
        output = self.output
        if "encoder_last_hidden_state" not in output:
            raise UnsupportedError('This model has one side; add the head without side="encoder".')
        states = output.get("encoder_hidden_states")
        own = {"last_hidden_state": output.encoder_last_hidden_state, "hidden_states": states}
        mask, ids = self._read
        return Features(
            BaseModelOutput(**own, attentions=output.get("encoder_attentions")),
            pooling=self.pooling,
            pad=self.pad,
            eos=self.eos,
            attention_mask=mask,
            input_ids=ids,
            choices=self.choices,
            embeddings=self.embeddings,
            undo=self.undo,
            rescore=self.rescore,
            hidden_states=states,
        )

    @property
    def scaled(self) -> Tensor:
        """The hidden states as language-model heads read them."""
        return self.hidden if self.scale == 1.0 else self.hidden * self.scale

    def select(
        self,
        take: Callable[[Tensor], Tensor],
        undo: Callable[[Tensor], Tensor] | None,
        rescore: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Features:
        """The features of some rows only.

        Args:
            take: Picks those rows of a tensor.
            undo: The inverse of the invertible adapters of those rows.
            rescore: The correction of scores for the adapters of those rows.
        """
        rows = self.hidden.shape[0]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
                return take(value)
            if isinstance(value, dict):
                return {key: cut(each) for key, each in value.items()}
            return tuple(map(cut, value)) if isinstance(value, tuple) else value

        return self._with(cut, undo, rescore)

    def _with(
        self,
        cut: Callable[[Any], Any],
        undo: Callable[[Tensor], Tensor] | None,
        rescore: Callable[[Tensor, Tensor], Tensor] | None,
        hidden: Tensor | None = None,
    ) -> Features:
        """Features with every tensor cut, and perhaps other hidden states."""
        values = dict(self.output.items())
        if hidden is not None:
            # The trained pooler has read the last layer.
            values |= {"last_hidden_state": hidden, "pooler_output": None, "pooled": None}
        return Features(
            type(self.output)(**{k: cut(v) for k, v in values.items() if k in self.output}),
            pooling=self.pooling,
            pad=self.pad,
            eos=self.eos,
            scale=self.scale,
            attention_mask=cut(self.attention_mask),
            input_ids=cut(self.input_ids),
            choices=self.choices,
            embeddings=self.embeddings,
            undo=undo,
            rescore=rescore,
            first=cut(self._first) if hidden is None else None,
            hidden_states=cut(self.hidden_states),
            patches_from=self.patches_from,
            read=(cut(self._read[0]), cut(self._read[1])),
        )
