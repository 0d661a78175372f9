"""Embedding heads: what they read and give, and each loss by a formula written out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flexheads.errors import ConfigError, LabelError
from flexheads.testing import randomise, tiny_inputs, tiny_model

ROWS = 6


@pytest.fixture
def model() -> Any:
    return randomise(tiny_model("bert"), std=0.2)


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    return tiny_inputs(model.config, batch=ROWS)


# --- what it gives ----------------------------------------------------------------------------


def mean_by_hand(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model(**inputs, head=[]).last_hidden_state
    rows = zip(hidden, inputs["attention_mask"], strict=True)
    return torch.stack([row[mask == 1].mean(0) for row, mask in rows])


def test_the_mean_of_length_one(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_embedding_head("e")
    assert not list(model.heads["e"].parameters())
    output, mean = model(**inputs), mean_by_hand(model, inputs)
    assert output.loss is None
    torch.testing.assert_close(output.embeddings, mean / mean.norm(dim=1, keepdim=True))
    assert model.heads["e"].decode(output) == output.embeddings.tolist()
    model.add_embedding_head("raw", normalise=False)
    torch.testing.assert_close(model(**inputs).embeddings, mean)


def test_projected(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_embedding_head("e", embedding_size=5, layers=2, activation_function="relu")
    head, mean = randomise(model.heads["e"]), mean_by_hand(model, inputs)
    one, two = (head.layers.get_submodule(name) for name in "01")
    between = functional.relu(functional.linear(mean, one.weight, one.bias))
    expected = functional.linear(between, two.weight, two.bias)
    torch.testing.assert_close(model(**inputs).embeddings, functional.normalize(expected))


@pytest.mark.parametrize("kind", ["first_token", "last_token", "max", "pooler"])
def test_pooled_by_name(model: Any, inputs: dict[str, Tensor], kind: str) -> None:
    model.add_embedding_head("e", pooling=kind, normalise=False)
    output = model.bert(**inputs)
    mask = inputs["attention_mask"]
    expected = {
        "first_token": output.last_hidden_state[:, 0],
        "last_token": output.last_hidden_state[torch.arange(ROWS), mask.sum(1) - 1],
        "max": torch.stack(
            [r[m == 1].amax(0) for r, m in zip(output.last_hidden_state, mask, strict=True)]
        ),
        "pooler": output.pooler_output,
    }[kind]
    torch.testing.assert_close(model(**inputs).embeddings, expected)


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "vit", "swin"])
def test_on_other_architectures_and_in_files(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    given = tiny_inputs(model.config, batch=ROWS)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for name, config in {"bare": {"pooling": None}, "small": {"embedding_size": 4}}.items():
        model.add_embedding_head(name, **config, loss="multiple_negatives_ranking")
        output = model(**given, labels=labels)
        output.loss.backward()
        json.dumps(model.heads[name].decode(output))
        model.save_head(tmp_path / name, name)
        model.load_head(tmp_path / name, load_as="again", overwrite_ok=True)
        assert model.heads["again"].config == model.heads[name].config
        again = model(**given, labels=labels)
        assert torch.equal(again.embeddings, output.embeddings)
        assert torch.equal(again.loss, output.loss)
    model.active_head = ["bare", "small"]
    model.save_pretrained(tmp_path / "whole")
    same = type(model).from_pretrained(tmp_path / "whole")
    assert same.active_head == ["bare", "small"]
    for name in same.active_head:
        torch.testing.assert_close(same(**given)[name].embeddings, model(**given)[name].embeddings)
    assert same(**given)["small"].embeddings.shape == (ROWS, 4)


# --- losses -----------------------------------------------------------------------------------


def embedded(model: Any, inputs: dict[str, Tensor], loss: Any, labels: Tensor) -> tuple[Any, Any]:
    """The loss of a head, and its embeddings as rows."""
    model.add_embedding_head("e", 8, loss=loss, normalise=False, overwrite_ok=True)
    randomise(model.heads["e"], std=0.5)
    output = model(**inputs, labels=labels)
    return output.loss, output.embeddings


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.norm() * other.norm())


def log_share(row: Tensor, positive: Tensor, others: list[Tensor], temperature: float) -> Tensor:
    total = sum((cosine(row, other) / temperature).exp() for other in others)
    return cosine(row, positive) / temperature - torch.as_tensor(total).log()


def contrastive_by_hand(rows: Tensor, labels: list[int], temperature: float) -> Tensor:
    losses = []
    for i, row in enumerate(rows):
        others = [other for j, other in enumerate(rows) if j != i]
        same = [rows[j] for j in range(len(rows)) if j != i and labels[j] == labels[i]]
        if same:
            shares = [log_share(row, positive, others, temperature) for positive in same]
            losses.append(-torch.stack(shares).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2], [7, 7, 7, 3, 3, 5]])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_contrastive(
    model: Any, inputs: dict[str, Tensor], labels: list[int], temperature: float
) -> None:
    loss = {"type": "contrastive", "temperature": temperature}
    found, rows = embedded(model, inputs, loss, torch.tensor(labels))
    torch.testing.assert_close(found, contrastive_by_hand(rows, labels, temperature))


@pytest.mark.parametrize("symmetric", [False, True])
def test_multiple_negatives_ranking(model: Any, inputs: dict[str, Tensor], symmetric: bool) -> None:
    labels = [4, 9, 4, 1, 9, 1]
    loss = {"type": "multiple_negatives_ranking", "temperature": 0.1, "symmetric": symmetric}
    found, rows = embedded(model, inputs, loss, torch.tensor(labels))
    anchors, positives = [rows[0], rows[1], rows[3]], [rows[2], rows[4], rows[5]]
    ways = [(anchors, positives), (positives, anchors)][: 1 + symmetric]
    expected = torch.stack(
        [
            -log_share(one, other, others, 0.1)
            for ones, others in ways
            for one, other in zip(ones, others, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(found, expected)


def test_pairs_by_similarity(model: Any, inputs: dict[str, Tensor]) -> None:
    labels = torch.tensor([0.3, -0.4, 1.0])
    found, rows = embedded(model, inputs, "cosine_similarity", labels)
    own = torch.stack([cosine(rows[i], rows[i + 1]) for i in (0, 2, 4)])
    torch.testing.assert_close(found, ((own - labels) ** 2).mean())
    paired = {name: tensor.view(3, 2, -1) for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**paired, labels=labels).loss, found)
    assert model(**paired).embeddings.shape == (ROWS, 8)


def test_pairs_that_are_alike_or_not(model: Any, inputs: dict[str, Tensor]) -> None:
    labels = torch.tensor([1, -1, -1])
    loss = {"type": "cosine_embedding", "margin": 0.1}
    found, rows = embedded(model, inputs, loss, labels)
    theirs = torch.nn.CosineEmbeddingLoss(margin=0.1)
    torch.testing.assert_close(found, theirs(rows[[0, 2, 4]], rows[[1, 3, 5]], labels))
    own = [cosine(rows[i], rows[i + 1]) for i in (0, 2, 4)]
    by_hand = torch.stack([1 - own[0], *((c - 0.1).clamp(min=0) for c in own[1:])]).mean()
    torch.testing.assert_close(found, by_hand)


def triplets(labels: list[int]) -> list[tuple[int, int, int]]:
    return [
        (a, p, n)
        for a, p, n in itertools.product(range(len(labels)), repeat=3)
        if a != p and labels[a] == labels[p] != labels[n]
    ]


def test_triplets_are_those_of_torch(model: Any, inputs: dict[str, Tensor]) -> None:
    labels = [0, 0, 1, 0, 1, 2]
    loss = {"type": "triplet", "margin": 0.7}
    found, rows = embedded(model, inputs, loss, torch.tensor(labels))
    anchor, positive, negative = zip(*triplets(labels), strict=True)
    theirs = torch.nn.TripletMarginLoss(margin=0.7)
    expected = theirs(rows[list(anchor)], rows[list(positive)], rows[list(negative)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hard_triplets(model: Any, inputs: dict[str, Tensor]) -> None:
    labels = [0, 0, 1, 0, 1, 2]
    loss = {"type": "triplet", "margin": 0.7, "hard": True}
    found, rows = embedded(model, inputs, loss, torch.tensor(labels))
    losses = []
    for row in range(5):  # the last has no other of its class
        own = [(p, n) for a, p, n in triplets(labels) if a == row]
        farthest = max((rows[row] - rows[p]).norm() for p, _ in own)
        nearest = min((rows[row] - rows[n]).norm() for _, n in own)
        losses.append((farthest - nearest + 0.7).clamp(min=0))
    torch.testing.assert_close(found, torch.stack(losses).mean())


def of_pairs(kind: str) -> Tensor:
    return torch.tensor([1, -1, -1]) if kind.startswith("cosine") else torch.arange(ROWS) // 2


LOSSES = (
    "contrastive",
    "multiple_negatives_ranking",
    "triplet",
    "cosine_similarity",
    "cosine_embedding",
)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_and_training_lowers_the_loss(
    model: Any, inputs: dict[str, Tensor], loss: str
) -> None:
    labels = of_pairs(loss)
    model.bert.requires_grad_(False)
    before, _ = embedded(model, inputs, loss, labels)
    optimiser = torch.optim.Adam(model.heads["e"].parameters(), lr=0.05)
    for _ in range(20):
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.heads["e"].parameters())
        optimiser.step()
    assert model(**inputs, labels=labels).loss < before * 0.5


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_a_batch_without_partners_costs_nothing(model: Any, loss: str) -> None:
    for rows in (1, 3):
        given = tiny_inputs(model.config, batch=rows)
        found, _ = embedded(model, given, loss, torch.arange(rows))
        assert found == 0
        found.backward()
        assert all(p.grad.isfinite().all() for p in model.heads["e"].parameters())


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "labels", "words"),
    [
        ("contrastive", torch.zeros(ROWS), "whole numbers"),
        ("contrastive", torch.zeros(3).long(), r"should have \(6\)"),
        ("multiple_negatives_ranking", torch.tensor([0, 0, 1, 1, 1, 2]), "id 1 is there 3 times"),
        ("cosine_similarity", torch.zeros(ROWS), r"should have \(3\)"),
        ("cosine_similarity", torch.tensor([0.1, 1.5, 0.2]), "hold 1.5; each is from -1 to 1"),
        ("cosine_embedding", torch.tensor([1, 0, -1]), "hold 0; each is 1 or -1"),
    ],
)
def test_labels_that_cannot_be(
    model: Any, inputs: dict[str, Tensor], loss: str, labels: Tensor, words: str
) -> None:
    model.add_embedding_head("e", loss=loss)
    with pytest.raises(LabelError, match=words):
        model(**inputs, labels=labels)


def test_a_row_without_its_pair(model: Any) -> None:
    model.add_embedding_head("e", loss="cosine_similarity")
    with pytest.raises(LabelError, match="3 rows"):
        model(**tiny_inputs(model.config, batch=3), labels=torch.zeros(1))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"embedding_size": 0}, "embedding_size=0"),
        ({"layers": 2}, "needs embedding_size"),
        ({"normalise": "yes"}, "True or False"),
        ({"loss": {"type": "contrastive", "temperature": 0}}, "temperature=0"),
        ({"loss": {"type": "contrastive", "margin": 1}}, "no parameter 'margin'"),
        ({"loss": {"type": "triplet", "hard": 1}}, "hard=1 should be True or False"),
        ({"loss": "mse"}, "no sense"),
    ],
)
def test_configurations_that_cannot_be(model: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.add_embedding_head("e", **config)


def test_compiled(model: Any, inputs: dict[str, Tensor]) -> None:
    labels = torch.arange(ROWS) // 2
    model.add_embedding_head("e", 4)
    compiled: Callable[..., Any] = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss
    )
