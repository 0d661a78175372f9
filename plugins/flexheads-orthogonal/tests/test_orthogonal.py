"""OFT and BOFT: what they compute, by the papers, and that they work like any other method."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.testing import randomise
from flexheads_orthogonal import BOFTConfig, OFTConfig
from flexheads_orthogonal.boft import butterfly
from flexheads_orthogonal.rotations import apply_blocks, cayley, cayley_neumann, some

ALL = {"attn_matrices": ("q", "v", "o"), "intermediate": True, "output": True}
CONFIGS = {
    "oft": OFTConfig(**ALL, oft_block_size=4),
    "oft-exact": OFTConfig(**ALL, r=2, oft_block_size=0, use_cayley_neumann=False),
    "oft-shared": OFTConfig(**ALL, oft_block_size=4, block_share=True),
    "oft-constrained": OFTConfig(**ALL, oft_block_size=4, coft=True, eps=0.5),
    "boft": BOFTConfig(**ALL),
    "boft-butterfly": BOFTConfig(**ALL, boft_n_butterfly_factor=3),
    "boft-number": BOFTConfig(
        **ALL, boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2
    ),
}
IDS = torch.arange(12).view(2, 6)

each = pytest.mark.parametrize("name", CONFIGS)


def hidden_of(model: Any, **call: Any) -> Tensor:
    return model(IDS, **call).last_hidden_state


def adapted(toy: Callable[[], Any], config: Any) -> Any:
    model = toy()
    model.add_adapter("a", config=config, set_active=True)
    randomise(model.adapters["a"], std=0.2)
    return model


def skew(*shape: int, std: float = 1.0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * std
    return (drawn - drawn.transpose(-2, -1)).double()


def test_the_cayley_transform_is_a_rotation() -> None:
    blocks = cayley(skew(3, 5, 5))
    identity = torch.eye(5).double()
    torch.testing.assert_close(blocks @ blocks.mT, identity.expand(3, 5, 5))
    torch.testing.assert_close(torch.linalg.det(blocks), torch.ones(3).double())
    one = skew(5, 5)
    expected = (identity - one) @ torch.linalg.inv(identity + one)
    torch.testing.assert_close(cayley(one), expected)


def test_the_series_comes_near_to_it() -> None:
    small = skew(2, 4, 4, std=0.05)
    powers = [torch.linalg.matrix_power(small, k) for k in range(6)]
    by_hand = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4]
    torch.testing.assert_close(cayley_neumann(small, 5), by_hand)
    torch.testing.assert_close(cayley_neumann(small, 2), powers[0] + 2 * powers[1])
    errors = [(cayley_neumann(small, k) - cayley(-small)).abs().max() for k in (2, 4, 5, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


def test_half_precision_goes_through_single_precision() -> None:
    assert cayley(skew(2, 4, 4).to(torch.bfloat16)).dtype == torch.bfloat16


def test_blocks_stand_on_the_diagonal() -> None:
    blocks, hidden = torch.randn(3, 4, 4), torch.randn(2, 5, 12)
    expected = hidden @ torch.block_diag(*blocks)
    torch.testing.assert_close(apply_blocks(hidden, blocks), expected)
    shared = hidden @ torch.block_diag(*[blocks[0]] * 3)
    torch.testing.assert_close(apply_blocks(hidden, blocks[:1]), shared)


def test_the_butterfly_pairs_blocks_that_lie_further_apart_on_each_level() -> None:
    # Width 16, blocks of 4, so halves of 2: level 1 swaps inside pairs, level 2 inside fours.
    assert butterfly(16, 4, 0).tolist() == list(range(16))
    level1 = [0, 1, 4, 5, 2, 3, 6, 7]
    assert butterfly(16, 4, 1).tolist() == level1 + [8 + i for i in level1]
    level2 = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert butterfly(16, 4, 2).tolist() == level2


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_by_its_definition(toy: Callable[[], Any], factors: int) -> None:
    config = BOFTConfig(attn_matrices="o", boft_n_butterfly_factor=factors)
    model = adapted(toy, config)
    part = model.adapters["a"].parts["layers.1.attention_output"]
    rotation = torch.eye(16)
    for level in range(factors):
        order = butterfly(16, 4, level)
        p = torch.zeros(16, 16)
        p[torch.arange(16), order] = 1
        skewed = 0.5 * (part.boft_R[level] - part.boft_R[level].mT)
        rotation = p @ torch.block_diag(*cayley(skewed)) @ p.T @ rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
    assert (rotation.abs() > 1e-6).sum(1).tolist() == [4 * 2 ** (factors - 1)] * 16
    host, hidden = model.layers[1].out, torch.randn(2, 5, 16)
    expected = (hidden @ rotation @ host.weight.T) * part.boft_s.view(-1) + host.bias
    torch.testing.assert_close(host(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [False, True])
def test_oft_by_its_definition(toy: Callable[[], Any], share: bool) -> None:
    config = OFTConfig(
        attn_matrices="o", oft_block_size=4, use_cayley_neumann=False, block_share=share
    )
    model = adapted(toy, config)
    part = model.adapters["a"].parts["layers.0.attention_output"]
    blocks = []
    for vector in part.weight:
        q = torch.zeros(4, 4)
        q[0, 1], q[0, 2], q[0, 3], q[1, 2], q[1, 3], q[2, 3] = vector
        blocks.append(cayley(q - q.T))
    rotation = torch.block_diag(*(blocks * 4 if share else blocks))
    host, hidden = model.layers[0].out, torch.randn(2, 5, 16)
    expected = (hidden @ rotation) @ host.weight.T + host.bias
    torch.testing.assert_close(host(hidden), expected, atol=1e-5, rtol=0)


@each
def test_identity_at_the_start_merging_and_removal(toy: Callable[[], Any], name: str) -> None:
    model = toy()
    before = hidden_of(model)
    model.add_adapter("a", config=CONFIGS[name], set_active=True)
    torch.testing.assert_close(hidden_of(model), before, atol=1e-6, rtol=0)
    randomise(model.adapters["a"], std=0.2)
    acting = hidden_of(model)
    assert not torch.allclose(acting, before, atol=1e-3)
    model.merge_adapter("a")
    torch.testing.assert_close(hidden_of(model), acting, atol=1e-5, rtol=0)
    model.reset_adapter()
    model.delete_adapter("a")
    assert torch.equal(hidden_of(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each
def test_a_fused_projection_is_as_two(toy: Callable[[], Any], name: str) -> None:
    """The rotation for the query leaves what the value is given as it is."""
    config = CONFIGS[name].replace(attn_matrices=("q",), intermediate=False, output=False)
    model = adapted(toy, config)
    part, host = model.adapters["a"].parts["layers.0.query"], model.layers[0].fused
    hidden = torch.randn(2, 5, 16)
    weight, bias = part.merged(host.weight[:16], host.bias[:16])
    expected = torch.cat([hidden @ weight.T + bias, host.forward(hidden)[..., 16:]], dim=-1)
    torch.testing.assert_close(host(hidden), expected, atol=1e-5, rtol=0)


@each
def test_every_parameter_is_trained(toy: Callable[[], Any], name: str) -> None:
    model = adapted(toy, CONFIGS[name])
    model.train_adapter("a")
    (hidden_of(model.train()) * torch.randn(2, 6, 16)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.adapters["a"].parameters())
    assert not any(p.grad is not None for p in model.layers[0].out.parameters())


@each
def test_files_bring_the_adapter_back(toy: Callable[[], Any], name: str, tmp_path: Path) -> None:
    model = adapted(toy, CONFIGS[name])
    acting = hidden_of(model)
    model.save_adapter(tmp_path / "alone", "a")
    other = toy()
    other.load_adapter(tmp_path / "alone", load_as="b", set_active=True)
    assert torch.equal(hidden_of(other), acting)
    assert other.adapters["b"].config == model.adapters["a"].config
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(hidden_of(type(model).from_pretrained(tmp_path / "whole")), acting)


@pytest.mark.parametrize("name", ["oft", "boft-butterfly"])
def test_rows_and_stacks(toy: Callable[[], Any], name: str) -> None:
    model = adapted(toy, CONFIGS[name])
    model.add_adapter("b", config="lora[intermediate_lora=True]")
    randomise(model.adapters["b"], std=0.2)
    alone = {one: hidden_of(model, adapter_names=one) for one in "ab"}
    setup = flexheads.BatchSplit("a", "b", batch_sizes=[1, 1])
    mixed = hidden_of(model, adapter_names=setup)
    expected = torch.stack([alone["a"][0], alone["b"][1]])
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)
    stacked = hidden_of(model, adapter_names=["a", "b"])
    assert min((stacked - alone[one]).abs().max() for one in "ab") > 1e-3


def test_dropout_leaves_blocks_out_in_training_only(toy: Callable[[], Any]) -> None:
    config = OFTConfig(attn_matrices="o", oft_block_size=4, module_dropout=0.5)
    part = adapted(toy, config).adapters["a"].parts["layers.0.attention_output"]
    hidden = torch.randn(1, 1, 16)
    idle = (part.train().enter(hidden) == hidden).view(4, 4).all(dim=1)
    assert idle.sum() == 2, "half of four blocks"
    assert not (part.eval().enter(hidden) == hidden).view(4, 4).all(dim=1).any()
    assert some(8, 0.3, hidden.device).sum() == 2


def test_butterfly_dropout_leaves_blocks_of_one_factor_out(toy: Callable[[], Any]) -> None:
    config = BOFTConfig(attn_matrices="o", boft_n_butterfly_factor=2, boft_dropout=0.99)
    part = adapted(toy, config).adapters["a"].parts["layers.0.attention_output"].train()
    seen = []
    part._rotate = lambda hidden, rotations: seen.append(rotations) or hidden
    part.enter(torch.randn(1, 1, 16))
    idle = (seen[0] == torch.eye(4)).all(dim=-1).all(dim=-1)
    assert sorted(idle.sum(dim=1).tolist()) == [0, 3]


def test_the_constrained_variant_stays_near_the_identity(toy: Callable[[], Any]) -> None:
    config = OFTConfig(attn_matrices="o", oft_block_size=4, coft=True, eps=0.1)
    part = adapted(toy, config).adapters["a"].parts["layers.0.attention_output"]
    raw = part.weight.detach().clone()
    bound = 0.1 / math.sqrt(4)
    norms = torch.linalg.matrix_norm(part.eval().skew())
    torch.testing.assert_close(norms, torch.full((4,), bound))
    assert torch.equal(part.weight, raw), "nothing is trained here"
    part.train().skew()
    torch.testing.assert_close(part.weight.norm(dim=1) * math.sqrt(2), torch.full((4,), bound))
    inside = part.weight.detach().clone().mul_(0.5)
    part.weight.data.copy_(inside)
    assert torch.equal(part.skew()[:, 0, 1], inside[:, 0])


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (OFTConfig, {"r": 2}, "give one of r"),
        (OFTConfig, {"oft_block_size": 0}, "give one of r"),
        (OFTConfig, {"module_dropout": 1.0}, "module_dropout"),
        (OFTConfig, {"eps": 0.0}, "eps"),
        (OFTConfig, {"num_cayley_neumann_terms": 1}, "at least 2"),
        (OFTConfig, {"attn_matrices": ("x",)}, "attn_matrices"),
        (BOFTConfig, {"boft_block_num": 2}, "give one of boft_block_size"),
        (BOFTConfig, {"boft_n_butterfly_factor": 0}, "at least 1"),
        (BOFTConfig, {"boft_dropout": -0.5}, "boft_dropout"),
    ],
)
def test_bad_fields_are_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OFTConfig(), "these do: 1, 2, 4, 8, 16"),
        (OFTConfig(r=3, oft_block_size=0), "r=3 does not divide the 16 features"),
        (BOFTConfig(boft_block_size=5), "these do: 1, 2, 4, 8, 16"),
        (BOFTConfig(boft_block_size=1, boft_n_butterfly_factor=2), "even size"),
        (BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3), "4 or a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(toy: Callable[[], Any], config: Any, message: str) -> None:
    model = toy()
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("a", config=config)
    assert not model.adapters


def test_a_role_that_is_not_there_is_refused(toy: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedError, match="key"):
        toy().add_adapter("a", config="oft[oft_block_size=4, attn_matrices=('k',)]")
