"""Heads of one's own: built ones, registered types, and classes as the `adapters` library has."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from flexheads import BatchSplit
from flexheads.checkpoints.store import read_tensors
from flexheads.errors import ConfigError, UnknownNameError
from flexheads.heads import (
    CustomHead,
    LabelledConfig,
    PooledConfig,
    PooledHead,
    custom,
    head_output,
    register_custom_head,
)
from flexheads.heads.classification import ClassificationHead
from flexheads.testing import randomise, tiny_inputs, tiny_model

NAMES = {0: "no", 1: "maybe", 2: "yes"}
ROWS = 4


class Scaled(CustomHead):
    """As a user of the `adapters` library writes it."""

    def __init__(
        self,
        model: Any,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "relu",
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": "scaled",
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
            "label2id": {n: i for i, n in id2label.items()} if id2label else None,
            "use_pooler": use_pooler,
        }
        self.scale = scale
        self.build(model)

    def forward(  # type: ignore[override]
        self,
        outputs: Any,
        cls_output: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        if cls_output is None:
            cls_output = self._get_cls_output(outputs, **kwargs)
        logits = super().forward(cls_output) * self.scale
        labels = kwargs.pop("labels", None)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict:
            return SequenceClassifierOutput(
                loss=loss, logits=logits, hidden_states=outputs.get("hidden_states")
            )
        return (loss, logits)


class Gates(CustomHead):
    """Reads every token and the mask, has labels of other names and modules of its own."""

    def __init__(self, model: Any, head_name: str, **kwargs: Any) -> None:
        super().__init__(head_name)
        self.config = kwargs
        self.gate = nn.Linear(model.config.hidden_size, kwargs["size"])

    def get_label_names(self) -> list[str]:
        return ["open_gates", "weights"]

    def forward(  # type: ignore[override]
        self,
        outputs: Any,
        cls_output: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        open_gates: Tensor | None = None,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        assert attention_mask is not None
        logits = self.gate(outputs[0]) * attention_mask.unsqueeze(-1)
        loss = None if open_gates is None else (weights * (logits - open_gates) ** 2).mean()
        return TokenClassifierOutput(loss=loss, logits=logits)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DoubtConfig(LabelledConfig, PooledConfig):
    doubt: float = 0.0


class DoubtHead(PooledHead):
    """A subclass of the library's own base class."""

    config_class: ClassVar[type[DoubtConfig]] = DoubtConfig

    def finish(self, scores: Tensor, features: Any, **labels: Any) -> Any:
        logits = scores - self.config.doubt
        return head_output(SequenceClassifierOutput, features.output, loss=None, logits=logits)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(custom._CUSTOM)
    register_custom_head("scaled", Scaled)
    register_custom_head("gates", Gates)
    register_custom_head("doubt", DoubtHead)
    yield
    custom._CUSTOM.clear()
    custom._CUSTOM.update(before)


@pytest.fixture
def model() -> Any:
    return randomise(tiny_model("bert"), std=0.2)


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    return tiny_inputs(model.config, batch=ROWS)


def expected_scores(head: CustomHead, vector: Tensor) -> Tensor:
    """Two layers of `Scaled`, numbered as in the other library."""
    one, two = head[1], head[4]
    assert isinstance(one, nn.Linear)
    assert isinstance(two, nn.Linear)
    between = nn.functional.linear(vector, one.weight, one.bias).relu()
    return nn.functional.linear(between, two.weight, two.bias) * head.scale


# --- a class that is written for the other library ---------------------------------------------


def test_it_runs_as_it_is_written(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_custom_head("scaled", "mine", id2label=NAMES, num_labels=3, scale=2.0)
    assert model.active_head == "mine"
    assert type(model.heads["mine"]) is Scaled
    assert model.get_labels() == list(NAMES.values())
    assert model.config.id2label == NAMES
    randomise(model.heads["mine"])
    hidden, labels = model.bert(**inputs).last_hidden_state, torch.tensor([0, 2, 1, 1])
    output = model(**inputs, labels=labels, output_hidden_states=True)
    expected = expected_scores(model.heads["mine"], hidden[:, 0])
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(expected, labels))
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    output.loss.backward()
    assert model.heads["mine"][1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_it_gets_what_stands_for_the_sequence(architecture: str) -> None:
    model = randomise(tiny_model(architecture), std=0.2)
    given = tiny_inputs(model.config, batch=ROWS)
    model.add_custom_head("scaled", "mine")
    model.add_classification_head("ours")
    for one, other in ((1, "0"), (4, "1")):
        layer = model.heads["ours"].layers.get_submodule(other)
        model.heads["mine"][one].load_state_dict(layer.state_dict())
    model.heads["ours"].layers.activation = nn.ReLU()
    both = model(**given, head=["mine", "ours"])
    torch.testing.assert_close(both["mine"].logits, both["ours"].logits)


def test_it_gets_the_pooler_where_it_says_so(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_custom_head("scaled", "mine", use_pooler=True)
    pooled = model.bert(**inputs).pooler_output
    expected = expected_scores(model.heads["mine"], pooled)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_it_reads_the_layer_that_its_configuration_names(
    model: Any, inputs: dict[str, Tensor]
) -> None:
    model.add_custom_head("gates", "g", size=2, hidden_layer=1)
    hidden = model.bert(**inputs, output_hidden_states=True).hidden_states[1]
    expected = model.heads["g"].gate(hidden) * inputs["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_it_names_its_labels(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_custom_head("gates", "g", size=2)
    gates, weights = torch.rand(ROWS, 7, 2), torch.rand(ROWS, 1, 1)
    output = model(**inputs, open_gates=gates, weights=weights)
    torch.testing.assert_close(output.loss, (weights * (output.logits - gates) ** 2).mean())


def test_rows_of_a_batch(model: Any, inputs: dict[str, Tensor]) -> None:
    """Every head gets the rows of its adapter, with their mask."""
    for name in "ab":
        model.add_adapter(name, "seq_bn")
        randomise(model.adapters[name], seed=ord(name))
        model.add_custom_head("gates", name, size=3)
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 3]))
    output = model(**inputs)
    for name, rows in (("a", slice(0, 1)), ("b", slice(1, 4))):
        own = {key: tensor[rows] for key, tensor in inputs.items()}
        alone = model(**own, adapter_names=name, head=name).logits
        torch.testing.assert_close(output[name].logits, alone)


def test_copies_compiled_and_averaged(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_custom_head("scaled", "mine", scale=3.0)
    logits = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, logits)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, logits)
    model.add_custom_head("scaled", "other", scale=3.0)
    model.average_head("mean", ["mine", "other"])
    weight = (model.heads["mine"][1].weight + model.heads["other"][1].weight) / 2
    torch.testing.assert_close(model.heads["mean"][1].weight, weight)
    assert model(**inputs, return_dict=False, head="mine")[0].equal(logits)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_type", "arguments"),
    [
        ("scaled", {"num_labels": 3, "id2label": NAMES, "scale": 0.5}),
        ("scaled", {"layers": 1, "activation_function": None}),
        ("gates", {"size": 5}),
        ("doubt", {"num_labels": 3, "doubt": 0.25, "layers": 2}),
    ],
)
def test_saved_and_loaded(
    model: Any,
    inputs: dict[str, Tensor],
    tmp_path: Path,
    head_type: str,
    arguments: dict[str, Any],
) -> None:
    model.add_custom_head(head_type, "mine", **arguments)
    randomise(model.heads["mine"])
    logits = model(**inputs).logits
    model.save_head(tmp_path / "head", "mine")
    model.load_head(tmp_path / "head", load_as="again")
    assert model.heads["again"].to_dict() == model.heads["mine"].to_dict()
    assert model.heads["again"].head_type == head_type
    assert torch.equal(model(**inputs, head="again").logits, logits)
    model.save_pretrained(tmp_path / "whole")
    same = type(model).from_pretrained(tmp_path / "whole")
    assert type(same.heads["mine"]) is type(model.heads["mine"])
    assert torch.equal(same(**inputs).logits, logits)
    model.add_adapter("mine")
    model.save_adapter(tmp_path / "both", "mine")
    same.delete_head("mine")
    same.load_adapter(str(tmp_path / "both"), set_active=True)
    assert torch.equal(same(**inputs).logits, model(**inputs, adapter_names="mine").logits)


@pytest.mark.parametrize(
    ("head_type", "keys"),
    [
        ("scaled", {"1", "4"}),  # as the module is numbered
        ("doubt", {"1", "4"}),  # as a package's head of two layers is written
        ("gates", {"gate"}),
    ],
)
def test_keys_in_files(model: Any, tmp_path: Path, head_type: str, keys: set[str]) -> None:
    arguments = {"size": 2} if head_type == "gates" else {"num_labels": 2, "layers": 2}
    model.add_custom_head(head_type, "mine", **arguments)
    model.save_head(tmp_path, "mine")
    expected = {f"heads.mine.{key}.{kind}" for key in keys for kind in ("weight", "bias")}
    assert set(read_tensors(tmp_path / "model_head.safetensors")) == expected


def test_other_names_of_labels_on_loading(model: Any, tmp_path: Path) -> None:
    model.add_custom_head("scaled", "mine", num_labels=3, id2label=NAMES)
    model.save_head(tmp_path, "mine")
    model.load_head(tmp_path, load_as="again", id2label={0: "x", 1: "y", 2: "z"})
    assert model.get_labels("again") == ["x", "y", "z"]


def test_a_file_of_a_type_that_is_not_registered(model: Any, tmp_path: Path, snapshot: Any) -> None:
    model.add_custom_head("scaled", "mine")
    model.save_head(tmp_path / "head", "mine")
    model.save_pretrained(tmp_path / "whole")
    del custom._CUSTOM["scaled"]
    before = snapshot(model)
    for load in (
        lambda: model.load_head(tmp_path / "head", load_as="again"),
        lambda: type(model).from_pretrained(tmp_path / "whole"),
        lambda: model.add_custom_head("scaled", "other"),
        lambda: model.add_head("other", "scaled"),
    ):
        with pytest.raises(UnknownNameError, match=r"'scaled'.*register_custom_head"):
            load()
    assert snapshot(model) == before


DEFINED = """
import torch
from flexheads.heads import CustomHead as PredictionHead, register_custom_head

class Last(PredictionHead):
    def __init__(self, model, head_name, size=1):
        super().__init__(head_name)
        self.out = torch.nn.Linear(model.config.hidden_size, size)
    def forward(self, outputs, cls_output=None, attention_mask=None, return_dict=False, **kwargs):
        return {"logits": self.out(outputs[0][:, -1])}

register_custom_head("last", Last)
"""


def test_arguments_are_saved_though_the_configuration_says_nothing(
    model: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """The class is defined and registered anew, as in the process that loads."""
    exec(DEFINED, {"__name__": "one"})
    model.add_custom_head("last", "mine", size=3)
    model.save_pretrained(tmp_path)
    first = custom.class_of("last")
    custom._CUSTOM.clear()
    exec(DEFINED, {"__name__": "other"})
    same = type(model).from_pretrained(tmp_path)
    assert type(same.heads["mine"]) is custom.class_of("last") is not first
    logits = same(**inputs)["logits"]
    assert logits.shape == (ROWS, 3)
    torch.testing.assert_close(logits, model(**inputs)["logits"])


# --- built heads ------------------------------------------------------------------------------


def test_built_heads_are_added(model: Any, inputs: dict[str, Tensor]) -> None:
    model.add_prediction_head(Scaled(model, "mine", 3, scale=4.0))
    assert model.active_head == "mine"
    assert model.get_labels() == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert model.heads["mine"].to_dict()["scale"] == 4.0
    config = ClassificationHead.config_class(num_labels=2)
    model.add_prediction_head(ClassificationHead("ours", config, model.config), set_active=False)
    assert model.active_head == "mine"
    assert model(**inputs, head="ours").logits.shape == (ROWS, 2)
    model.add_prediction_head(
        DoubtHead("doubt", DoubtConfig(num_labels=2, doubt=1.0), model.config)
    )
    assert model.heads["doubt"].to_dict()["head_type"] == "doubt"


def test_a_built_head_gets_device_dtype_and_mode_of_the_model(model: Any) -> None:
    model = model.double().train()
    head = Scaled(tiny_model("bert"), "mine")
    model.add_prediction_head(head)
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert head.training


def test_a_class_that_was_not_registered_is(model: Any, tmp_path: Path) -> None:
    custom._CUSTOM.clear()
    model.add_prediction_head(Gates(model, "g", size=2))
    assert model.heads["g"].head_type == "Gates"
    model.add_prediction_head(Scaled(model, "s"))
    assert model.heads["s"].head_type == "scaled", "as its configuration says"
    model.save_head(tmp_path, "s")
    model.load_head(tmp_path, load_as="again")
    assert type(model.heads["again"]) is Scaled


class Unsaved(CustomHead):
    def __init__(self, model: Any, head_name: str, kind: Any) -> None:
        super().__init__(head_name)
        self.kind = kind


class Renamed(ClassificationHead):
    """Inherits the name of its type, which builds another class."""


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda m: nn.Linear(2, 2), "Linear is no subclass"),
        (
            lambda m: Renamed("x", Renamed.config_class(num_labels=2), m.config),
            "'classification' does not build",
        ),
        (
            lambda m: ClassificationHead(
                "x",
                ClassificationHead.config_class(num_labels=2),
                tiny_model("bert", hidden_size=16).config,
            ),
            "hidden size 16, but this model has 32",
        ),
        (lambda m: Scaled(m, "taken"), "taken"),
        (lambda m: Unsaved(m, "x", nn.ReLU), "could not be saved"),
    ],
)
def test_built_heads_that_are_refused(model: Any, head: Any, words: str, snapshot: Any) -> None:
    model.add_classification_head("taken")
    built = head(model)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=words):
        model.add_prediction_head(built)
    assert snapshot(model) == before


def test_what_cannot_be_saved_is_refused(model: Any) -> None:
    register_custom_head("unsaved", Unsaved)
    with pytest.raises(ConfigError, match=r"kind=.*is no plain value"):
        model.add_custom_head("unsaved", "x", kind=nn.ReLU)
    with pytest.raises(ConfigError, match="takes no 'sort'; it takes kind"):
        model.add_custom_head("unsaved", "x", sort=1)
    assert "x" not in model.heads


# --- registering, and configurations ----------------------------------------------------------


def test_types_that_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match=r"comes from .*flexheads"):
        register_custom_head("tagging", Scaled)
    with pytest.raises(ConfigError, match="no subclass"):
        register_custom_head("linear", nn.Linear)
    with pytest.raises(ConfigError, match="not empty"):
        register_custom_head("", Scaled)
    register_custom_head("classification", ClassificationHead)  # what it is anyway
    assert "classification" not in custom.custom_head_types()


def test_a_later_class_takes_the_place(model: Any) -> None:
    class Better(Scaled):
        pass

    model.register_custom_head("scaled", Better)
    model.add_custom_head("scaled", "mine")
    assert type(model.heads["mine"]) is Better


def test_configurations_make_heads(model: Any) -> None:
    model.add_custom_head("scaled", "mine", num_labels=3, scale=2.0, id2label=NAMES)
    model.add_custom_head("doubt", "doubt", num_labels=2, doubt=0.5)
    model.add_tagging_head("ner", id2label={0: "O", 1: "B-X"}, layers=2)
    found = json.loads(json.dumps(model.get_prediction_heads_config()))
    assert list(found) == ["mine", "doubt", "ner"]
    fresh = tiny_model("bert")
    for name, config in found.items():
        kept = dict(config)
        fresh.add_prediction_head_from_config(name, config, set_active=name == "doubt")
        assert config == kept, "the caller's configuration is left alone"
    assert fresh.get_prediction_heads_config() == found
    assert fresh.active_head == "doubt"
    with pytest.raises(ConfigError, match="no head_type"):
        fresh.add_prediction_head_from_config("x", {"num_labels": 2})
    with pytest.raises(ConfigError, match="ner"):
        fresh.add_prediction_head_from_config("ner", found["ner"])
