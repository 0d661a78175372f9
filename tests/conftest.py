"""Fixtures of the promises about prediction heads: saved tiny backbones, and what a model is."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from flexheads import BertModelWithHeads
from flexheads.heads import Source
from flexheads.models.static import init
from flexheads.plugins import registry
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_static

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's type, shape and bits."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def describe(model: Any) -> dict[str, Any]:
    """Everything about a model that a failed call has to leave alone."""
    heads = getattr(model, "heads", {})
    active = model._attachment.runtime.active
    return {
        "tensors": {key: digest(tensor) for key, tensor in model.state_dict().items()},
        "objects": [id(module) for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "adapters": [(name, adapter.config.to_dict()) for name, adapter in model.adapters.items()],
        "heads": [(name, head.to_dict()) for name, head in heads.items()],
        "setup": active.setup,
        "active heads": active.heads,
        "ops": sorted(active.ops),
        "merged": list(model._merged),
        "config": model.config.to_json_string(use_diff=False),
        "hooks": [
            (name, kind, list(getattr(module, kind)))
            for name, module in model.named_modules()
            for kind in HOOKS
            if getattr(module, kind)
        ],
        "forward": "forward" in model.__dict__,
    }


def inputs_for(name: str, config: Any) -> dict[str, Tensor]:
    inputs = tiny_inputs(config)
    if name == "BertForMultipleChoice":
        inputs = {key: value[:, None].repeat(1, 4, 1) for key, value in inputs.items()}
        inputs["input_ids"] = inputs["input_ids"] * torch.arange(1, 5)[:, None] % 99
    return inputs


def labels_for(name: str, config: Any, ids: Tensor) -> dict[str, Tensor]:
    draw, batch = torch.Generator().manual_seed(1), ids.shape[0]
    tokens = torch.randint(0, 99, tuple(ids.shape), generator=draw)
    tokens[0, 2:4] = -100
    tokens[-1, -2:] = -100  # padding
    pair = torch.tensor([0, 1, 1])
    if name == "BertForSequenceClassification":
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.rand(batch, config.num_labels, generator=draw).round()}
        if config.problem_type == "regression":
            return {"labels": torch.randn(batch, config.num_labels, generator=draw)}
        if config.num_labels == 1:
            return {"labels": torch.randn(batch, generator=draw)}
        return {"labels": torch.tensor([0, 2, 1])}
    if name == "BertForTokenClassification":
        return {"labels": torch.where(tokens < 0, tokens, tokens % config.num_labels)}
    return {
        "BertForMultipleChoice": {"labels": torch.tensor([0, 3, 1])},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([0, 3, 50]),
            "end_positions": torch.tensor([2, 7, 6]),
        },
        "BertForNextSentencePrediction": {"labels": pair},
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": pair},
    }.get(name, {"labels": tokens})


@pytest.fixture(scope="session")
def examples() -> Callable[[str, Any], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The function that gives inputs and labels for a model of a static class, by its name."""

    def draw(name: str, config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = inputs_for(name, config)
        return inputs, labels_for(name, config, inputs["input_ids"])

    return draw


@pytest.fixture(scope="session")
def hashed() -> Callable[[Tensor], str]:
    """The function that hashes a tensor."""
    return digest


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Any], dict[str, Any]]:
    """The function that describes a model completely, to compare before and after."""
    return describe


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, str]]:
    """The function that hashes every file below a directory, hidden ones included."""

    def below(directory: Path) -> dict[str, str]:
        return {
            path.relative_to(directory).as_posix(): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
            )
            for path in sorted(directory.rglob("*"))
        }

    return below


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved plain BertModel in which every tensor is random. Read only."""
    directory = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    model = randomise(transformers.BertModel(tiny_config("bert")), std=0.1)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def model(backbone_dir: str) -> Any:
    """A model with flexible heads on that backbone, before anything is added."""
    return BertModelWithHeads.from_pretrained(backbone_dir)


@pytest.fixture
def tested_release() -> None:
    """For what is written from all members, on the transformers of constraints.txt."""
    constraints = Path(__file__).parents[1] / "constraints.txt"
    pins = re.findall(r"^transformers==([\w.]+)", constraints.read_text("utf-8"), re.MULTILINE)
    if transformers.__version__ not in pins:
        pytest.skip(f"written with transformers {pins[0]}")


SENTENCES = (
    "Anna Smith lives in New York and works for the United Nations.",
    "The headquarters of Acme Corporation are in Berlin, Germany.",
    "Where does Anna work? She has been working in Berlin since 1998!",
)


@pytest.fixture(scope="session")
def wordpieces() -> Any:
    """A tokenizer that cuts words into pieces, trained here, with special tokens around a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


@pytest.fixture(scope="session")
def read(wordpieces: Any) -> Callable[..., tuple[dict[str, Tensor], Source]]:
    """Texts, or pairs of them, as a model reads them and as people know them."""

    def read(*texts: Any, **options: Any) -> tuple[dict[str, Tensor], Source]:
        encoded = wordpieces(
            *map(list, zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]),
            return_offsets_mapping=True,
            return_tensors="pt",
            padding=True,
            **options,
        )
        offsets = encoded.pop("offset_mapping")
        source = Source(
            texts=texts,
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            offsets=offsets,
            word_ids=[encoded.word_ids(row) for row in range(len(texts))],
            sequence_ids=[encoded.sequence_ids(row) for row in range(len(texts))],
            tokenizer=wordpieces,
        )
        return dict(encoded), source

    return read


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Makes a random static model, and a flexible one with its backbone and its head, ``h``."""

    def make(static_class: str, **changes: Any) -> tuple[Any, Any]:
        static = init(tiny_static(static_class, **changes))
        model = tiny_model(registry().conversion(static_class).architecture, **changes)
        backbone, own = model._attachment.backbone, static._attachment.backbone.state_dict()
        kept = {name: own[name] for name in backbone.state_dict() if name in own}
        backbone.load_state_dict(kept, strict=False)
        static.save_head(tmp_path / "static")
        model.load_head(tmp_path / "static", load_as="h")
        return static, model

    return make


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled before, and nothing that is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter() -> Any:
    """A backend that runs graphs as they are, and counts them."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow, and seldom needed

    return CompileCounterWithBackend("eager")


@pytest.fixture(scope="session")
def in_threads() -> Callable[..., list[Any]]:
    """Gives what something gives in each of many threads, which all start at once."""

    def run(work: Callable[[int], Any], threads: int) -> list[Any]:
        barrier = threading.Barrier(threads)

        def start(number: int) -> Any:
            barrier.wait()
            return work(number)

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(start, range(threads)))

    return run
