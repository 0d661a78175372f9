"""Late interaction: by its definition, on a model, in files, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads.errors import ConfigError, LabelError
from flexheads_colbert import max_sim

IDS = torch.arange(5, 29).view(4, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6])
PAIRS = torch.tensor([0, 0, 1, 1])


def by_definition(query: Tensor, document: Tensor) -> Tensor:
    """The sum over query tokens of the largest dot product with a document token."""
    return torch.stack([max(torch.dot(q, d) for d in document) for q in query]).sum()


def bert(**config: Any) -> Any:
    pytest.importorskip("flexheads_bert")
    from flexheads.testing import tiny_model

    torch.manual_seed(0)
    model = tiny_model("bert").eval()
    model.add_head("search", "late_interaction", size=8, **config)
    return model


def rows(vectors: Tensor) -> list[Tensor]:
    """The vectors of each row, without padding."""
    return [row[mask.bool()] for row, mask in zip(vectors, MASK, strict=True)]


def test_texts_are_compared_token_by_token() -> None:
    with torch.no_grad():
        vectors = bert()(IDS, attention_mask=MASK).token_embeddings
    assert torch.allclose(vectors.norm(dim=-1), MASK.float(), atol=1e-6)
    scores, texts = max_sim(vectors[:2], vectors[2:], MASK[2:]), rows(vectors)
    for query in range(2):
        for document in range(2):
            expected = by_definition(texts[query], texts[2 + document])
            torch.testing.assert_close(scores[query, document], expected)


def test_the_loss_contrasts_each_document_with_the_others() -> None:
    model = bert(temperature=0.5)
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK, labels=PAIRS)
        texts = rows(output.token_embeddings)
        scores = torch.stack(
            [torch.stack([by_definition(texts[q], texts[d]) for d in (1, 3)]) for q in (0, 2)]
        )
    expected = torch.nn.functional.cross_entropy(scores / 0.5, torch.arange(2))
    torch.testing.assert_close(output.loss, expected)


def test_documents_of_one_query_do_not_compete() -> None:
    model = bert()
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 0, 0, 7]))
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)


def test_it_trains_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, attention_mask=MASK, labels=PAIRS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_head(tmp_path, "search")
    with torch.no_grad():
        before = model(IDS, attention_mask=MASK).token_embeddings
        model.delete_head("search")
        model.load_head(tmp_path)
        assert torch.equal(model(IDS, attention_mask=MASK).token_embeddings, before)


def test_decoding_leaves_padding_out() -> None:
    from flexheads.heads import Source

    model = bert()
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK)
    found = model.heads["search"].decode(output, Source(attention_mask=MASK))
    assert [len(row) for row in found] == MASK.sum(dim=1).tolist()


@pytest.mark.parametrize("field", [{"size": 0}, {"temperature": 0.0}, {"loss": "focal"}])
def test_what_cannot_be_is_refused(field: dict[str, Any]) -> None:
    from flexheads_colbert import LateInteractionConfig

    with pytest.raises(ConfigError, match=next(iter(field))):
        LateInteractionConfig(**field)


def test_labels_are_checked_before_the_backbone_runs() -> None:
    with pytest.raises(LabelError, match="shape"):
        bert()(IDS, labels=torch.tensor([0, 1]))
