"""Averages of adapters and heads: each strategy against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads.errors import ConfigError, UnknownNameError, UnsupportedError
from flexheads.methods.average import dare, ties
from flexheads.testing import randomise, tiny_inputs, tiny_model


def build(config: str, *names: str) -> Any:
    model = randomise(tiny_model("bert"), std=0.2)
    for name in names or ("a", "b"):
        model.add_adapter(name, config)
        randomise(model.adapters[name], seed=ord(name))
    return model


def states(model: Any, *names: str) -> list[dict[str, Tensor]]:
    return [model.adapters[name].state_dict() for name in names]


@pytest.mark.parametrize(
    "config", ["seq_bn_inv", "lora[init_weights=pissa]", "ia3", "vera", "dora", "mtl_lora"]
)
@pytest.mark.parametrize(
    ("given", "how", "weights"),
    [
        (["a", "b"], {}, (0.5, 0.5)),
        (["a", "b"], {"weights": [1, 3]}, (0.25, 0.75)),
        (["a", "b"], {"weights": [1, 3], "normalize_weights": False}, (1, 3)),
        ({"a": 1, "b": 3}, {}, (0.25, 0.75)),
    ],
)
def test_linear(config: str, given: Any, how: Any, weights: Any) -> None:
    model = build(config)
    model.average_adapter("new", given, set_active=True, **how)
    a, b, new = states(model, "a", "b", "new")
    for key, tensor in new.items():
        torch.testing.assert_close(tensor, weights[0] * a[key] + weights[1] * b[key])
    assert model.active_adapters.names() == ("new",) or "new" in model.active_adapters.names()


def test_a_negative_weight_negates_one_factor() -> None:
    model = build("lora")
    how = {"weights": [2, -0.5], "normalize_weights": False}
    model.average_adapter("new", ["a", "b"], combine_strategy="lora_linear_only_negate_b", **how)
    a, b, new = states(model, "a", "b", "new")
    for key, tensor in new.items():
        sign = -1 if key.endswith("lora_B") else 1
        torch.testing.assert_close(tensor, 2 * a[key] + sign * 0.5 * b[key])


def test_the_best_factors_of_the_weighted_sum() -> None:
    model = build("lora[r=4]")
    for rank in (8, 2):
        model.average_adapter(
            f"r{rank}",
            ["a", "b"],
            [0.4, 0.6],
            combine_strategy="lora_delta_w_svd",
            svd_rank=rank,
        )
    parts = [model.adapters[n].parts["layers.1.value"].delta() for n in ("a", "b", "r8", "r2")]
    whole = 0.4 * parts[0] + 0.6 * parts[1]
    torch.testing.assert_close(parts[2], whole, atol=1e-5, rtol=0)
    left = torch.linalg.svdvals(whole)[2:].square().sum().sqrt()
    torch.testing.assert_close((whole - parts[3]).norm(), left)
    assert model.adapters["r2"].config.r == 2


def test_ties_by_hand() -> None:
    """Trim to the two largest of four, elect a sign each, average those that agree."""
    vectors = torch.tensor([[3.0, -2, 1, 0], [-4, -6, 0, 1], [5, 0.5, -0.1, 7]])
    # trimmed: [3 -2 . .], [-4 -6 . .], [5 . . 7]; signs: + - 0 +
    expected = torch.tensor([(3 + 5) / 2, (-2 - 6) / 2, 0, 7])
    torch.testing.assert_close(ties(vectors, [1 / 3] * 3, 0.5), expected)
    weighted = ties(vectors, [0.5, 0.25, 0.25], 0.5)
    torch.testing.assert_close(weighted[0], torch.tensor((0.5 * 3 + 0.25 * 5) / 0.75))
    torch.testing.assert_close(ties(vectors, [1.0] * 3, 0.5), 3 * expected)
    torch.testing.assert_close(
        ties(vectors * torch.tensor([[1.0], [-1], [1]]), [1.0, -1, 1], 0.5), 3 * expected
    )


def test_dare_keeps_a_share_and_the_mean() -> None:
    torch.manual_seed(0)
    found = dare(torch.ones(2, 100_000), [0.25, 0.75], 0.2)
    values = found.unique()
    torch.testing.assert_close(values, torch.tensor([0, 0.25, 0.75, 1.0]) / 0.2)
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    assert (found == 0).float().mean().item() == pytest.approx(0.8**2, abs=0.01)


@pytest.mark.parametrize("strategy", ["ties", "dare"])
@pytest.mark.parametrize("config", ["lora", "lora[init_weights=pissa]", "ia3", "seq_bn", "vera"])
def test_sparse_strategies_are_about_what_was_learned(strategy: str, config: str) -> None:
    model = build(config)
    for density in (1.0, 0.3):
        model.average_adapter(
            "new",
            ["a", "a2"] if "a2" in model.adapters else ["a", "b"],
            combine_strategy=strategy,
            density=density,
            seed=3,
            overwrite_ok=True,
        )
    model.add_adapter("fresh", config)
    origin = {key: p.detach() for key, p in model.adapters["fresh"].named_parameters()}
    a, b, new = (dict(model.adapters[n].named_parameters()) for n in ("a", "b", "new"))
    zero = "pissa" not in config and config != "ia3"
    start = {key: torch.zeros_like(t) if zero else t for key, t in origin.items()}
    flat = [
        torch.cat([(own[key] - start[key]).flatten() for key in start]).detach()
        for own in (a, b, new)
    ]
    if strategy == "ties":
        expected = ties(torch.stack(flat[:2]), [0.5, 0.5], 0.3)
    else:
        torch.manual_seed(3)
        expected = dare(torch.stack(flat[:2]), [0.5, 0.5], 0.3)
    torch.testing.assert_close(flat[2], expected, atol=1e-6, rtol=0)
    assert expected.ne(0).any()


def test_what_has_no_average() -> None:
    model = build("lora")
    model.add_adapter("wide", "lora[r=4]")
    model.add_adapter("bn", "seq_bn")
    model.add_adapter("dora", "dora")
    before = set(model.adapters)
    two = ["a", "b"]
    for error, message, args, how in (
        (ConfigError, "already one", ("a", two), {}),
        (ConfigError, "differ in r", ("new", ["a", "wide"]), {}),
        (ConfigError, "differ in", ("new", ["a", "bn"]), {}),
        (ConfigError, "sum up to zero", ("new", two, [1, -1]), {}),
        (ConfigError, "as many weights", ("new", two, [1]), {}),
        (ConfigError, "list of names", ("new", []), {}),
        (ConfigError, "svd_rank", ("new", two), {"combine_strategy": "lora_delta_w_svd"}),
        (ConfigError, "svd_rank", ("new", two), {"svd_rank": 2}),
        (ConfigError, "density", ("new", two), {"density": 0.5}),
        (ConfigError, "density", ("new", two), {"combine_strategy": "ties", "density": 0.0}),
        (UnknownNameError, "combine_strategy", ("new", two), {"combine_strategy": "mean"}),
        (UnknownNameError, "adapter", ("new", ["a", "c"]), {}),
        (UnsupportedError, "DoRA", ("new", ["dora"]), {"combine_strategy": "ties"}),
        (
            UnsupportedError,
            "plain LoRA",
            ("new", ["bn"]),
            {"combine_strategy": "lora_linear_only_negate_b"},
        ),
    ):
        with pytest.raises(error, match=message):
            model.average_adapter(*args, **how)
    assert set(model.adapters) == before


def test_average_head() -> None:
    model = tiny_model("bert")
    for name in "ab":
        model.add_classification_head(name, num_labels=3)
        randomise(model.heads[name], seed=ord(name))
    model.add_classification_head("other", num_labels=2)
    model.average_head("new", ["a", "b"], [1, 3], set_active=True)
    a, b, new = (model.heads[name].state_dict() for name in ("a", "b", "new"))
    for key, tensor in new.items():
        torch.testing.assert_close(tensor, 0.25 * a[key] + 0.75 * b[key])
    assert model.active_head == "new"
    assert model(**tiny_inputs(model.config)).logits.shape == (3, 3)
    with pytest.raises(ConfigError, match="differ"):
        model.average_head("wrong", ["a", "other"])
    with pytest.raises(UnknownNameError):
        model.average_head("wrong", ["a", "c"])
    assert "wrong" not in model.heads
