"""The modules that heads are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flexheads.activations import activation
from flexheads.heads.config import FeedForwardConfig
from flexheads.methods.base import new_linear


class Stacked(nn.Module):
    """Linear layers with dropout before each, an activation and perhaps a norm between them.

    Args:
        sizes: Sizes from the input to the output; one layer between each two.
        config: Activation, norms, and whether the last layer has a bias.
        dropout: Dropout probability.
        eps: For the layer norms.
    """

    def __init__(
        self, sizes: Sequence[int], config: FeedForwardConfig, dropout: float, eps: float = 1e-12
    ) -> None:
        super().__init__()
        last = len(sizes) - 2
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            bias = config.bias or number < last
            self.add_module(str(number), new_linear(inputs, outputs, bias=bias))
            if config.layer_norm and number < last:
                self.add_module(f"norm_{number}", nn.LayerNorm(outputs, eps=eps))
        self.depth = len(sizes) - 1
        self.activation = activation(config.activation_function)
        self.normed = config.layer_norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., sizes[0])`` to ``(..., sizes[-1])``."""
        for number in range(self.depth):
            hidden = self.get_submodule(str(number))(self.dropout(hidden))
            if number < self.depth - 1:
                if self.activation is not None:
                    hidden = self.activation(hidden)
                if self.normed:
                    hidden = self.get_submodule(f"norm_{number}")(hidden)
        return hidden


class LayerMix(nn.Module):
    """A learned weighted sum of all hidden states (ELMo, arXiv:1802.05365, equation 1).

    Args:
        count: Number of hidden states, the embeddings included.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The sum of `states`, each ``(batch, sequence, hidden)``, by their softmaxed weights."""
        weights = self.weights.softmax(dim=0)
        first, *others = (w * state for w, state in zip(weights, states, strict=True))
        mixed: Tensor = self.scale * sum(others, first)
        return mixed


class AttentionPooling(nn.Module):
    """One vector for a sequence, by a learned query (arXiv:1703.03130 with one hop).

    It starts as the mean over the sequence.

    Args:
        size: The hidden size.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """The weighted mean, ``(batch, hidden)``.

        Args:
            hidden: ``(batch, sequence, hidden)``.
            real: Which positions are no padding, ``(batch, sequence)``; None is all.
        """
        scores = hidden @ self.query
        if real is not None:
            scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1).unsqueeze(1)
        pooled: Tensor = (weights @ hidden).squeeze(1)
        return pooled
