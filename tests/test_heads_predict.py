"""``predict``: from texts to what a head says of them, the same as transformers' pipelines say."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

import flexheads
from flexheads import BertModelWithHeads, Parallel, Rows
from flexheads.errors import CompositionError, ConfigError, UnknownNameError, UnsupportedError
from flexheads.heads import PredictionHead
from flexheads.plugins import registry, resolve
from flexheads.testing import randomise, tiny_config, tiny_model, tiny_static

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["ab cd", "a", "hello, how are you today", "to be or not to be", "x y z", "what is it?"]
NAMES = ["input_ids", "attention_mask"]
LONG = " ".join(LETTERS[n * 7 % 26] * (n % 3 + 1) for n in range(40))
LABELS = {0: "O", 1: "B-X", 2: "I-X", 3: "B-Y", 4: "I-Y"}


def letters(length: int = 64, **more: Any) -> Any:
    """A tokenizer of single letters, of the kind that BERT has."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    named = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, model_input_names=NAMES, **named, **more
    )


def tuned(head: Any, seed: int = 1) -> None:
    """Weights that make a head tell one text from another."""
    randomise(head, std=1.0, seed=seed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letters()


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model for tests that leave it as it is."""
    model = randomise(tiny_model("bert"), std=0.3)
    for number, name in enumerate(("topic", "mood")):
        model.add_adapter(name, config="pfeiffer")
        randomise(model.adapters[name], std=0.3, seed=number)
        model.add_classification_head(name, num_labels=3)
        tuned(model.heads[name], number)
    model.add_tagging_head("ner", id2label=LABELS)
    model.add_qa_head("qa")
    model.add_multiple_choice_head("choice", num_choices=None)
    model.add_masked_lm_head("lm")
    for name in ("ner", "qa", "choice"):
        tuned(model.heads[name])
    model.set_active_adapters(None)
    model.active_head = None
    return model.eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """A transformers model, and the same as a model with a flexible head called ``x``."""

    def convert(class_name: str, **changes: Any) -> tuple[Any, Any]:
        directory = tmp_path_factory.mktemp(class_name)
        static = randomise(tiny_static(class_name, **changes), std=0.4)
        static.save_pretrained(directory / "model")
        flexheads.init(copy.deepcopy(static)).save_head(directory / "head")
        model = BertModelWithHeads.from_pretrained(directory / "model")
        model.load_head(directory / "head", load_as="x")
        return static, model

    return convert


def close(ours: Any, theirs: Any) -> None:
    """The same plain values, numbers up to rounding."""
    assert type(ours) is type(theirs) or isinstance(ours, int | float)
    if isinstance(ours, Mapping):
        assert set(ours) == set(theirs)
        for key in ours:
            close(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            close(own, other)
    elif isinstance(ours, str):
        assert ours == theirs
    else:
        assert ours == pytest.approx(float(theirs), abs=2e-5)


# --- the same as transformers' pipelines -----------------------------------------------------

answers = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) > 4,
    reason="the pipeline that answers questions is gone in transformers 5",
)


@pytest.mark.parametrize("top_k", [None, 2])
def test_classification(top_k: int | None, converted: Any, tokenizer: Any) -> None:
    static, model = converted("BertForSequenceClassification", num_labels=3)
    pipe = transformers.pipeline("text-classification", static, tokenizer=tokenizer, device="cpu")
    theirs = pipe(TEXTS, **({} if top_k is None else {"top_k": top_k}))
    ours = model.predict("x", TEXTS, tokenizer, batch_size=4, top_k=top_k)
    close(ours, theirs)
    assert len({own["label"] if top_k is None else own[0]["label"] for own in ours}) > 1


def test_tagging(converted: Any, tokenizer: Any) -> None:
    static, model = converted("BertForTokenClassification", num_labels=5, id2label=LABELS)
    pipe = transformers.pipeline(
        "token-classification",
        static,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        device="cpu",
    )
    ours = model.predict("x", TEXTS, tokenizer, batch_size=4)
    for own, theirs, text in zip(ours, pipe(TEXTS), TEXTS, strict=True):
        # Theirs writes words anew from the tokens.
        shown = [{**span, "word": text[span["start"] : span["end"]]} for span in theirs]
        close(own, shown)
    assert any(ours)


@answers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_question_answering(converted: Any, tokenizer: Any) -> None:
    static, model = converted("BertForQuestionAnswering")
    pipe = transformers.pipeline("question-answering", static, tokenizer=tokenizer, device="cpu")
    asked = [("who is it", text) for text in TEXTS[2:]]
    ours = model.predict("x", asked, tokenizer, align_to_words=False)
    for own, (question, context) in zip(ours, asked, strict=True):
        close(own, pipe(question=question, context=context, align_to_words=False))


@answers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_long_context_is_read_as_by_transformers(converted: Any, tokenizer: Any) -> None:
    static, model = converted("BertForQuestionAnswering")
    pipe = transformers.pipeline("question-answering", static, tokenizer=tokenizer, device="cpu")
    asked, how = {"question": "who", "context": LONG}, {"top_k": 5, "align_to_words": False}
    # Windows do not overlap, because theirs gives what two windows have twice.
    ours = model.predict("x", asked, tokenizer, max_length=24, stride=0, **how)
    close(ours, pipe(**asked, max_seq_len=24, doc_stride=0, **how))


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_best_answer_of_all_windows(unanswerable: bool, tokenizer: Any) -> None:
    model = randomise(tiny_model("bert"), std=0.3)
    model.add_qa_head("x", unanswerable=unanswerable)
    tuned(model.heads["x"])
    how = {"max_length": 24, "stride": 6}
    asked = {"question": "who", "context": LONG}
    encoded = tokenizer(
        "who",
        LONG,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        **how,
    )
    expected: dict[tuple[int, int], float] = {}
    nothing = []
    for index, ids in enumerate(encoded["input_ids"]):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), head="x")
        own = [at for at, part in enumerate(encoded.sequence_ids(index)) if part == 1]
        start, end = (x[0, [0, *own]].softmax(-1) for x in (out.start_logits, out.end_logits))
        nothing.append(float(start[0] * end[0]))
        for first in range(len(own)):
            for last in range(first, min(len(own), first + 3)):
                places = [encoded["offset_mapping"][index][own[at]] for at in (first, last)]
                score = float(start[first + 1] * end[last + 1])
                place = places[0][0], places[1][1]
                expected[place] = max(score, expected.get(place, 0.0))
    ranked = sorted(((s, place) for place, s in expected.items()), reverse=True)
    options = {"max_answer_length": 3, "align_to_words": False}
    found = model.predict("x", asked, tokenizer, top_k=3, **how, **options)
    best = model.predict("x", asked, tokenizer, **how, **options)
    assert len(encoded["input_ids"]) > 3
    answers = [own for own in found if own["answer"]]
    assert answers[0]["score"] == pytest.approx(ranked[0][0], abs=1e-5)
    assert (answers[0]["start"], answers[0]["end"]) == ranked[0][1]
    assert all(LONG[own["start"] : own["end"]] == own["answer"] for own in answers)
    assert best == found[0]
    if min(nothing) < ranked[0][0]:
        assert best["answer"]
    if not unanswerable:
        assert len(answers) == 3


def test_no_answer_in_any_window(tokenizer: Any) -> None:
    model = randomise(tiny_model("bert"), std=0.3)
    model.add_qa_head("x", unanswerable=True, null_threshold=-1000.0)
    tuned(model.heads["x"])
    asked = {"question": "who", "context": LONG}
    none = model.predict("x", asked, tokenizer, max_length=24)
    assert (none["answer"], none["start"], none["end"]) == ("", 0, 0)
    model.add_qa_head("x", unanswerable=True, null_threshold=1000.0, overwrite_ok=True)
    assert model.predict("x", asked, tokenizer, max_length=24)["answer"]


def test_masks(converted: Any, tokenizer: Any) -> None:
    static, model = converted("BertForMaskedLM", vocab_size=len(tokenizer))
    pipe = transformers.pipeline("fill-mask", static, tokenizer=tokenizer, device="cpu")
    masked = ["ab [MASK] cd", "a [MASK]"]
    close(model.predict("x", masked, tokenizer, top_k=3), pipe(masked, top_k=3))


# --- batches ---------------------------------------------------------------------------------

SAMPLES: dict[str, list[Any]] = {
    "topic": [*TEXTS, ("a b", "c d e"), {"text": "q", "text_pair": "r s"}, ["ab", "cd"]],
    "ner": [*TEXTS, LONG, ["ab", "cd", "hello"]],
    "qa": [("who is it", text) for text in [*TEXTS[2:], LONG]],
    "choice": [("a b", ["c", "d e f"]), {"prompt": "x", "choices": ["y", "z", "ab"]}] * 2,
    "lm": ["ab [MASK]", "hello [MASK] and good day", "[MASK]"],
}


@pytest.mark.parametrize("head", SAMPLES)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_results_come_in_the_given_order_whatever_the_batches(
    head: str, batch_size: int, shared: Any, tokenizer: Any
) -> None:
    samples = SAMPLES[head]
    how: dict[str, Any] = {"max_length": 24} if head in ("ner", "qa") else {}
    alone = [shared.predict(head, [sample], tokenizer, **how)[0] for sample in samples]
    close(shared.predict(head, samples, tokenizer, batch_size=batch_size, **how), alone)
    backwards = shared.predict(head, samples[::-1], tokenizer, batch_size=batch_size, **how)
    close(backwards, alone[::-1])


def test_batches_are_of_about_one_length(shared: Any, tokenizer: Any) -> None:
    texts = ["a b c d e f g h i j"[:length] for length in (19, 1, 17, 3, 15, 5)]
    seen: list[tuple[int, ...]] = []
    hook = shared.bert.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared.predict("topic", texts, tokenizer, batch_size=2)
    hook.remove()
    assert seen == [(2, 12), (2, 10), (2, 4)]


def test_one_sample_alone_gives_its_result_alone(shared: Any, tokenizer: Any) -> None:
    alone = shared.predict("topic", "ab cd", tokenizer)
    assert isinstance(alone, dict)
    assert shared.predict("topic", ["ab cd"], tokenizer) == [alone]
    assert shared.predict("topic", (text for text in ["ab cd"]), tokenizer) == [alone]
    assert shared.predict("topic", [], tokenizer) == []
    pair = shared.predict("topic", ("ab", "cd"), tokenizer)
    assert shared.predict("topic", [("ab", "cd")], tokenizer) == [pair]


def test_padding_is_no_matter_of_the_tokenizer(shared: Any) -> None:
    expected = shared.predict("topic", TEXTS, letters())
    left = letters(padding_side="left")
    close(shared.predict("topic", TEXTS, left), expected)
    assert left.padding_side == "left"


def test_what_is_too_long_is_cut_for_one_label(shared: Any, tokenizer: Any) -> None:
    cut = shared.predict("topic", LONG, tokenizer, max_length=10)
    ids = tokenizer(LONG, truncation=True, max_length=10, return_tensors="pt")
    with torch.no_grad():
        logits = shared(**ids, head="topic", adapter_names="topic").logits.softmax(-1)[0]
    close(cut["score"], float(logits.max()))
    whole = shared.predict("topic", LONG, tokenizer)
    limited = tokenizer(LONG, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        logits = shared(**limited, head="topic", adapter_names="topic").logits.softmax(-1)[0]
    close(whole["score"], float(logits.max()))


@pytest.mark.parametrize("stride", [0, 1, 5, None])
def test_windows_of_tokens_are_joined(stride: int | None, tokenizer: Any) -> None:
    """Where tokens do not know each other, windows change nothing."""
    model = randomise(tiny_model("bert", max_position_embeddings=256), std=0.3)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
    model.add_tagging_head("ner", id2label=LABELS, hidden_layer=0)
    tuned(model.heads["ner"])
    texts = [LONG, "ab cd", LONG[:50], LONG[:41].split()]
    at_once = model.predict("ner", texts, letters(256))
    assert len(at_once[0]) > 10
    for truncation_side in ("right", "left"):
        own = letters(256, truncation_side=truncation_side)
        found = model.predict("ner", texts, own, max_length=14, stride=stride, batch_size=3)
        close(found, at_once)


def test_a_token_is_read_where_it_has_most_around_it(shared: Any, tokenizer: Any) -> None:
    found = shared.predict("ner", LONG, tokenizer, max_length=12, stride=4, aggregation="none")
    encoded = tokenizer(
        LONG,
        truncation=True,
        max_length=12,
        stride=4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    expected: dict[int, tuple[int, dict[str, Any]]] = {}
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        with torch.no_grad():
            logits = shared(torch.tensor([ids]), head="ner", adapter_names=[]).logits[0]
        for at, (begin, end) in enumerate(offsets[1:-1], 1):
            around = min(at - 1, len(ids) - 2 - at)
            score, label = logits[at].softmax(-1).max(0)
            said = {"entity": LABELS[int(label)], "score": float(score), "start": begin, "end": end}
            if begin not in expected or around > expected[begin][0]:
                expected[begin] = (around, said)
    ours = {own["start"]: {k: own[k] for k in ("entity", "score", "start", "end")} for own in found}
    known = {at: said for at, (_, said) in expected.items() if said["entity"] != "O"}
    assert len(known) > 20
    # At the very beginning and end of the text a token has nothing beyond it in any window.
    middle = [at for at in known if 10 < at < len(LONG) - 10]
    same = [at for at in middle if at in ours and ours[at]["entity"] == known[at]["entity"]]
    assert len(same) >= 0.9 * len(middle)


# --- adapters --------------------------------------------------------------------------------


def scores(model: Any, tokenizer: Any, text: str, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), **how).logits.softmax(-1)[0]


def test_the_adapter_of_the_head_s_name_acts(shared: Any, tokenizer: Any) -> None:
    def said(**how: Any) -> float:
        return float(shared.predict("topic", "ab cd", tokenizer, **how)["score"])

    def expected(setup: Any) -> float:
        return float(scores(shared, tokenizer, "ab cd", head="topic", adapter_names=setup).max())

    assert said() == pytest.approx(expected("topic"), abs=1e-6)
    assert said(adapter_names="mood") == pytest.approx(expected("mood"), abs=1e-6)
    assert said(adapter_names=["topic", "mood"]) == pytest.approx(
        expected(["topic", "mood"]), abs=1e-6
    )
    assert said(adapter_names=[]) == pytest.approx(expected([]), abs=1e-6)
    assert len({round(expected(setup), 6) for setup in ("topic", "mood", [])}) == 3


def test_else_what_is_active_acts(shared: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(shared)
    bare = model.predict("ner", TEXTS, tokenizer)
    model.set_active_adapters("mood")
    model.active_head = "topic"
    assert model.predict("ner", TEXTS, tokenizer) != bare
    close(model.predict("ner", TEXTS, tokenizer, adapter_names=[]), bare)
    model.set_active_adapters("mood", skip_layers=[0, 1])
    close(model.predict("ner", TEXTS, tokenizer), bare)
    model.set_active_adapters(Parallel("topic", "mood"))
    with pytest.raises(CompositionError, match="predict makes the batches"):
        model.predict("ner", TEXTS, tokenizer)
    assert model.active_adapters == Parallel("topic", "mood")
    with pytest.raises(CompositionError):
        model.predict("topic", TEXTS, tokenizer, adapter_names=Parallel("topic", "mood"))


def test_every_sample_can_have_its_own_adapter(shared: Any, tokenizer: Any) -> None:
    setups = ["topic", "mood", None, "mood", "topic", None]
    found = shared.predict("mood", TEXTS, tokenizer, adapter_names=Rows(setups), batch_size=4)
    alone = [
        shared.predict("mood", text, tokenizer, adapter_names=setup or [])
        for text, setup in zip(TEXTS, setups, strict=True)
    ]
    close(found, alone)
    choices = SAMPLES["choice"]
    rows = Rows(["topic", "mood", None, "topic"])
    found = shared.predict("choice", choices, tokenizer, adapter_names=rows)
    alone = [
        shared.predict("choice", [sample], tokenizer, adapter_names=setup or [])[0]
        for sample, setup in zip(choices, rows, strict=True)
    ]
    close(found, alone)
    with pytest.raises(CompositionError, match=r"2 rows.*6 samples"):
        shared.predict("mood", TEXTS, tokenizer, adapter_names=Rows(["mood", None]))


# --- the model stays as it is ----------------------------------------------------------------


def test_nothing_changes(shared: Any, tokenizer: Any, snapshot: Any) -> None:
    before = snapshot(shared)
    for head, samples in SAMPLES.items():
        shared.predict(head, samples, tokenizer)
    assert snapshot(shared) == before


def test_a_model_in_training_stays_in_training(shared: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(shared)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        assert not module.training, name
    expected = model.predict("topic", TEXTS, tokenizer)
    model.train()
    used: list[Any] = []
    hook = model.bert.register_forward_hook(lambda module, *_: used.append(module))
    close(model.predict("topic", TEXTS, tokenizer), expected)
    close(model.heads["topic"].predict(tokenizer, TEXTS), expected)
    hook.remove()
    assert all(module.training for module in model.modules())
    assert used
    assert all(module is not model.bert for module in used), "others may be training it"
    model.train_adapter("topic")
    labels = torch.tensor([1])
    model(**tokenizer("ab", return_tensors="pt"), labels=labels, head="topic").loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert trained
    grads = [p.grad.clone() for p in trained]
    model.predict("topic", TEXTS, tokenizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, grads, strict=True))


def test_threads_do_not_disturb_each_other(shared: Any, tokenizer: Any) -> None:
    texts = TEXTS * 3
    work = [("topic", {}), ("mood", {}), ("topic", {"adapter_names": "mood"}), ("ner", {})] * 2
    expected = [shared.predict(head, texts, tokenizer, batch_size=4, **how) for head, how in work]
    found: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        head, how = work[number]
        for _ in range(3):
            found[number] = shared.predict(head, texts, tokenizer, batch_size=4, **how)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(found, expected)


# --- heads know their model ------------------------------------------------------------------


def test_a_head_predicts_with_the_model_that_it_is_in(shared: Any, tokenizer: Any) -> None:
    expected = shared.predict("topic", TEXTS, tokenizer)
    assert shared.heads["topic"].predict(tokenizer, TEXTS) == expected
    copied, sent = copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))
    with torch.no_grad():
        *_, shared_weight = (p for p in shared.heads["topic"].parameters() if p.dim() == 2)
        before = shared_weight.clone()
        shared_weight.zero_()
        try:
            for model in (copied, sent):
                close(model.heads["topic"].predict(tokenizer, TEXTS), expected)
        finally:
            shared_weight.copy_(before)


def test_a_head_by_itself_leaves_its_model_behind(shared: Any, tokenizer: Any) -> None:
    head = shared.heads["topic"]
    weights = sum(p.numel() for p in head.parameters()) * 4
    assert len(pickle.dumps(head)) < 2 * weights + 20_000
    for alone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        with pytest.raises(ConfigError, match="'topic' is in no model"):
            alone.predict(tokenizer, "ab")
        assert not any(isinstance(module, type(shared)) for module in alone.modules())


def test_a_head_that_has_left_its_model_says_so(tokenizer: Any) -> None:
    model = tiny_model("bert")
    model.add_classification_head("x")
    first = model.heads["x"]
    model.add_classification_head("x", overwrite_ok=True)
    second = model.heads["x"]
    with pytest.raises(ConfigError, match="in no model"):
        first.predict(tokenizer, "ab")
    assert second.predict(tokenizer, "ab")["label"] in ("LABEL_0", "LABEL_1")
    model.delete_head("x")
    with pytest.raises(ConfigError, match="in no model"):
        second.predict(tokenizer, "ab")
    assert not any(key.endswith("_owner") for key in model.state_dict())


# --- what is missing or wrong ----------------------------------------------------------------


def test_the_tokenizer_comes_with_the_model(shared: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name_or_path is empty.*tokenizer="):
        shared.predict("topic", "ab")
    shared.save_pretrained(tmp_path)
    model = BertModelWithHeads.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="No tokenizer was given") as caught:
        model.predict("topic", "ab")
    assert str(tmp_path) in str(caught.value)
    tokenizer.save_pretrained(tmp_path)
    close(model.predict("topic", TEXTS), shared.predict("topic", TEXTS, tokenizer))
    close(model.heads["topic"].predict(None, TEXTS), shared.predict("topic", TEXTS, tokenizer))


class Slow:
    """A tokenizer that gives ids, and nothing else."""

    is_fast, pad_token_id, model_max_length = False, 0, 64

    def __init__(self) -> None:
        self.inner = letters()

    def __call__(self, texts: list[str], **arguments: Any) -> dict[str, Any]:
        return dict(self.inner(texts, **arguments))


def test_a_tokenizer_that_knows_no_places(shared: Any, tokenizer: Any) -> None:
    close(shared.predict("topic", TEXTS, Slow()), shared.predict("topic", TEXTS, tokenizer))
    for head, samples in (("ner", TEXTS), ("qa", [("a", "b")])):
        with pytest.raises(UnsupportedError, match=r"Slow does not tell where.*fast tokenizer"):
            shared.predict(head, samples, Slow())


WRONG: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "no head": ("topik", "ab", {}, UnknownNameError, "Did you mean 'topic'"),
    "no adapter": ("topic", "ab", {"adapter_names": "no"}, UnknownNameError, "no adapter named"),
    "no option": ("topic", "ab", {"topk": 2}, UnknownNameError, "Did you mean 'top_k'"),
    "no text": ("topic", ["ab", 3], {}, ConfigError, "Sample 1 is 3, and should be a text"),
    "three texts": ("topic", [("a", "b", "c")], {}, ConfigError, "Sample 0 is"),
    "words and a text": ("topic", [(["a"], "b")], {}, ConfigError, "Sample 0 is"),
    "no words": ("ner", [["ab", 4]], {}, ConfigError, "Sample 0 is"),
    "a question alone": ("qa", ["who"], {}, ConfigError, r"\(question, context\)"),
    "another key": ("qa", [{"question": "a", "text": "b"}], {}, ConfigError, "context"),
    "one choice as text": ("choice", [("a", "b")], {}, ConfigError, "Sample 0"),
    "no choice": ("choice", [("a", [])], {}, ConfigError, "Sample 0"),
    "no batch": ("topic", "ab", {"batch_size": 0}, ConfigError, "batch_size=0"),
    "a large stride": ("ner", LONG, {"max_length": 8, "stride": 6}, ConfigError, "stride=6"),
    "a long question": ("qa", [(LONG, "ab")], {"max_length": 16}, ConfigError, "longest question"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_cost_no_compute(case: str, shared: Any, tokenizer: Any) -> None:
    head, samples, how, error, message = WRONG[case]
    calls: list[int] = []
    hook = shared.bert.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(error, match=message):
            shared.predict(head, samples, tokenizer, **how)
    finally:
        hook.remove()
    assert not calls


def test_a_tokenizer_that_gives_nothing() -> None:
    model = randomise(tiny_model("gpt2"), std=0.2)
    model.add_classification_head("x")
    with pytest.raises(ConfigError, match="has no tokens"):
        model.predict("x", ["ab", ""], letters_without_frame())


def letters_without_frame() -> Any:
    """A tokenizer without special tokens, and so without padding."""
    pieces = {piece: n for n, piece in enumerate(["[UNK]", *LETTERS])}
    inner = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_a_tokenizer_without_padding() -> None:
    model, own = randomise(tiny_model("gpt2"), std=0.2), letters_without_frame()
    model.add_classification_head("x", num_labels=3)
    model.add_causal_lm_head("lm")
    tuned(model.heads["x"])
    texts = ["a b c d e f", "a", "q r"]
    for head in ("x", "lm"):
        alone = [model.predict(head, text, own) for text in texts]
        close(model.predict(head, texts, own), alone)
    with torch.no_grad():
        logits = model(**own("q r", return_tensors="pt"), head="lm").logits[0, -1].softmax(-1)
    assert model.predict("lm", "q r", own)[0]["token"] == int(logits.argmax())


# --- other kinds of models and heads ---------------------------------------------------------


def test_images() -> None:
    pytest.importorskip("PIL")
    model = randomise(tiny_model("vit"), std=0.2)
    size = model.config.image_size
    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    model.add_image_classification_head("x", num_labels=3)
    tuned(model.heads["x"])
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(3)]
    found = model.predict("x", images, processor, batch_size=2)
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=pixels, head="x").logits.softmax(-1)
    expected = [
        {"label": f"LABEL_{int(row.argmax())}", "score": float(row.max())} for row in logits
    ]
    close(found, expected)


def test_sounds() -> None:
    # Norms over time, which other models of sound have, see the padding of a batch.
    model = randomise(tiny_model("wav2vec2", feat_extract_norm="layer"), std=0.2)
    model.add_classification_head("x", num_labels=3)
    tuned(model.heads["x"])
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    generator = np.random.default_rng(0)
    sounds = [generator.standard_normal(n).astype(np.float32) for n in (400, 700, 550)]
    found = model.predict("x", sounds, extractor, batch_size=2)
    alone = [model.predict("x", [sound], extractor)[0] for sound in sounds]
    close(found, alone)
    told = [{"array": sounds[0], "sampling_rate": 16_000}]
    close(model.predict("x", told, extractor), alone[:1])
    with pytest.raises(ConfigError, match=r"8000 Hz.*16000 Hz"):
        model.predict("x", [{"array": sounds[0], "sampling_rate": 8_000}], extractor)
    with pytest.raises(ConfigError, match="Sample 0 has shape"):
        model.predict("x", [np.zeros((2, 400))], extractor)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_models_with_a_decoder(architecture: str) -> None:
    model = randomise(tiny_model(architecture), std=0.1)
    model.add_classification_head("x", num_labels=3)
    tuned(model.heads["x"])
    end, pad = int(model.config.eos_token_id), int(model.config.pad_token_id)
    names = {f"<{n}>": n for n in range(4)}
    names |= {letter: n for n, letter in enumerate(LETTERS, 4)}
    inner = tokenizers.Tokenizer(models.WordLevel(names, unk_token="<3>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A <{end}>", special_tokens=[(f"<{end}>", end)]
    )
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=f"<{pad}>", model_input_names=NAMES
    )
    texts = ["a b c d", "e", "f g"]
    found = model.predict("x", texts, own)
    with torch.no_grad():
        logits = [model(**own(t, return_tensors="pt"), head="x").logits[0] for t in texts]
    for own_result, row in zip(found, logits, strict=True):
        assert own_result["label"] == f"LABEL_{int(row.argmax())}"
        assert own_result["score"] == pytest.approx(float(row.softmax(-1).max()), abs=1e-5)


def test_a_type_that_does_not_decode(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    model.add_classification_head("x")
    monkeypatch.setattr(type(model.heads["x"]), "decode", PredictionHead.decode)
    with pytest.raises(UnsupportedError, match="do not decode"):
        model.predict("x", "ab", tokenizer)


EVERY: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "classification": ({"num_labels": 3}, TEXTS),
    "multilabel_classification": ({"num_labels": 3}, TEXTS),
    "regression": ({"num_labels": 2}, TEXTS),
    "ordinal": ({"num_labels": 4}, TEXTS),
    "embedding": ({}, TEXTS),
    "ranking": ({}, TEXTS),
    "next_sentence": ({"num_labels": 2}, [(text, "yes it is") for text in TEXTS]),
    "multiple_choice": ({}, [(text, ["yes", "no no"]) for text in TEXTS]),
    "tagging": ({"num_labels": 3}, TEXTS),
    "crf_tagging": ({"num_labels": 3}, TEXTS),
    "detection": ({}, TEXTS),
    "question_answering": ({}, [("is it", text) for text in TEXTS]),
    "dependency_parsing": ({"num_labels": 3}, [*TEXTS, ["to", "be"]]),
    "span_classification": ({"num_labels": 3}, TEXTS),
    "late_interaction": ({}, TEXTS),
    "masked_lm": ({"vocab_size": 99}, [f"{text} [MASK] x" for text in TEXTS]),
    "causal_lm": ({"vocab_size": 99}, TEXTS),
}


def test_every_type_on_text_is_here() -> None:
    kinds = {name: resolve(spec.head) for name, spec in registry().head_types.items()}
    assert {n for n, kind in kinds.items() if kind.needs in (None, "tokens")} == set(EVERY)


@pytest.mark.parametrize("head_type", EVERY)
def test_every_type_predicts_plain_values(head_type: str, tokenizer: Any) -> None:
    config, samples = EVERY[head_type]
    model = randomise(tiny_model("bert"), std=0.2)
    model.add_head("x", head_type, **config)
    tuned(model.heads["x"])
    found = model.predict("x", samples, tokenizer, batch_size=4)
    assert len(found) == len(samples)
    assert json.loads(json.dumps(found)) == found
    close(found, [model.predict("x", [sample], tokenizer)[0] for sample in samples])
    assert any(own != found[0] for own in found)


def test_groups_of_choices_are_ranked(tokenizer: Any) -> None:
    model = randomise(tiny_model("bert"), std=0.3)
    model.add_head("x", "ranking")
    tuned(model.heads["x"])
    groups = [("who", ["me", "you or me"]), {"prompt": "a", "choices": ["b", "c", "d e"]}]
    found = model.predict("x", groups, tokenizer)
    for (prompt, choices), ranked in zip([groups[0], ("a", ["b", "c", "d e"])], found, strict=True):
        alone = model.predict("x", [(prompt, choice) for choice in choices], tokenizer)
        by_text = {own["text"]: own["score"] for own in ranked}
        close(by_text, {c: own["score"] for c, own in zip(choices, alone, strict=True)})
        assert [own["score"] for own in ranked] == sorted(by_text.values(), reverse=True)


def test_text_from_sound() -> None:
    model = randomise(tiny_model("wav2vec2", feat_extract_norm="layer"), std=0.3)
    model.add_head("x", "ctc", vocab_size=6)
    tuned(model.heads["x"])
    names = {token: n for n, token in enumerate(["<pad>", "a", "b", "c", "d", "|"])}
    inner = tokenizers.Tokenizer(models.WordLevel(names, unk_token="a"))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")

    class Processor:
        """A feature extractor and a tokenizer, as processors hold them."""

        feature_extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
        tokenizer = plain

    generator = np.random.default_rng(0)
    sounds = [generator.standard_normal(n).astype(np.float32) for n in (900, 700, 1500)]
    found = model.predict("x", sounds, Processor())
    assert json.loads(json.dumps(found)) == found
    close(found, [model.predict("x", [sound], Processor())[0] for sound in sounds])
    with pytest.raises(UnsupportedError, match="tokenizer"):
        model.predict("x", sounds, Processor.feature_extractor)


def test_sound_that_a_decoder_listens_to() -> None:
    model = randomise(tiny_model("whisper", max_source_positions=50), std=0.2)
    model.add_classification_head("x", num_labels=3, layers=1)
    tuned(model.heads["x"])
    bands = model.config.num_mel_bins
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=1)
    generator = np.random.default_rng(0)
    sounds = [generator.standard_normal(n).astype(np.float32) for n in (9000, 16000, 4000)]
    found = model.predict("x", sounds, extractor)
    made = extractor(sounds, sampling_rate=16_000, return_tensors="pt")
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        logits = model(**made, decoder_input_ids=start, head="x").logits.softmax(-1)
    expected = [
        {"label": f"LABEL_{int(row.argmax())}", "score": float(row.max())} for row in logits
    ]
    close(found, expected)


# --- progress --------------------------------------------------------------------------------


def test_progress_is_shown_where_it_takes_long(
    shared: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    shared.predict("topic", TEXTS, tokenizer)
    assert capsys.readouterr().err == ""
    shared.predict("topic", TEXTS, tokenizer, progress=True)
    assert "6/6" in capsys.readouterr().err
    monkeypatch.setattr("flexheads.models.heads.predicting._PATIENCE", 0.0)
    shared.predict("topic", TEXTS, tokenizer)
    assert "6/6" in capsys.readouterr().err
    shared.predict("topic", TEXTS, tokenizer, progress=False)
    assert capsys.readouterr().err == ""
    transformers.utils.logging.disable_progress_bar()
    try:
        shared.predict("topic", TEXTS, tokenizer, progress=True)
    finally:
        transformers.utils.logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


def test_the_tokenizer_s_limit_and_the_model_s(tokenizer: Any) -> None:
    from flexheads.models.heads.processors import longest

    bert, roberta = tiny_model("bert"), tiny_model("roberta")
    assert longest(bert, letters(16)) == 16
    assert longest(bert, letters(10**30)) == tiny_config("bert").max_position_embeddings
    positions = roberta.roberta.embeddings.position_embeddings
    assert longest(roberta, letters(10**30)) == len(positions.weight) - positions.padding_idx - 1
    ids = torch.full((1, longest(roberta, letters(10**30))), 5)
    assert roberta(ids).last_hidden_state.shape[1] == ids.shape[1]
    assert longest(tiny_model("t5"), letters(10**30)) is None
