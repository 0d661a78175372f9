"""What language-model heads say to people: decoding, pipelines, streams of text."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexheads.errors import UnsupportedError
from flexheads.heads.source import Source
from flexheads.testing import randomise, tiny_model

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "very", "red"]
PROMPTS = ["the cat sat on", "a dog"]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def tokenizer(padding_side: str) -> Any:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def read(texts: list[str], padding_side: str = "left") -> tuple[Any, Source]:
    """Texts as a model reads them, and as a head decodes them."""
    tokens = tokenizer(padding_side)
    batch = tokens(texts, padding=True, return_tensors="pt")
    return batch, Source(texts=texts, tokenizer=tokens, **batch)


@pytest.fixture(scope="module")
def writer() -> Any:
    model = tiny_model("gpt2", vocab_size=len(SPECIAL + WORDS))
    model.add_causal_lm_head("lm")
    model.add_adapter("a", "double_seq_bn")
    randomise(model)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def filler() -> Any:
    model = tiny_model("bert", vocab_size=len(SPECIAL + WORDS))
    model.add_masked_lm_head("mlm")
    return randomise(model)


@pytest.mark.parametrize("adapter", [None, "a"])
def test_the_pipeline_writes(writer: Any, adapter: str | None) -> None:
    pipe = transformers.pipeline(
        "text-generation", model=writer, tokenizer=tokenizer("left"), device="cpu"
    )
    found = pipe(PROMPTS, batch_size=2, adapter_names=adapter, **GREEDY)
    batch, source = read(PROMPTS)
    ids = writer.generate(**batch, adapter_names=adapter, **GREEDY)
    decoded = writer.heads["lm"].decode(ids, source)
    # Some releases put prompt and text together without the space between them.
    for (row,), own in zip(found, decoded, strict=True):
        assert row["generated_text"].replace(" ", "") == own["generated_text"].replace(" ", "")
    longer = [row["generated_text"].startswith(p) for row, p in zip(decoded, PROMPTS, strict=True)]
    assert all(longer)


def test_texts_without_their_prompts(writer: Any) -> None:
    batch, source = read(PROMPTS)
    output = writer.generate(**batch, return_dict_in_generate=True, **GREEDY)
    decoded = writer.heads["lm"].decode(output, source, return_full_text=False)
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    texts = source.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [row["generated_text"] for row in decoded] == texts
    marked = writer.heads["lm"].decode(output, source, skip_special_tokens=False)
    assert marked[1]["generated_text"].startswith("[PAD] [PAD] a dog")
    alone = Source(tokenizer=source.tokenizer)
    with pytest.raises(UnsupportedError, match="input_ids"):
        writer.heads["lm"].decode(output, alone, return_full_text=False)
    with pytest.raises(UnsupportedError, match="tokenizer"):
        writer.heads["lm"].decode(output)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_may_follow(writer: Any, side: str) -> None:
    batch, source = read(PROMPTS, side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    decoded = writer.heads["lm"].decode(writer(**batch), source, top_k=3)
    for row, text in zip(decoded, PROMPTS, strict=True):
        own, _ = read([text])
        expected = writer(**own).logits[0, -1].softmax(-1).topk(3)
        assert [candidate["token"] for candidate in row] == expected.indices.tolist()
        assert [candidate["score"] for candidate in row] == pytest.approx(
            expected.values.tolist(), abs=1e-5
        )
        assert [c["token_str"] for c in row] == [(SPECIAL + WORDS)[c["token"]] for c in row]
    kept = writer(**batch, logits_to_keep=1)
    if side == "left":
        again = writer.heads["lm"].decode(kept, source, top_k=3)
        agree(again, decoded)


@pytest.mark.skipif(
    "fill-mask" not in transformers.pipelines.SUPPORTED_TASKS, reason="This release has none."
)
def test_masks_are_filled_as_the_pipeline_fills_them(filler: Any) -> None:
    texts = ["the [MASK] sat", "a [MASK] ran [MASK] the mat"]
    pipe = transformers.pipeline(
        "fill-mask", model=filler, tokenizer=tokenizer("right"), device="cpu"
    )
    batch, source = read(texts, "right")
    found = filler.heads["mlm"].decode(filler(**batch), source, top_k=4)
    for row, text in zip(found, texts, strict=True):
        agree(row, pipe(text, top_k=4))
    batch, source = read(["the cat"], "right")
    with pytest.raises(UnsupportedError, match=r"Row 0 has no \[MASK\]"):
        filler.heads["mlm"].decode(filler(**batch), source)


def agree(found: Any, expected: Any) -> None:
    """Asserts that candidates are the same, with scores that differ by rounding alone."""
    assert isinstance(found, list) == isinstance(expected, list)
    if not isinstance(found, list):
        assert found == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}
        return
    for one, other in zip(found, expected, strict=True):
        agree(one, other)


def test_a_decoder_beside_an_encoder_writes_texts() -> None:
    model = randomise(tiny_model("bart", vocab_size=len(SPECIAL + WORDS)))
    model.add_seq2seq_lm_head("lm")
    batch, source = read(PROMPTS, "right")
    ids = model.generate(**batch, **GREEDY)
    texts = source.tokenizer.batch_decode(ids, skip_special_tokens=True)
    head = model.heads["lm"]
    assert head.decode(ids, source) == [{"generated_text": text} for text in texts]
    output = model(**batch, decoder_input_ids=ids)
    likely = source.tokenizer.batch_decode(output.logits.argmax(-1), skip_special_tokens=True)
    assert head.decode(output, source) == [{"generated_text": text} for text in likely]


def test_text_streams_from_a_thread(writer: Any) -> None:
    tokens = tokenizer("left")
    streamer = transformers.TextIteratorStreamer(tokens, skip_prompt=True, timeout=60)
    batch, _ = read(PROMPTS[:1])
    how = {**batch, **GREEDY, "adapter_names": "a", "streamer": streamer}
    thread = threading.Thread(target=writer.generate, kwargs=how)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    ids = writer.generate(**batch, adapter_names="a", **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert streamed.split() == tokens.decode(ids[0]).split()


def test_a_trainer_generates_while_it_evaluates(tmp_path: Any) -> None:
    model = randomise(tiny_model("t5", vocab_size=len(SPECIAL + WORDS)))
    model.add_seq2seq_lm_head("lm")
    model.add_adapter("lm")
    model.train_adapter("lm")
    batch, source = read(["the cat sat", "a dog ran"], "right")
    rows = [
        {"input_ids": ids.tolist(), "labels": ids.flip(0).tolist()} for ids in batch["input_ids"]
    ]
    seen: list[Any] = []
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_max_length=6,
            report_to=[],
            use_cpu=True,
            max_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(source.tokenizer, model=model),
        compute_metrics=lambda found: seen.append(found) or {"rows": len(found.predictions)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_rows"] == 2
    model.eval()
    expected = model.generate(batch["input_ids"], max_length=6)
    found = torch.as_tensor(seen[0].predictions)  # padded to the length of the labels, or more
    assert torch.equal(found[:, :6], expected)
