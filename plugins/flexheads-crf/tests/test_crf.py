"""The conditional random field: by its definition, in files, in a new process, and trained."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from flexheads.errors import ConfigError
from flexheads.heads import Source
from flexheads_crf import CRFTaggingConfig, CRFTaggingHead

LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}
NAMES = {name: number for number, name in LABELS.items()}
COUNTED = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()


class BackboneConfig(PretrainedConfig):
    def __init__(self) -> None:
        self.hidden_size = 8
        super().__init__()


def head(**config: Any) -> CRFTaggingHead:
    torch.manual_seed(0)
    fields = {"num_labels": 3, "label2id": NAMES, **config}
    return CRFTaggingHead("ner", CRFTaggingConfig(**fields), BackboneConfig())


def score(crf: Any, scores: Tensor, path: tuple[int, ...]) -> Tensor:
    """The score of one sequence of labels, term by term."""
    total = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
    for position, label in enumerate(path):
        total = total + scores[position, label]
    for before, after in itertools.pairwise(path):
        total = total + crf.transitions[before, after]
    return total


def every_score(crf: Any, scores: Tensor) -> dict[tuple[int, ...], Tensor]:
    paths = itertools.product(range(3), repeat=len(scores))
    return {path: score(crf, scores, path) for path in paths}


def test_the_loss_is_the_likelihood_over_all_sequences() -> None:
    ner, scores = head(), torch.randn(3, 4, 3)
    labels = torch.randint(3, (3, 4))
    expected = torch.zeros(())
    for row in range(2):
        own, path = scores[row, COUNTED[row]], tuple(labels[row, COUNTED[row]].tolist())
        all_scores = every_score(ner.crf, own)
        expected = expected + torch.stack([*all_scores.values()]).logsumexp(0) - all_scores[path]
    loss = ner.negative_log_likelihood(scores, labels, COUNTED)
    torch.testing.assert_close(loss, expected / COUNTED.sum())


def test_the_best_sequence_is_the_best_of_all() -> None:
    ner, scores = head(), torch.randn(3, 4, 3)
    found = ner.best(scores, COUNTED)
    for row in range(2):
        all_scores = every_score(ner.crf, scores[row, COUNTED[row]])
        assert tuple(found[row]) == max(all_scores, key=lambda path: all_scores[path].item())
    assert found[2] == []


def test_a_scheme_forbids_what_it_does_not_allow() -> None:
    ner = head(scheme="bio")
    scores = torch.zeros(1, 3, 3)
    scores[..., 2] = 50.0  # every token by itself would be inside
    assert ner.best(scores, torch.ones(1, 3).bool()) == [[1, 2, 2]]
    assert head().best(scores, torch.ones(1, 3).bool()) == [[2, 2, 2]]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"scheme": "bilou"}, "unknown"),
        ({"scheme": "bio", "label2id": {"a": 0, "b": 1, "c": 2}}, "B-X"),
        ({"loss": "focal"}, "likelihood"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        head(**config)


# --- on a model -----------------------------------------------------------------------------


def bert(**head_config: Any) -> Any:
    pytest.importorskip("flexheads_bert")
    from flexheads.testing import tiny_model

    torch.manual_seed(0)
    model = tiny_model("bert")
    model.add_head("ner", "crf_tagging", num_labels=3, label2id=NAMES, **head_config)
    return model


IDS = torch.arange(5, 15).view(2, 5)


def test_it_trains_through_to_the_backbone() -> None:
    model = bert()
    labels = torch.tensor([[-100, 1, 2, 0, -100], [-100, 0, 0, 1, -100]])
    model(IDS, labels=labels).loss.backward()
    for parameter in model.heads["ner"].parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    assert bool(model.bert.embeddings.word_embeddings.weight.grad.any())


def test_decoding_gives_the_spans_of_the_best_sequence() -> None:
    from transformers.modeling_outputs import TokenClassifierOutput

    ner = head(scheme="bio")
    scores = torch.zeros(1, 6, 3)
    # Words: Ada | Love|lace | wrote; each by itself would be I-PER, which cannot begin.
    scores[0, 1:4, 2], scores[0, 4, 0] = 9.0, 9.0
    source = Source(
        texts=["Ada Lovelace wrote"],
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1]]),
        offsets=torch.tensor([[[0, 0], [0, 3], [4, 8], [8, 12], [13, 18], [0, 0]]]),
        word_ids=[[None, 0, 1, 1, 2, None]],
        sequence_ids=[[None, 0, 0, 0, 0, None]],
    )
    (found,) = ner.decode(TokenClassifierOutput(logits=scores), source)
    assert [(f["entity_group"], f["word"], f["start"], f["end"]) for f in found] == [
        ("PER", "Ada Lovelace", 0, 12)
    ]


def test_a_saved_head_names_who_provides_it(tmp_path: Path) -> None:
    model = bert(scheme="bio").eval()
    model.save_head(tmp_path, "ner")
    assert "flexheads-crf==" in (tmp_path / "head_config.json").read_text("utf-8")
    other = bert().eval()
    other.delete_head("ner")
    other.load_head(tmp_path)
    assert other.heads["ner"].to_dict() == model.heads["ner"].to_dict()
    for key, tensor in model.heads["ner"].state_dict().items():
        assert torch.equal(tensor, other.heads["ner"].state_dict()[key])


def test_a_whole_model_needs_no_registration_in_a_new_process(tmp_path: Path) -> None:
    model = bert().eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save(model(IDS).logits, tmp_path / "logits.pt")
    script = f"""
import torch
from flexheads import AutoModelWithHeads
model = AutoModelWithHeads.from_pretrained({str(tmp_path)!r})
logits = model(torch.arange(5, 15).view(2, 5)).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})), "outputs differ"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_the_package_a_file_says_what_to_install(tmp_path: Path) -> None:
    bert().save_head(tmp_path, "ner")
    script = f"""
import importlib.metadata
every = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **asked: [p for p in every(**asked) if p.name != "crf"]
from flexheads.errors import UnknownNameError
from flexheads.testing import tiny_model
model = tiny_model("bert")
try:
    model.load_head({str(tmp_path)!r})
except UnknownNameError as error:
    assert "pip install --upgrade flexheads-crf" in str(error), error
    assert not model.heads
else:
    raise AssertionError("loaded without its package")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
