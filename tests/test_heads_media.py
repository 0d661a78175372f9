"""Heads for sound and images: losses and scores as transformers' own, what they decode, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from flexheads.errors import CheckpointError, ConfigError, LabelError, UnsupportedError
from flexheads.heads import Features, Source
from flexheads.models.static import init
from flexheads.plugins import registry
from flexheads.testing import tiny_inputs, tiny_model, tiny_static

Converted = Callable[..., tuple[Any, Any]]

# WavLM hands torch a mask of another kind than its bias.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

SOUND = [
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2ForAudioFrameClassification",
    "Wav2Vec2ForXVector",
    "HubertForSequenceClassification",
    "WavLMForXVector",
    "WhisperForAudioClassification",
]


def labelled(inputs: dict[str, Tensor], static_class: str) -> Tensor:
    """Labels that a static class takes."""
    rows = inputs.get("input_values", inputs.get("input_features"))
    assert rows is not None
    if "FrameClassification" in static_class:
        return torch.eye(2)[torch.arange(18) % 2].repeat(len(rows), 1, 1)
    return torch.arange(len(rows)) % 2


# --- equal to transformers' classes -----------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("static_class", ["Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC"])
def test_ctc_loss_is_that_of_the_static_class(
    converted: Converted, static_class: str, masked: bool, reduction: str
) -> None:
    static, model = converted(static_class, ctc_loss_reduction=reduction)
    inputs = tiny_inputs(model.config)
    if not masked:
        inputs.pop("attention_mask")
    labels = torch.tensor([[5, 5, 6, 7], [9, 8, -100, -100], [4, -100, -100, -100]])
    expected, actual = static(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert actual.lengths.tolist() == ([18, 18, 11] if masked else [18, 18, 18])


@pytest.mark.parametrize("zero", [True, False])
def test_rows_with_too_few_frames_are_infinite_or_nothing(converted: Converted, zero: bool) -> None:
    static, model = converted("Wav2Vec2ForCTC", ctc_zero_infinity=zero)
    inputs, labels = tiny_inputs(model.config), torch.full((3, 12), 5)  # equal ones need a blank
    expected, actual = static(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss
    assert torch.isinf(expected) != zero
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("static_class", SOUND)
def test_scores_and_losses_of_sound(converted: Converted, static_class: str, mixed: bool) -> None:
    static, model = converted(static_class, use_weighted_layer_sum=mixed)
    assert model.heads["h"].config.hidden_layer == ("mix" if mixed else None)
    inputs = tiny_inputs(model.config)
    inputs.pop("decoder_input_ids", None)
    if "FrameClassification" in static_class:
        inputs.pop("attention_mask")  # the static class counts padding, see below
    labels = labelled(inputs, static_class)
    expected, actual = static(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    if "embeddings" in expected:
        torch.testing.assert_close(actual.embeddings, expected.embeddings, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static_class", SOUND)
def test_mixed_layers_come_back_to_the_static_class(
    tmp_path: Path, converted: Converted, static_class: str
) -> None:
    static, model = converted(static_class, use_weighted_layer_sum=True)
    model.save_head(tmp_path / "back", "h")
    other = init(tiny_static(static_class, seed=1, use_weighted_layer_sum=True))
    other.load_head(tmp_path / "back")
    for key, tensor in static._saved_head("").tensors.items():
        assert torch.equal(other.state_dict()[key], tensor), key
    other = init(tiny_static(static_class, use_weighted_layer_sum=False))
    with pytest.raises(CheckpointError, match="reads a mix of layers"):
        other.load_head(tmp_path / "back")
    with torch.no_grad():
        model.heads["h"].mix.scale.fill_(2.0)
    model.save_head(tmp_path / "scaled", "h")
    other = init(tiny_static(static_class, use_weighted_layer_sum=True))
    with pytest.raises(CheckpointError, match="scales its mix of layers by 2"):
        other.load_head(tmp_path / "scaled")


@pytest.mark.parametrize(
    "static_class", ["ViTForMaskedImageModeling", "SwinForMaskedImageModeling"]
)
def test_loss_of_masked_pixels(converted: Converted, static_class: str) -> None:
    stride = {"vit": 8, "swin": 8}[registry().conversion(static_class).architecture]
    static, model = converted(static_class, encoder_stride=stride)
    inputs = tiny_inputs(model.config)
    count = (32 // model.config.patch_size) ** 2
    masked = torch.rand(3, count, generator=torch.Generator().manual_seed(0)) > 0.6
    # With hidden patches the backbones differ: the flexible one has no token that stands for them.
    with torch.no_grad():
        drawn = static(**inputs).reconstruction
        square = masked.view(3, 1, 32 // model.config.patch_size, -1)
        pixels = square.repeat_interleave(model.config.patch_size, 2)
        pixels = pixels.repeat_interleave(model.config.patch_size, 3)
        missed = (drawn - inputs["pixel_values"]).abs() * pixels
        expected = missed.sum() / (pixels.sum() + 1e-5) / 3
        labels = inputs["pixel_values"]
        actual = model(**inputs, labels=labels, masked_patches=masked)
    torch.testing.assert_close(actual.reconstruction, drawn, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.loss, expected)
    everything = model(**inputs, labels=labels).loss
    torch.testing.assert_close(everything, (drawn - labels).abs().mean())


def test_a_backbone_with_a_token_for_hidden_patches_learns_as_the_static_class(
    tmp_path: Path,
) -> None:
    static = init(tiny_static("ViTForMaskedImageModeling", encoder_stride=8))
    static.save_pretrained(tmp_path / "whole")
    static.save_head(tmp_path / "head")
    model_class = type(tiny_model("vit"))
    model = model_class.from_pretrained(tmp_path / "whole", use_mask_token=True)
    model.load_head(tmp_path / "head", load_as="h")
    inputs, masked = tiny_inputs(model.config), torch.arange(48).view(3, 16) % 3 == 0
    with torch.no_grad():
        expected = static(**inputs, bool_masked_pos=masked)
        labels = {"labels": inputs["pixel_values"], "masked_patches": masked}
        actual = model(**inputs, bool_masked_pos=masked, **labels)
    torch.testing.assert_close(actual.reconstruction, expected.reconstruction)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_loss_of_visual_tokens(converted: Converted) -> None:
    static, model = converted("BeitForMaskedImageModeling", use_mask_token=True)
    inputs, masked = tiny_inputs(model.config), torch.arange(48).view(3, 16) % 3 == 0
    tokens = torch.arange(48).view(3, 16)
    expected = static(**inputs, bool_masked_pos=masked, labels=tokens[masked])
    labels = tokens.masked_fill(~masked, -100)
    actual = model(**inputs, bool_masked_pos=masked, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_registers_are_no_patches() -> None:
    model = tiny_model("dinov2_with_registers", num_register_tokens=3)
    model.add_image_classification_head("h", pooling="patch_mean", num_labels=2)
    with torch.no_grad():
        output = model(**tiny_inputs(model.config), head=[])
        expected = model.heads["h"].layers(output.last_hidden_state[:, 4:].mean(dim=1))
        torch.testing.assert_close(model(**tiny_inputs(model.config)).logits, expected)


# --- frames and voices ------------------------------------------------------------------------


def test_frames_of_padding_do_not_count() -> None:
    model = tiny_model("wav2vec2")
    model.add_audio_frame_classification_head("f", num_labels=3)
    inputs = tiny_inputs(model.config)
    labels = torch.randint(3, (3, 18), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(labels, 3)
    output = model(**inputs, labels=labels)
    real = torch.arange(18) < torch.tensor([[18], [18], [11]])
    scores = output.logits[real]
    expected = torch.nn.functional.cross_entropy(scores, labels[real])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**inputs, labels=one_hot).loss, expected)
    model.add_audio_frame_classification_head("b", num_labels=3, loss="binary_cross_entropy")
    output = model(**inputs, labels=one_hot)
    targets = one_hot[real].float()
    both = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(output.loss, both(output.logits[real], targets))


def frames(*rows: str, letters: str) -> Tensor:
    """Scores whose best label is the letter, of each frame."""
    numbers = torch.tensor([[letters.index(letter) for letter in row] for row in rows])
    return 9.0 * torch.nn.functional.one_hot(numbers, len(letters))


def test_segments_of_frames() -> None:
    model = tiny_model("wav2vec2")
    model.add_audio_frame_classification_head("f", id2label={0: "noise", 1: "speech"})
    head = model.heads["f"]
    output = head.finish(frames("nnssn", "snnnn", letters="ns"), _features(torch.ones(2, 5)))
    output.lengths = torch.tensor([5, 3])
    found = head.decode(output)
    spans = [[(s["label"], s["start"], s["end"]) for s in row] for row in found]
    assert spans == [
        [("noise", 0, 2), ("speech", 2, 4), ("noise", 4, 5)],
        [("speech", 0, 1), ("noise", 1, 3)],
    ]
    assert all(s["score"] == pytest.approx(1 / (1 + 2.718281828**-9)) for r in found for s in r)
    json.dumps(found)


def test_several_speakers_at_once() -> None:
    model = tiny_model("wav2vec2")
    names = {0: "Anna", 1: "Bo"}
    model.add_audio_frame_classification_head("f", id2label=names, loss="binary_cross_entropy")
    scores = torch.tensor([[[5.0, -5], [5, 5], [-5, 5], [-5, -5]]])
    output = model.heads["f"].finish(scores, _features(torch.ones(1, 4)))
    spans = [(s["label"], s["start"], s["end"]) for s in model.heads["f"].decode(output)[0]]
    assert spans == [("Anna", 0, 2), ("Bo", 1, 3)]


def test_voices_need_some_frames() -> None:
    model = tiny_model("wav2vec2")
    model.add_xvector_head("x", 3, sizes=(8,), kernels=(10,), dilations=(1,), embedding_size=6)
    inputs = tiny_inputs(model.config)
    model(**inputs)
    inputs["attention_mask"][-1, 150:] = 0
    with pytest.raises(ConfigError, match="at least 11 frames"):
        model(**inputs)


# --- text from sound --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of letters, as models of this kind have."""
    path = tmp_path_factory.mktemp("letters") / "vocab.json"
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"helow"]
    path.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path))


def test_text_is_that_of_the_best_path(letters: Any) -> None:
    model = tiny_model("wav2vec2", vocab_size=10)
    model.add_ctc_head("text")
    head = model.heads["text"]
    scores = frames("_hhe_ll_lo|_w", "he||lo_eeeeee", letters="_???|helow")
    output = head.finish(scores, _features(torch.ones(2, 13)))
    source = Source(tokenizer=letters)
    assert head.decode(output, source) == [{"text": "hello w"}, {"text": "he loe"}]
    # The same without collapsing twice what a blank keeps apart.
    theirs = letters.batch_decode(scores.argmax(dim=-1))
    assert [row["text"] for row in head.decode(output, source)] == theirs
    output.lengths = torch.tensor([13, 6])
    assert head.decode(output, source)[1] == {"text": "he lo"}
    with pytest.raises(UnsupportedError, match="needs a tokenizer"):
        head.decode(output)


def _features(mask: Tensor) -> Any:
    """Features of nothing but a mask."""
    hidden = torch.zeros(*mask.shape, 32)
    return Features(BaseModelOutput(last_hidden_state=hidden), attention_mask=mask)


def test_trainers_do_not_gather_lengths() -> None:
    model = tiny_model("wav2vec2")
    model.add_ctc_head("text")
    output = model(**tiny_inputs(model.config))
    assert list(output) == ["logits"]
    assert len(output.to_tuple()) == 1


# --- files and errors -------------------------------------------------------------------------

ADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "audio_classification": ("wav2vec2", {"num_labels": 3, "projection_size": 8}),
    "audio_frame_classification": ("wavlm", {"num_labels": 3, "hidden_layer": "mix"}),
    "ctc": ("hubert", {"layers": 2, "reduction": "sum"}),
    "xvector": (
        "wav2vec2",
        {"num_labels": 3, "sizes": (8, 6), "kernels": (2, 1), "dilations": (1, 2)},
    ),
    "masked_image_modeling": ("swin", {"stride": 8}),
    "masked_image_tokens": ("vit", {"vocab_size": 20}),
}


@pytest.mark.parametrize("kind", list(ADDED))
def test_heads_come_back_from_files(tmp_path: Path, kind: str) -> None:
    architecture, config = ADDED[kind]
    model = tiny_model(architecture)
    getattr(model, f"add_{kind}_head")("h", **config)
    model.save_head(tmp_path, "h")
    other = tiny_model(architecture)
    other.load_head(tmp_path)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(other(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0])
    assert other.heads["h"].to_dict() == json.loads(json.dumps(model.heads["h"].to_dict()))


def test_voices_are_decoded() -> None:
    model = tiny_model("wav2vec2")
    model.add_xvector_head(
        "voice", **{**ADDED["xvector"][1], "id2label": {0: "Al", 1: "Bo", 2: "Cy"}}
    )
    head = model.heads["voice"]
    with torch.no_grad():
        output = model(**tiny_inputs(model.config))
    found = head.decode(output)
    assert [row["embedding"] for row in found] == output.embeddings.tolist()
    for row, logits in zip(found, output.logits, strict=True):
        cosines = [torch.cosine_similarity(logits, way, dim=0).item() for way in head.speakers.T]
        assert row["score"] == pytest.approx(max(cosines), abs=1e-6)
        assert row["label"] == ["Al", "Bo", "Cy"][cosines.index(max(cosines))]


def test_images_are_decoded() -> None:
    for kind, name in (
        ("masked_image_modeling", "reconstruction"),
        ("masked_image_tokens", "logits"),
    ):
        architecture, config = ADDED[kind]
        model = tiny_model(architecture)
        getattr(model, f"add_{kind}_head")("h", **config)
        with torch.no_grad():
            output = model(**tiny_inputs(model.config))
        right = output[name] if name == "reconstruction" else output[name].argmax(dim=-1)
        assert torch.equal(torch.tensor(model.heads["h"].decode(output)), right)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ctc", {"labels": torch.tensor([[99], [1], [1]])}, "hold 99"),
    ("ctc", {"labels": torch.tensor([[0], [1], [1]])}, "hold the blank"),
    ("ctc", {"labels": torch.tensor([1, 1, 1])}, "should have"),
    ("audio_classification", {"labels": torch.tensor([0, 1, 3])}, "hold 3"),
    ("audio_frame_classification", {"labels": torch.full((3, 18, 3), 2.0)}, "each is from 0 to 1"),
    ("xvector", {"labels": torch.tensor([0, 1])}, "should have"),
    ("masked_image_modeling", {"labels": torch.ones(3, 1, 32, 32)}, "should have"),
    ("masked_image_modeling", {"labels": torch.ones(3, 3, 16, 16)}, "draws"),
    ("masked_image_modeling", {"masked_patches": torch.zeros(3, 16)}, "mark no patch"),
    ("masked_image_tokens", {"labels": torch.full((3, 16), 20)}, "hold 20"),
]


@pytest.mark.parametrize(("kind", "labels", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_wrong_labels(kind: str, labels: dict[str, Any], message: str) -> None:
    architecture, config = ADDED[kind]
    model = tiny_model(architecture)
    getattr(model, f"add_{kind}_head")("h", **config)
    with pytest.raises(LabelError, match=message):
        model(**tiny_inputs(model.config), **labels)


def test_wrong_settings() -> None:
    model = tiny_model("wav2vec2")
    with pytest.raises(ConfigError, match="has its own"):
        model.add_ctc_head("c", loss="focal")
    with pytest.raises(ConfigError, match="not below"):
        model.add_ctc_head("c", vocab_size=5, blank=5)
    with pytest.raises(ConfigError, match="one value for each convolution"):
        model.add_xvector_head("x", 2, sizes=(8, 8))
    with pytest.raises(ConfigError, match="late=True"):
        model.add_classification_head("l", late=True, pooling="mean")
    with pytest.raises(UnsupportedError):
        model.add_masked_image_modeling_head("m")
    assert not list(model.heads)
