"""The same numbers as PEFT on the same weights, on BERT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexheads
from flexheads.testing import randomise, tiny_inputs, tiny_static
from flexheads_orthogonal import BOFTConfig, OFTConfig

peft = pytest.importorskip("peft")
pytest.importorskip("flexheads_bert")

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALL = {"attn_matrices": ("q", "k", "v", "o"), "intermediate": True, "output": True}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "oft": (OFTConfig, {"oft_block_size": 8}),
    "oft-two-terms": (OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "oft-three-terms": (OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft-seven-terms": (OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": 7}),
    "oft-exact": (OFTConfig, {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft-shared": (OFTConfig, {"oft_block_size": 8, "block_share": True}),
    "oft-constrained": (OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 0.5}),
    "boft": (BOFTConfig, {"boft_block_size": 4}),
    "boft-number": (BOFTConfig, {"boft_block_size": 0, "boft_block_num": 8}),
    "boft-two-factors": (BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "boft-four-factors": (BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 4}),
    "boft-dropout": (
        BOFTConfig,
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5},
    ),
}

# PEFT asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

each = pytest.mark.parametrize("case", CASES)


class BlockDiagonal:
    """PEFT's extension for CUDA in plain torch; without it PEFT would use one factor."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*level) for level in blocks])


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)


def pair(case: str) -> tuple[Any, Any, dict[nn.Parameter, nn.Parameter]]:
    """Our model, PEFT's, and the parameters of ours with those of PEFT's, the same in value."""
    config_class, fields = CASES[case]
    theirs_class = {OFTConfig: peft.OFTConfig, BOFTConfig: peft.BOFTConfig}[config_class]
    base = tiny_static("BertForSequenceClassification", **NO_DROPOUT)
    config = theirs_class(
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["bert.pooler.dense"],
        **fields,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = flexheads.init(base)
    ours.add_adapter("a", config=config_class(**ALL, **fields), set_active=True)
    randomise(ours.adapters["a"], std=0.1)
    same = {}
    for address, part in ours.adapters["a"].parts.items():
        layer = theirs.get_submodule(f"base_model.model.bert.{ours._attachment.paths()[address]}")
        for name, parameter in part.named_parameters():
            their = (
                layer.oft_R["default"].weight
                if config_class is OFTConfig
                else getattr(layer, name)["default"]
            )
            same[parameter] = their
            with torch.no_grad():
                their.copy_(parameter)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert {id(p) for p in same.values()} == {id(p) for p in trained}
    ours.train_adapter("a")
    return ours, theirs, same


@each
def test_outputs_and_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, same = pair(case)
    inputs = tiny_inputs(ours.config)
    # Both draw in the same way, but not equally often; so here a draw tells by its size alone. The
    # permutation is its own inverse, because PEFT looks at it from the other side.
    monkeypatch.setattr(torch, "randperm", lambda size, **_: torch.arange(size).flip(0))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([1]))
    for training in (False, True):
        outputs = [m.train(training)(**inputs).logits for m in (ours, theirs)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, outputs[0].numel()).view_as(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for parameter, other in same.items():
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0)
        torch.testing.assert_close(parameter, other, atol=1e-7, rtol=0)


@each
def test_merged_weights(case: str) -> None:
    ours, theirs, _ = pair(case)
    ours.merge_adapter("a")
    theirs.eval().merge_and_unload()
    for path in ("bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"):
        merged = theirs.base_model.model.get_submodule(path).weight
        torch.testing.assert_close(ours.get_submodule(path).weight, merged, atol=1e-5, rtol=0)
