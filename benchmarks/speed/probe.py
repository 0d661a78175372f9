"""The model that all sides are measured on, its inputs, and the clocks."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from benchmarks.speed.pairing import Clock, cpu_time
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, LlamaConfig, PretrainedConfig

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "probe": lambda: BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    ),
    "bert-base": BertConfig,
    "decoder-1b": lambda: LlamaConfig(
        num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, tie_word_embeddings=True,
    ),
}  # fmt: skip

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
"""What configurations call the probabilities of dropping."""


@dataclass(frozen=True)
class Probe:
    """A random model, and how it is run.

    Attributes:
        model: One of `MODELS`.
        device, dtype: Where, and in what.
        threads: Of torch, on a CPU.
        small: Rows and tokens of most calls.
        many: The same where each row has an adapter of its own.
        train: The same in training.
        keep: The same where kept activations are counted.
    """

    model: str = "probe"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    small: tuple[int, int] = (1, 32)
    many: tuple[int, int] = (32, 16)
    train: tuple[int, int] = (4, 32)
    keep: tuple[int, int] = (32, 128)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The backbone's configuration."""
        return MODELS[self.model]()

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return int(self.config.num_hidden_layers)

    @functools.cached_property
    def bare(self) -> Any:
        """The backbone that everything is compared with."""
        return self.built(AutoModel.from_config)

    def built(self, build: Callable[[Any], Any]) -> Any:
        """A random model of this configuration, in its place and dtype."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = build(copy.deepcopy(self.config))
        return model.to(getattr(torch, self.dtype)).eval()

    def without_dropout(self) -> Probe:
        """The same model, but none that drops anything in training."""
        probe = replace(self)
        for name in DROPOUTS:
            if hasattr(probe.config, name):
                setattr(probe.config, name, 0.0)
        return probe

    def backbone(self) -> Any:
        """One more backbone with the same weights, for something to be done to it."""
        return copy.deepcopy(self.bare)

    def inputs(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Random tokens."""
        ids = torch.randint(
            1000, 30000, size or self.small, generator=torch.Generator().manual_seed(1)
        ).to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"use_cache": False} if self.model.startswith("decoder") else {})

    def require_same(self, ours: Tensor, other: Tensor) -> None:
        """Requires that two sides give the same numbers, up to rounding.

        Random layers make rounding larger, so what counts is how much of the whole differs.

        Raises:
            AssertionError: If they do not.
        """
        far = float((ours.float() - other.float()).norm() / other.float().norm())
        assert far < (1e-4 if self.dtype == "float32" else 0.05), f"they differ by {far:.2g}"

    @property
    def clocks(self) -> Sequence[Clock]:
        """CPU time and wall time; on an accelerator, wall time when all is done there."""
        return [self._synchronised] if self.device != "cpu" else [cpu_time, time.perf_counter]

    def _synchronised(self) -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Calls without gradients."""
    with torch.inference_mode():
        yield


@torch.no_grad()
def stir(modules: nn.Module) -> None:
    """Moves fresh weights away from where an adapter does nothing."""
    generator = torch.Generator().manual_seed(2)
    for parameter in modules.parameters():
        step = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.add_(step.to(parameter))


def hidden(output: Any) -> Tensor:
    """The last hidden state in what a model gives."""
    found: Tensor = output[0]
    return found
