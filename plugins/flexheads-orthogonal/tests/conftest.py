"""A tiny architecture of its own, so that the tests need no architecture package."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import flexheads
from flexheads import plugins
from flexheads.specs import ArchitectureSpec, FusedBlock, LayerSpec


class BlockConfig(PretrainedConfig):
    model_type = "orthogonal-toy"

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size, self.vocab_size = 16, 50
        super().__init__(**kwargs)


class Layer(nn.Module):
    """Queries and values from one fused projection, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(16, 32), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query, value = self.fused(hidden).chunk(2, dim=-1)
        hidden = hidden + self.out(query.tanh() * value.mean(dim=1, keepdim=True))
        return hidden + self.down(self.up(hidden).tanh())


class BlockModel(PreTrainedModel):
    config_class = BlockConfig
    base_model_prefix = "toy"

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draws nothing: torch's own initialisation stays."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, return_dict: bool | None = None) -> BaseModelOutput:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


TOY = ArchitectureSpec(
    name="orthogonal-toy",
    model_types=("orthogonal-toy",),
    backbone="orthogonal_toy:BlockModel",
    layers=(
        LayerSpec(
            path="layers",
            query="fused",
            value="fused",
            fused={"query": FusedBlock(0, 2), "value": FusedBlock(1, 2)},
            attention_output="out",
            mlp_in="up",
            mlp_out="down",
        ),
    ),
)


@flexheads.hookimpl
def flexheads_register_architectures() -> list[ArchitectureSpec]:
    """What a package with this architecture would register."""
    return [TOY]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A function that makes the toy with adapter support; always the same weights."""
    module = types.ModuleType("orthogonal_toy")
    module.BlockModel = BlockModel
    module.flexheads_register_architectures = flexheads_register_architectures
    monkeypatch.setitem(sys.modules, "orthogonal_toy", module)
    package = tmp_path / "installed" / "orthogonal_toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: orthogonal-toy\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[flexheads]\ntoy = orthogonal_toy\n")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.setattr(plugins, "_load_once", functools.cache(plugins.load_registry))

    def make() -> Any:
        torch.manual_seed(0)
        return flexheads.init(BlockModel(BlockConfig()).eval())

    return make
