"""Heads over a whole sequence: regression, ordinal, ranking; what classification decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from flexheads import BertModelWithHeads, GPT2ModelWithHeads
from flexheads.errors import ConfigError, LabelError
from flexheads.heads import Source
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_static

ROWS = 4


@pytest.fixture
def model() -> Any:
    return randomise(tiny_model("bert"), std=0.2)


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    return tiny_inputs(model.config, batch=ROWS)


def first_token(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, head=[]).last_hidden_state[:, 0]


# --- regression -------------------------------------------------------------------------------


def test_regression_is_trained_on_standardised_targets_and_gives_units(
    model: Any, inputs: dict[str, Tensor]
) -> None:
    mean, std = torch.tensor([2000.0, -1.0]), torch.tensor([30.0, 0.5])
    model.add_regression_head("r", ["year", "tone"], mean=mean.tolist(), std=std.tolist())
    randomise(model.heads["r"])
    layer = model.heads["r"].layers.get_submodule("0")
    scores = functional.linear(first_token(model, inputs), layer.weight, layer.bias)
    labels = torch.tensor([[1990.0, -0.5], [2020.0, 0.0], [2000.0, -2.0], [1950.0, 1.0]])
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, scores * std + mean)
    torch.testing.assert_close(output.loss, functional.mse_loss(scores, (labels - mean) / std))
    assert model.heads["r"].decode(output) == [
        {"year": year, "tone": tone} for year, tone in output.logits.tolist()
    ]
    assert model.get_labels("r") == ["year", "tone"]


@pytest.mark.parametrize(
    ("loss", "of_difference"),
    [
        ("mse", lambda d: d**2),
        ("l1", lambda d: d.abs()),
        (
            {"type": "huber", "delta": 0.5},
            lambda d: torch.where(d.abs() < 0.5, d**2 / 2, 0.5 * (d.abs() - 0.25)),
        ),
    ],
)
def test_targets_that_are_not_known_do_not_count(
    model: Any, inputs: dict[str, Tensor], loss: Any, of_difference: Any
) -> None:
    model.add_regression_head("r", 3, loss=loss)
    randomise(model.heads["r"])
    labels = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))
    labels[0, 1] = labels[2, 0] = labels[3] = torch.nan
    output = model(**inputs, labels=labels)
    known = ~labels.isnan()
    expected = of_difference((output.logits - labels)[known]).mean()
    torch.testing.assert_close(output.loss, expected)
    parameters = list(model.heads["r"].parameters())
    for one, other in zip(
        torch.autograd.grad(output.loss, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    nothing = model(**inputs, labels=torch.full_like(labels, torch.nan)).loss
    assert nothing == 0
    nothing.backward()


def test_large_units_survive_low_precision(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_regression_head("r", ["year"], mean=[2001.0], std=[10.0])
    with torch.no_grad():
        for parameter in model.heads["r"].parameters():
            parameter.zero_()
        model.heads["r"].layers.get_submodule("0").bias.fill_(0.25)
    output = model.bfloat16()(**inputs, labels=torch.tensor([2003.5, 2013.5, 2003.5, 2003.5]))
    assert model.heads["r"].decode(output) == [{"year": 2003.5}] * ROWS
    assert output.loss.item() == pytest.approx(0.25)  # one of four is off by one deviation


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": ["a", "b"], "mean": [1.0]}, "1 values.*2 targets"),
        ({"targets": 1, "std": [0.0]}, "greater than 0"),
        ({"targets": 1, "std": [float("nan")]}, "finite"),
        ({"targets": 1, "mean": 3.0}, "list with a number for each"),
        ({"targets": ["a", "a"]}, "unique"),
        ({"targets": "a"}, "list of names"),
        ({"targets": 1, "loss": "cross_entropy"}, "no sense"),
    ],
)
def test_regression_refuses(model: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, LabelError), match=words):
        model.add_regression_head("r", **config)
    assert "r" not in model.heads


# --- ordinal ----------------------------------------------------------------------------------


def coral_by_hand(logits: Tensor, labels: Tensor, weights: list[float]) -> Tensor:
    """The paper's sum over rows and levels, term by term; the mean over rows."""
    total = torch.zeros(())
    for row, label in zip(logits, labels, strict=True):
        for level, weight in enumerate(weights):
            probability = torch.sigmoid(row[level])
            passed = float(label > level)
            terms = passed * probability.log() + (1 - passed) * (1 - probability).log()
            total = total - weight * terms
    return total / len(labels)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_ordinal_is_the_papers(
    model: Any, inputs: dict[str, Tensor], weights: list[float] | None
) -> None:
    loss = None if weights is None else {"type": "coral", "importance_weights": weights}
    model.add_ordinal_head("o", ["never", "rarely", "often", "always"], loss=loss)
    head = randomise(model.heads["o"], std=0.5)
    labels = torch.tensor([0, 3, 1, 2])
    output = model(**inputs, labels=labels)
    shared = first_token(model, inputs) @ head.layers.get_submodule("0").weight.T
    assert shared.shape == (ROWS, 1)
    torch.testing.assert_close(output.logits, shared + head.level_bias)
    expected = coral_by_hand(output.logits, labels, weights or [1.0] * 3)
    torch.testing.assert_close(output.loss, expected)
    some = model(**inputs, labels=torch.tensor([0, -100, 1, -100])).loss
    kept = coral_by_hand(output.logits[[0, 2]], labels[[0, 2]], weights or [1.0] * 3)
    torch.testing.assert_close(some, kept)


def test_levels_are_consistent(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_ordinal_head("o", ["low", "middle", "high"])
    head = model.heads["o"]
    logits = torch.tensor([[2.0, 1.0], [1.0, -1.0], [-1.0, -3.0], [0.5, 4.0]])
    passed = logits.sigmoid()
    passed[3, 1] = passed[3, 0]  # what has passed the second level has passed the first
    expected = torch.stack([1 - passed[:, 0], passed[:, 0] - passed[:, 1], passed[:, 1]], dim=1)
    torch.testing.assert_close(head.probabilities(logits), expected)
    assert head.levels(logits).tolist() == [2, 1, 0, 2]
    found = head.decode(transformers.modeling_outputs.SequenceClassifierOutput(logits=logits))
    assert [each["label"] for each in found] == ["high", "middle", "low", "high"]
    for each in found:
        assert each["score"] == each["probabilities"][each["label"]]
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert list(each["probabilities"]) == ["low", "middle", "high"]


def test_biases_end_in_order(model: Any) -> None:
    """Theorem 1 of the paper: at the minimum of the loss no bias is above the one before."""
    model.add_ordinal_head("o", 5)
    head, generator = model.heads["o"], torch.Generator().manual_seed(0)
    rows = torch.randn(300, model.config.hidden_size, generator=generator)
    hidden = rows[:, 0] + 0.3 * torch.randn(300, generator=generator)
    labels = torch.bucketize(hidden, torch.tensor([-1.0, -0.2, 0.3, 1.0]))
    with torch.no_grad():
        head.level_bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = head.loss(head.layers(rows) + head.level_bias, labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert (head.level_bias.diff() < 0).all()
    found = head.levels(head.layers(rows) + head.level_bias)
    assert (found - labels).abs().float().mean() < 0.35


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"levels": 1}, "at least 2"),
        ({"levels": 3, "bias": True}, "bias of its own"),
        (
            {"levels": 3, "loss": {"type": "coral", "importance_weights": [1.0] * 3}},
            "3 values, but there are 2",
        ),
    ],
)
def test_ordinal_refuses(model: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.add_ordinal_head("o", **config)


# --- ranking ----------------------------------------------------------------------------------


def test_a_reward_is_that_of_a_transformers_class_with_a_pooler() -> None:
    static = tiny_static("BertForSequenceClassification", num_labels=1)
    ours = BertModelWithHeads(tiny_config("bert")).eval()
    ours.bert.load_state_dict(static.bert.state_dict())
    ours.add_ranking_head("reward", use_pooler=True)
    ours.heads["reward"].layers.load_state_dict(
        {f"0.{name}": tensor for name, tensor in static.classifier.state_dict().items()}
    )
    given = tiny_inputs(static.config, batch=ROWS)
    rewards = static(**given).logits
    assert rewards.std() > 1e-3
    torch.testing.assert_close(ours(**given).logits, rewards)
    paired = {name: tensor.view(2, 2, -1) for name, tensor in given.items()}
    output = ours(**paired, labels=torch.tensor([0, 1]))
    chosen, rejected = rewards.flatten()[[0, 3]], rewards.flatten()[[1, 2]]
    torch.testing.assert_close(output.loss, -torch.sigmoid(chosen - rejected).log().mean())


def test_a_reward_is_that_of_a_decoder_of_transformers() -> None:
    static = tiny_static("GPT2ForSequenceClassification", num_labels=1, pad_token_id=0)
    ours = GPT2ModelWithHeads(static.config).eval()
    ours.transformer.load_state_dict(static.transformer.state_dict())
    ours.add_ranking_head("reward", bias=False)
    ours.heads["reward"].layers.load_state_dict({"0.weight": static.score.weight})
    given = tiny_inputs(static.config, batch=ROWS)
    torch.testing.assert_close(ours(**given).logits, static(**given).logits)


def pairwise_by_hand(scores: Tensor, grades: Tensor, margin: float) -> Tensor:
    losses = [
        -torch.sigmoid(row[one] - row[other] - margin * (own[one] - own[other])).log()
        for row, own in zip(scores, grades, strict=True)
        for one in range(len(row))
        for other in range(len(row))
        if own[one] > own[other]
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_pairs_of_choices(model: Any, margin: float, flat: bool) -> None:
    loss = {"type": "bradley_terry", "margin": margin}
    model.add_ranking_head("r", num_choices=3 if flat else None, loss=loss)
    randomise(model.heads["r"])
    given = tiny_inputs(model.config, batch=6)
    if not flat:
        given = {name: tensor.view(2, 3, -1) for name, tensor in given.items()}
    grades = torch.tensor([[3.0, 1.0, 1.0], [0.5, 2.0, 4.0]])
    output = model(**given, labels=grades)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, pairwise_by_hand(output.logits, grades, margin))
    best = functional.one_hot(torch.tensor([0, 2]), 3).float()
    expected = pairwise_by_hand(output.logits, best, margin)
    torch.testing.assert_close(model(**given, labels=torch.tensor([0, 2])).loss, expected)
    only_first = pairwise_by_hand(output.logits[:1], best[:1], margin)
    torch.testing.assert_close(model(**given, labels=torch.tensor([0, -100])).loss, only_first)


def test_lists_of_choices(model: Any) -> None:
    model.add_ranking_head("r", num_choices=3, loss="listwise")
    randomise(model.heads["r"])
    given, grades = tiny_inputs(model.config, batch=6), torch.tensor([[3, 1, 1], [0, 2, 4]])
    output = model(**given, labels=grades)
    target, shares = grades.float().exp(), output.logits.exp()
    target, shares = target / target.sum(1, True), shares / shares.sum(1, True)
    torch.testing.assert_close(output.loss, -(target * shares.log()).sum(1).mean())
    best = model(**given, labels=torch.tensor([2, -100])).loss
    torch.testing.assert_close(best, -shares[0, 2].log())


def test_ranked_choices(model: Any) -> None:
    model.add_ranking_head("r")
    randomise(model.heads["r"])
    given = tiny_inputs(model.config, batch=ROWS)
    head, single = model.heads["r"], model(**given)
    assert single.logits.shape == (ROWS, 1)
    scores = single.logits.flatten().tolist()
    assert head.decode(single) == [{"score": score} for score in scores]
    pairs = model(**{name: tensor.view(2, 2, -1) for name, tensor in given.items()})
    texts = ["a", "b", "c", "d"]
    for group, found in enumerate(head.decode(pairs, Source(texts=texts))):
        own = scores[2 * group : 2 * group + 2]
        order = sorted(range(2), key=lambda number: -own[number])
        assert [each["choice"] for each in found] == order
        assert [each["score"] for each in found] == pytest.approx([own[n] for n in order])
        assert [each["text"] for each in found] == [texts[2 * group + n] for n in order]


# --- labels that cannot be --------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "regression shape": ("regression", {"targets": 2}, torch.zeros(ROWS), r"should have \(4, 2\)"),
    "regression infinite": ("regression", {}, torch.full((ROWS,), torch.inf), "no finite number"),
    "ordinal range": ("ordinal", {"levels": 3}, torch.tensor([0, 1, 2, 3]), "0 to 2"),
    "ordinal kind": ("ordinal", {"levels": 3}, torch.zeros(ROWS), "whole numbers"),
    "no groups": ("ranking", {}, torch.zeros(ROWS).long(), "no groups of them"),
    "ranking range": ("ranking", {"num_choices": 2}, torch.tensor([0, 2]), "0 to 1"),
    "ranking shape": ("ranking", {"num_choices": 2}, torch.zeros(4).long(), r"\(2\) or \(2, 2\)"),
    "ranking groups": ("ranking", {"num_choices": 3}, torch.zeros(1).long(), "4 rows.* groups"),
    "choice range": ("multiple_choice", {"num_choices": 4}, torch.tensor([4]), "0 to 3"),
    "choice shape": ("multiple_choice", {"num_choices": 2}, torch.zeros(4).long(), r"\(2\)"),
    "choice groups": ("multiple_choice", {"num_choices": 3}, torch.zeros(1).long(), "4 rows"),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_are_refused_before_the_backbone_runs(
    model: Any, inputs: dict[str, Tensor], case: str
) -> None:
    kind, config, labels, words = CASES[case]
    getattr(model, f"add_{kind}_head")("h", **config)
    ran: list[Any] = []
    model.bert.embeddings.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises((LabelError, ConfigError), match=words):
        model(**inputs, labels=labels)
    assert not ran


def test_a_contradiction_about_choices_says_both(model: Any, inputs: dict[str, Tensor]) -> None:
    four = {name: tensor.view(1, 4, -1) for name, tensor in inputs.items()}
    for kind in ("multiple_choice", "ranking"):
        getattr(model, f"add_{kind}_head")(kind, num_choices=2)
        for labels in ({}, {"labels": torch.tensor([3])}):
            with pytest.raises(ConfigError, match="num_choices=2, but the input has 4"):
                model(**four, **labels)
    model.add_multiple_choice_head("any", num_choices=None)
    assert model(**four, labels=torch.tensor([3])).logits.shape == (1, 4)


# --- what classification decodes --------------------------------------------------------------

NAMES = {0: "no", 1: "maybe", 2: "yes"}


def test_labels_with_scores(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_classification_head("c", id2label=NAMES)
    randomise(model.heads["c"])
    output = model(**inputs)
    shares = output.logits.softmax(-1)
    ranked = model.heads["c"].decode(output, top_k=2)
    for row, best, found in zip(shares, model.heads["c"].decode(output), ranked, strict=True):
        order = row.argsort(descending=True)[:2].tolist()
        assert [each["label"] for each in found] == [NAMES[number] for number in order]
        assert [each["score"] for each in found] == pytest.approx([row[n].item() for n in order])
        assert best == found[0]
    with pytest.raises(ConfigError, match="top_k=0"):
        model.heads["c"].decode(output, top_k=0)


@pytest.mark.parametrize("multilabel", [True, False])
def test_labels_are_those_of_the_pipeline_of_transformers(multilabel: bool) -> None:
    """The scores of ``transformers.TextClassificationPipeline``, of the same weights."""
    static = tiny_static(
        "BertForSequenceClassification",
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
        problem_type="multi_label_classification" if multilabel else None,
    )
    ours = BertModelWithHeads(tiny_config("bert")).eval()
    ours.bert.load_state_dict(static.bert.state_dict())
    ours.add_classification_head(
        "c", id2label=NAMES, layers=1, use_pooler=True, multilabel=multilabel
    )
    ours.heads["c"].layers.load_state_dict(
        {f"0.{name}": tensor for name, tensor in static.classifier.state_dict().items()}
    )
    given = tiny_inputs(static.config, batch=ROWS)
    pipeline = transformers.TextClassificationPipeline.__new__(
        transformers.TextClassificationPipeline
    )
    pipeline.model, pipeline.framework = static, "pt"
    found = ours.heads["c"].decode(ours(**given), top_k=3)
    for row, own in zip(static(**given).logits, found, strict=True):
        theirs = pipeline.postprocess({"logits": row[None].detach()}, top_k=None, _legacy=False)
        assert [each["label"] for each in own] == [each["label"] for each in theirs]
        scores = [each["score"] for each in theirs]
        assert [each["score"] for each in own] == pytest.approx(scores, abs=1e-6)


def test_any_number_of_labels_by_threshold(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_classification_head("c", id2label=NAMES, multilabel=True, threshold=0.6)
    randomise(model.heads["c"], std=1.0)
    head, output = model.heads["c"], model(**inputs)
    scores = output.logits.sigmoid()
    for least, options in ((0.6, {}), (0.2, {"threshold": 0.2})):
        for row, found in zip(scores.tolist(), head.decode(output, **options), strict=True):
            expected = {NAMES[n]: score for n, score in enumerate(row) if score >= least}
            assert {each["label"]: each["score"] for each in found} == pytest.approx(expected)
            assert found == sorted(found, key=lambda each: -each["score"])
    assert any(not row for row in head.decode(output, threshold=0.99))
    assert all(len(row) == 2 for row in head.decode(output, top_k=2))


def test_values_of_regression(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_classification_head("one", num_labels=1)
    output = model(**inputs)
    assert model.heads["one"].decode(output) == [
        {"label": "LABEL_0", "score": value} for value in output.logits.flatten().tolist()
    ]
    model.add_classification_head("two", id2label={0: "a", 1: "b"}, problem_type="regression")
    output = model(**inputs)
    assert model.heads["two"].decode(output) == [
        [{"label": "a", "score": one}, {"label": "b", "score": other}]
        for one, other in output.logits.tolist()
    ]


def test_ranked_choices_of_multiple_choice(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_multiple_choice_head("m", id2label={0: "A", 1: "B"})
    randomise(model.heads["m"])
    output, texts = model(**inputs), ["one", "two", "three", "four"]
    shares = output.logits.softmax(-1).tolist()
    for group, found in enumerate(model.heads["m"].decode(output, Source(texts=texts))):
        order = sorted(range(2), key=lambda number: -shares[group][number])
        assert [(f["choice"], f["label"], f["text"]) for f in found] == [
            (number, "AB"[number], texts[2 * group + number]) for number in order
        ]
        assert sum(each["score"] for each in found) == pytest.approx(1)
    best = model.heads["m"].decode(output, top_k=1)
    assert [len(each) for each in best] == [1, 1]
    assert "text" not in best[0][0]


# --- on other architectures, and in files -----------------------------------------------------

LABELS = {
    "regression": ({"targets": ["a", "b"], "mean": [3.0, 4.0]}, torch.randn(ROWS, 2)),
    "ordinal": ({"levels": 4}, torch.tensor([3, 0, 1, 2])),
    "ranking": ({"num_choices": 2, "bias": False}, torch.tensor([1, 0])),
}


@pytest.mark.parametrize("architecture", ["distilbert", "gpt2", "t5", "vit"])
def test_on_other_architectures(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    given = tiny_inputs(model.config, batch=ROWS)
    for kind, (config, labels) in LABELS.items():
        getattr(model, f"add_{kind}_head")(kind, layers=2, pooling="mean", **config)
        randomise(model.heads[kind])
        output = model(**given, labels=labels)
        output.loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.heads[kind].parameters())
        json.dumps(model.heads[kind].decode(output))
        model.save_head(tmp_path / kind, kind)
        model.load_head(tmp_path / kind, load_as=f"again {kind}")
        assert model.heads[f"again {kind}"].config == model.heads[kind].config
        again = model(**given, labels=labels)
        assert torch.equal(again.logits, output.logits)
        assert torch.equal(again.loss, output.loss)
    model.active_head = list(LABELS)
    several = model(**given, labels={name: labels for name, (_, labels) in LABELS.items()})
    for kind, (_, labels) in LABELS.items():
        torch.testing.assert_close(
            several[kind].loss, model(**given, head=kind, labels=labels).loss
        )
    model.save_pretrained(tmp_path / "whole")
    same = type(model).from_pretrained(tmp_path / "whole")
    for kind in LABELS:
        torch.testing.assert_close(same(**given)[kind].logits, several[kind].logits)


def test_many_heads_at_once_give_what_each_gives(model: Any, inputs: dict[str, Tensor]) -> None:
    """Heads of one shape may run as one product, whatever their units and sizes are."""
    for n, mean in (("1", 5.0), ("2", -3.0)):
        model.add_regression_head(f"r{n}", ["a", "b"], mean=[mean, 2.0], std=[3.0, 4.0])
        model.add_ordinal_head(f"o{n}", 4)
        model.add_embedding_head(f"e{n}")
        model.add_embedding_head(f"s{n}", 8, normalise=n == "1")
        model.add_ranking_head(f"k{n}", num_choices=2)
    for number, head in enumerate(model.heads.values()):
        randomise(head, seed=number)
    with torch.no_grad():
        together = model(**inputs, head=list(model.heads))
        for name in model.heads:
            alone = model(**inputs, head=name)
            given = "embeddings" if "embeddings" in alone else "logits"
            torch.testing.assert_close(together[name][given], alone[given])
