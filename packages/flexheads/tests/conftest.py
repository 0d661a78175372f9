"""A toy architecture, so that the core's tests need no architecture package."""

import dataclasses
import functools
import sys
import types

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from flexheads import plugins
from flexheads._registry import Provider
from flexheads.models.static import init
from flexheads.specs import ArchitectureSpec, LayerSpec, ResidualSite


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, norm_first=False, **kwargs):
        self.norm_first = norm_first
        self.hidden_size = 16
        self.vocab_size = 50
        super().__init__(**kwargs)


class ToyLayer(nn.Module):
    """Mixes tokens by a mean, then a feed-forward network; norms before or behind each."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.norm_first = config.norm_first
        self.mix_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.out = nn.Linear(size, size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 32), nn.Linear(32, size)

    def mix(self, hidden):
        return self.out(self.query(hidden) + hidden.mean(dim=1, keepdim=True))

    def mlp(self, hidden):
        return self.down(self.up(hidden).relu())

    def forward(self, hidden):
        if self.norm_first:
            hidden = hidden + self.mix(self.mix_norm(hidden))
            return hidden + self.mlp(self.mlp_norm(hidden))
        hidden = self.mix_norm(self.mix(hidden) + hidden)
        return self.mlp_norm(self.mlp(hidden) + hidden)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(2))
        self.post_init()

    def _init_weights(self, module):
        """Draws nothing: torch's own initialisation stays."""

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, return_dict=None):
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


def toy_spec(norm_first):
    """The toy's sites. In the post-LN toy the residual is what enters `query`, and `up`."""
    names = {"query": "query", "attention_output": "out", "mlp_in": "up", "mlp_out": "down"}
    attention = ResidualSite(
        output="out",
        residual="mix_norm" if norm_first else "query",
        norm=None if norm_first else "mix_norm",
    )
    feed_forward = ResidualSite(
        output="down",
        residual="mlp_norm" if norm_first else "up",
        norm=None if norm_first else "mlp_norm",
    )
    return ArchitectureSpec(
        name="toy",
        model_types=("toy",),
        backbone="flexheads_toy:ToyModel",
        layers=(LayerSpec(path="layers", attention=attention, feed_forward=feed_forward, **names),),
        embeddings="embeddings",
    )


@pytest.fixture
def toy(monkeypatch):
    """A function that makes a toy model with adapter support: ``toy(norm_first=True)``."""
    module = types.ModuleType("flexheads_toy")
    module.ToyModel = ToyModel
    monkeypatch.setitem(sys.modules, "flexheads_toy", module)
    builtin = plugins.load_registry(environ={"FLEXHEADS_DISABLE_PLUGINS": "bert"})

    def make(norm_first=False, seed=0):
        spec, who = toy_spec(norm_first), Provider("toy", "flexheads-toy", "1.0", "flexheads_toy")
        claims = {
            ("architecture", "toy"),
            ("model type", "toy"),
            ("class with heads", "ToyModelWithHeads"),
        }
        known = dataclasses.replace(
            builtin,
            architectures={"toy": spec},
            claims={**builtin.claims, **dict.fromkeys(claims, (who, spec))},
        )
        monkeypatch.setattr(plugins, "_load_once", functools.cache(lambda: known))
        torch.manual_seed(seed)
        return init(ToyModel(ToyConfig(norm_first=norm_first)).eval())

    return make
