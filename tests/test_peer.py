"""The same weights in the `adapters` library and in ours: the same outputs, gradients and files.

Both libraries run in one process, in double precision where numbers are compared, so that what is
left between them is no rounding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

adapters = pytest.importorskip("adapters", exc_type=ImportError)

import torch  # noqa: E402
import transformers  # noqa: E402
from adapters import AdapterConfig as PeerConfig  # noqa: E402
from adapters import BertAdapterModel  # noqa: E402
from torch import Tensor  # noqa: E402

import flexheads  # noqa: E402
from flexheads import BertModelWithHeads, load_config  # noqa: E402
from flexheads.checkpoints import hub_names  # noqa: E402
from flexheads.testing import randomise, tiny_config, tiny_inputs  # noqa: E402

pytestmark = pytest.mark.peer

ATOL = 1e-5
NAME = "an_adapter"
SEED = 3

# --- models, weights and names ----------------------------------------------------------------


def config(**changes: Any) -> Any:
    """A tiny BERT without dropout; each model gets its own, because the libraries write into it."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_config("bert", attn_implementation="eager", **no_dropout, **changes)


@functools.cache
def backbone_state() -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    return randomise(transformers.BertModel(config()), std=0.2).state_dict()


def our_model(kind: type[Any] = BertModelWithHeads, **changes: Any) -> Any:
    return with_backbone(flexheads.init(kind(config(**changes))))


def peer_model(kind: type[Any] = BertAdapterModel, **changes: Any) -> Any:
    model = kind(config(**changes))
    adapters.init(model)
    return with_backbone(model)


def with_backbone(model: Any) -> Any:
    """The model with the weights that all models here share, in eval mode."""
    given = backbone_state()
    own = [key for key, _ in model.base_model.named_parameters() if key in given]
    assert len(own) > 30
    model.base_model.load_state_dict({key: given[key] for key in own}, strict=False)
    return model.eval()


def peer_keys(model: Any, name: str) -> dict[str, list[str]]:
    """For each parameter of an adapter of ours, by logical address, its names in the peer."""
    adapter, layout = model.adapters[name], model._layout()
    fields = adapter.config.to_dict()
    return {
        address: hub_names.adapter_keys(address, name, fields, layout)
        for address in adapter.state_dict()
    }


def copy_adapter(ours: Any, theirs: Any, name: str = NAME) -> None:
    """Gives the peer's adapter our weights; it must have exactly the parameters that ours has."""
    tensors = ours.adapters[name].state_dict()
    named = {k: tensors[address] for address, keys in peer_keys(ours, name).items() for k in keys}
    assert {key for key in theirs.state_dict() if f".{name}." in key} == set(named)
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys


def copy_head(ours: Any, theirs: Any, name: str) -> dict[str, str]:
    """Gives the peer's head our weights; returns the peer's name of each of our parameters."""
    head = ours.heads[name]
    names = hub_names.HeadNames(head.to_dict())
    keys = {address: names.key(address, name) for address in head.state_dict()}
    named = {keys[address]: tensor for address, tensor in head.state_dict().items()}
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys
    return keys


def adapted(fields: Any, theirs: Any = None, ours: Any = None, **changes: Any) -> tuple[Any, Any]:
    """Our model and the peer's with one active adapter of the same weights, in double precision."""
    ours = our_model() if ours is None else ours
    theirs = peer_model() if theirs is None else theirs
    ours.add_adapter(NAME, load_config(fields, **changes), set_active=True)
    theirs.add_adapter(NAME, config=PeerConfig.load(fields, **changes), set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    copy_adapter(ours, theirs)
    return ours.double(), theirs.double()


def inputs() -> dict[str, Tensor]:
    return tiny_inputs(config())


# --- comparing --------------------------------------------------------------------------------


@torch.no_grad()
def call(model: Any, given: Mapping[str, Any] | None = None) -> Any:
    # The peer clamps the positions of question answering in place.
    return model.eval()(**{key: tensor.clone() for key, tensor in (given or inputs()).items()})


def tensors_of(output: Any) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        ours,
        theirs.to(ours.dtype),  # the peer computes some losses in single precision
        atol=ATOL,
        rtol=0,
        msg=lambda text: f"{what}: {text}",
    )


def assert_same_outputs(ours: Any, theirs: Any, given: Mapping[str, Any] | None = None) -> None:
    """Every tensor of the outputs is the same, the loss included."""
    one, other = tensors_of(call(ours, given)), tensors_of(call(theirs, given))
    assert one.keys() == other.keys()
    for key, tensor in other.items():
        assert tensor.isfinite().all()
        assert_close(one[key], tensor, key)


def gradients(model: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradient of every parameter, in training mode, of a sum over the outputs and the loss."""
    model.train().requires_grad_(True)
    model.zero_grad()
    weighted(model(**{key: tensor.clone() for key, tensor in given.items()})).backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {key: p.grad for key, p in named.items() if p.grad is not None}
    model.eval()
    return found


def weighted(output: Any) -> Tensor:
    """A sum over all outputs in which every entry counts differently."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_of(output).values():
        total = total + (tensor * torch.linspace(-1, 2, tensor.numel()).view_as(tensor)).sum()
    return total


def assert_same_gradients(
    ours: Any, theirs: Any, keys: Mapping[str, list[str]], given: Mapping[str, Any] | None = None
) -> None:
    """The gradients of the parameters that `keys` names, and of the input embeddings.

    Args:
        ours, theirs: The models.
        keys: The name of a parameter in our model to its names in the peer.
        given: The inputs.
    """
    given = inputs() if given is None else given
    one, other = gradients(ours, given), gradients(theirs, given)
    embeddings = "bert.embeddings.word_embeddings.weight"
    for own, names in {**keys, embeddings: [embeddings]}.items():
        assert one[own].abs().max() > 0, f"{own} has no part in the output"
        assert_close(one[own], other[names[0]], own)


def adapter_keys(ours: Any, name: str = NAME) -> dict[str, list[str]]:
    prefix = f"adapters.{ours.adapters.key(name)}."
    return {f"{prefix}{address}": keys for address, keys in peer_keys(ours, name).items()}


def check_adapter(fields: Any, **changes: Any) -> None:
    """Outputs in eval mode and gradients in training mode are the same."""
    ours, theirs = adapted(fields, **changes)
    bare = call(our_model().double())["last_hidden_state"]
    assert (call(ours)["last_hidden_state"] - bare).abs().max() > 1e-2
    assert_same_outputs(ours, theirs)
    assert_same_gradients(ours, theirs, adapter_keys(ours))


# --- bottleneck adapters ----------------------------------------------------------------------

# Stochastic depth needs torchvision in the peer, and acts in training only.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("seq_bn", {}),
    "double_seq_bn": ("double_seq_bn", {}),
    "par_bn": ("par_bn", {}),
    "scaled_par_bn": ("scaled_par_bn", {}),
    "seq_bn_inv": ("seq_bn_inv", {}),
    "double_seq_bn_inv": ("double_seq_bn_inv", {}),
    "adapter_plus": ("adapter_plus", {"stochastic_depth": 0.0}),
}


def both(name: str) -> tuple[Any, Any]:
    """Our configuration of a class and the peer's; the peer has no identifier for one of them."""
    identifier, changes = CLASSES[name]
    theirs: Any = adapters.AdapterPlusConfig() if name == "adapter_plus" else identifier
    return load_config(identifier, **changes), PeerConfig.load(theirs, **changes)


@pytest.mark.parametrize("name", CLASSES)
def test_configuration_classes(name: str) -> None:
    fields, theirs = both(name)
    assert fields.to_dict() == theirs.to_dict()
    check_adapter(theirs.to_dict())


def orders() -> Iterator[dict[str, Any]]:
    """Every legal combination of the fields that order norms and residuals."""
    flags = (
        "is_parallel",
        "original_ln_before",
        "original_ln_after",
        "ln_before",
        "ln_after",
        "adapter_residual_before_ln",
    )
    for values in itertools.product((False, True), repeat=len(flags)):
        fields = dict(zip(flags, values, strict=True))
        for skip in (True, False, "post_add"):
            if skip == "post_add" and not (fields["original_ln_before"] or fields["is_parallel"]):
                continue  # the peer has no residual there and fails
            yield {**fields, "residual_before_ln": skip}


def ident(fields: Mapping[str, Any]) -> str:
    return "-".join(
        f"{key}={value}" if not isinstance(value, bool) else key
        for key, value in fields.items()
        if value is not False
    )


@pytest.mark.parametrize("fields", list(orders()), ids=ident)
def test_order_of_norms_and_residuals(fields: dict[str, Any]) -> None:
    common = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4}
    check_adapter({**common, "non_linearity": "gelu", **fields})


@pytest.mark.parametrize("base", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize("scaling", [1.0, 0.3, "learned", "channel"])
@pytest.mark.parametrize("use_gating", [False, True])
def test_scaling_and_gating(base: str, scaling: Any, use_gating: bool) -> None:
    check_adapter(base, scaling=scaling, use_gating=use_gating)


OTHER_FIELDS: list[dict[str, Any]] = [
    {"reduction_factor": 1},
    {"reduction_factor": 0.5},
    {"reduction_factor": 3},
    {"reduction_factor": 1000},
    {"reduction_factor": {"0": 2, "default": 8}},
    {"reduction_factor": {"0": 2, "1": 4}},
    {"reduction_factor": {"default": 5.5}},
    {"leave_out": [0]},
    {"leave_out": [1], "reduction_factor": {"0": 4}},
    {"mh_adapter": True, "output_adapter": False},
    {"mh_adapter": True},
    {"cross_adapter": True},
    {"inv_adapter": "nice", "inv_adapter_reduction_factor": 1},
    {"inv_adapter": "nice", "inv_adapter_reduction_factor": 4, "non_linearity": "tanh"},
    {"leave_out": [0, 1], "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
]


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=ident)
def test_other_fields(fields: dict[str, Any]) -> None:
    check_adapter("seq_bn", **fields)


@pytest.mark.parametrize(
    "word", ["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu", "ReLU", "silu", "mish"]
)
def test_non_linearities(word: str) -> None:
    check_adapter("seq_bn", non_linearity=word)


# --- low-rank adaptation ----------------------------------------------------------------------

LORA: list[dict[str, Any]] = [
    *({"attn_matrices": list(m)} for n in (1, 2, 3) for m in itertools.combinations("qkv", n)),
    {"intermediate_lora": True},
    {"output_lora": True},
    {"selfattn_lora": False, "intermediate_lora": True, "output_lora": True},
    {"intermediate_lora": True, "output_lora": True, "leave_out": [0]},
    {"r": 1},
    {"r": 3, "alpha": 16},
    {"alpha": 1},
    {"use_gating": True},
    {"use_gating": True, "intermediate_lora": True, "output_lora": True, "alpha": 2},
    {"init_weights": "bert"},
    {"init_weights": "ia3", "r": 2},
]


@pytest.mark.parametrize("fields", LORA, ids=ident)
def test_lora(fields: dict[str, Any]) -> None:
    check_adapter("lora", **fields)


IA3: list[dict[str, Any]] = [
    {},
    {"alpha": 3},
    {"attn_matrices": ["q"], "intermediate_lora": False},
    {"output_lora": True},
    {"use_gating": True},
    {"leave_out": [1]},
]


@pytest.mark.parametrize("changes", IA3, ids=ident)
def test_ia3(changes: dict[str, Any]) -> None:
    check_adapter(PeerConfig.load("ia3", **changes).to_dict())


@pytest.mark.parametrize("fields", [{}, {"r": 2, "alpha": 7, "intermediate_lora": True}], ids=ident)
def test_a_merged_lora(fields: dict[str, Any]) -> None:
    ours, theirs = adapted("lora", **fields)
    for model in (ours, theirs):
        model.merge_adapter(NAME)  # which stays active, in the peer too, and acts only once
    assert_same_outputs(ours, theirs)


# --- compositions -----------------------------------------------------------------------------

BLOCKS: dict[str, tuple[str, Any, Any]] = {
    "stack": ("seq_bn", flexheads.Stack("a", "b"), adapters.Stack("a", "b")),
    "stack_double": ("double_seq_bn", flexheads.Stack("a", "b"), adapters.Stack("a", "b")),
    "parallel": ("seq_bn", flexheads.Parallel("a", "b"), adapters.Parallel("a", "b")),
    "batch_split": (
        "double_seq_bn",
        flexheads.BatchSplit("a", "b", batch_sizes=[2, 1]),
        adapters.BatchSplit("a", "b", batch_sizes=[2, 1]),
    ),
    "batch_split_lora": (
        "lora",
        flexheads.BatchSplit("a", "b", batch_sizes=[1, 2]),
        adapters.BatchSplit("a", "b", batch_sizes=[1, 2]),
    ),
    "stack_parallel": (
        "seq_bn",
        flexheads.Stack("c", flexheads.Parallel("a", "b")),
        adapters.Stack("c", adapters.Parallel("a", "b")),
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_compositions(block: str) -> None:
    fields, our_setup, peer_setup = BLOCKS[block]
    ours, theirs, keys = our_model(), peer_model(), {}
    for seed, name in enumerate(our_setup.names()):
        ours.add_adapter(name, fields)
        theirs.add_adapter(name, config=fields)
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
        keys |= adapter_keys(ours, name)
    ours.double().set_active_adapters(our_setup)
    theirs.double().set_active_adapters(peer_setup)
    assert_same_outputs(ours, theirs)
    assert_same_gradients(ours, theirs, keys)


# --- heads ------------------------------------------------------------------------------------


def labels(*shape: int, below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(SEED))


def choice_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 99, (2, 3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def token_labels(below: int) -> Tensor:
    """With one position that does not count, and labels where the input is padding."""
    given = labels(3, 7, below=below)
    given[0, 1] = -100
    return given


def lm_labels() -> Tensor:
    """Padding does not count, because the peer counts whatever label it is given there."""
    return token_labels(99).masked_fill(inputs()["attention_mask"] == 0, -100)


IDS = {0: "negative", 1: "neutral", 2: "positive"}
ONE_OF_3 = {"labels": labels(3, below=3)}
ANSWERS = {
    "start_positions": torch.tensor([0, 3, 400]),
    "end_positions": torch.tensor([2, 6, 400]),
}
# The method that adds the head, its arguments, and the labels.
HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "classification": ("classification", {"num_labels": 3}, ONE_OF_3),
    "classification_1": ("classification", {"num_labels": 3, "layers": 1}, ONE_OF_3),
    "classification_3": (
        "classification",
        {"num_labels": 3, "layers": 3, "activation_function": "relu", "id2label": IDS},
        ONE_OF_3,
    ),
    "classification_linear": (
        "classification",
        {"num_labels": 3, "activation_function": None},
        ONE_OF_3,
    ),
    "classification_pooler": ("classification", {"num_labels": 3, "use_pooler": True}, ONE_OF_3),
    "regression": ("classification", {"num_labels": 1}, {"labels": torch.rand(3).double()}),
    "multilabel": (
        "classification",
        {"num_labels": 4, "multilabel": True},
        {"labels": labels(3, 4, below=2)},
    ),
    "multiple_choice": ("multiple_choice", {"num_choices": 3}, {"labels": labels(2, below=3)}),
    "multiple_choice_pooler": (
        "multiple_choice",
        {"num_choices": 3, "layers": 1, "use_pooler": True},
        {"labels": labels(2, below=3)},
    ),
    "tagging": ("tagging", {"num_labels": 5}, {"labels": token_labels(5)}),
    "tagging_2": (
        "tagging",
        {"num_labels": 3, "layers": 2, "id2label": IDS, "activation_function": "gelu"},
        {"labels": token_labels(3)},
    ),
    "question_answering": ("qa", {}, ANSWERS),
    "question_answering_2": ("qa", {"layers": 2}, ANSWERS),
    "masked_lm": ("masked_lm", {}, {"labels": lm_labels()}),
    "masked_lm_1": ("masked_lm", {"layers": 1}, {"labels": lm_labels()}),
    "masked_lm_3": (
        "masked_lm",
        {"layers": 3, "activation_function": "relu"},
        {"labels": lm_labels()},
    ),
    "causal_lm": ("causal_lm", {}, {"labels": lm_labels()}),
    "causal_lm_1": ("causal_lm", {"layers": 1}, {"labels": lm_labels()}),
}


def head_inputs(kind: str) -> dict[str, Tensor]:
    method, _, own = HEADS[kind]
    return {**(choice_inputs() if method == "multiple_choice" else inputs()), **own}


def add_head(model: Any, kind: str, name: str = NAME) -> None:
    method, arguments, _ = HEADS[kind]
    getattr(model, f"add_{method}_head")(name, **arguments)


@pytest.mark.parametrize("adapter", [None, "seq_bn", "seq_bn_inv"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind: str, adapter: str | None) -> None:
    ours, theirs = our_model(), peer_model()
    if adapter is not None:
        ours, theirs = adapted(adapter, theirs, ours)
    for model in (ours, theirs):
        add_head(model, kind)
    randomise(ours.heads[NAME], seed=SEED)
    keys = copy_head(ours, theirs, NAME)
    ours, theirs, given = ours.double(), theirs.double(), head_inputs(kind)
    assert call(ours, given)["loss"] is not None
    assert_same_outputs(ours, theirs, given)
    parameters = {f"heads.{NAME}.{address}": [key] for address, key in keys.items()}
    if adapter is not None:
        parameters |= adapter_keys(ours)
    assert_same_gradients(ours, theirs, parameters, given)


# --- files ------------------------------------------------------------------------------------

FILES: dict[str, dict[str, Any]] = {
    **{name: both(name)[1].to_dict() for name in CLASSES},
    "norms": PeerConfig.load("seq_bn", ln_before=True, ln_after=True, use_gating=True).to_dict(),
    "map": PeerConfig.load("seq_bn", reduction_factor={"0": 2, "default": 8}).to_dict(),
    "leave_out": PeerConfig.load("double_seq_bn", leave_out=[1]).to_dict(),
    "lora": PeerConfig.load("lora", alpha=3).to_dict(),
    "lora_all": PeerConfig.load(
        "lora", attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ).to_dict(),
    "lora_gated": PeerConfig.load("lora", use_gating=True).to_dict(),
    "ia3": PeerConfig.load("ia3").to_dict(),
    "ia3_gated": PeerConfig.load("ia3", use_gating=True).to_dict(),
}


def randomised_peer_adapter(model: Any, fields: Mapping[str, Any], name: str = NAME) -> None:
    model.add_adapter(name, config=PeerConfig.load(dict(fields)), set_active=True)
    randomise_named(model, f".{name}.")


@torch.no_grad()
def randomise_named(model: Any, word: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for key, parameter in model.named_parameters():
        if word in key:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def peer_load(model: Any, folder: Path, **how: Any) -> str:
    """Lets the peer load an adapter, and sees that it found every tensor that it looked for."""
    info: dict[str, Any] = {}
    name = model.load_adapter(
        str(folder), use_safetensors=True, set_active=True, loading_info=info, **how
    )
    assert not info["missing_keys"]
    # The peer's own files too name the bias of a static language-model head twice.
    assert set(info["unexpected_keys"]) <= {"cls.predictions.bias"}
    return str(name)


def written(kinds: Iterable[str], shared: Collection[str] = ()) -> list[tuple[str, bool]]:
    """Each kind with both kinds of files; the peer cannot write tensors it shares safely."""
    return [
        (kind, safe) for kind in kinds for safe in (False, True) if not (safe and kind in shared)
    ]


@pytest.mark.parametrize(("kind", "safe"), written(FILES, shared=["norms"]))
def test_we_read_the_adapters_that_the_peer_writes(kind: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = peer_model(), our_model()
    randomised_peer_adapter(theirs, FILES[kind])
    add_head(theirs, "classification")
    randomise_named(theirs, f"heads.{NAME}.")
    theirs.save_adapter(str(tmp_path), NAME, with_head=True, use_safetensors=safe)
    assert ours.load_adapter(tmp_path, set_active=True) == NAME
    assert ours.active_head == NAME
    assert_same_outputs(ours, theirs, head_inputs("classification"))


@pytest.mark.parametrize("load_as", [None, "another"])
@pytest.mark.parametrize("kind", FILES)
def test_the_peer_reads_the_adapters_that_we_write(
    kind: str, load_as: str | None, tmp_path: Path
) -> None:
    ours, theirs = our_model(), peer_model()
    ours.add_adapter(NAME, FILES[kind])
    add_head(ours, "classification")
    randomise(ours.adapters[NAME], seed=SEED)
    randomise(ours.heads[NAME], seed=SEED)
    ours.set_active_adapters(NAME)
    ours.save_adapter(tmp_path, NAME, with_head=True)
    assert peer_load(theirs, tmp_path, load_as=load_as) == (load_as or NAME)
    assert theirs.active_head == (load_as or NAME)
    assert_same_outputs(ours, theirs, head_inputs("classification"))


@pytest.mark.parametrize(("kind", "safe"), written(HEADS))
def test_we_read_the_heads_that_the_peer_writes(kind: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = peer_model(), our_model()
    add_head(theirs, kind)
    randomise_named(theirs, f"heads.{NAME}.")
    given = float_labels(head_inputs(kind))
    if "lm" in kind:
        # The peer's output matrix is the embeddings themselves, which have been drawn anew.
        theirs = with_backbone(theirs)
    theirs.save_head(str(tmp_path), NAME, use_safetensors=safe)
    assert ours.load_head(tmp_path) == NAME
    assert_same_outputs(ours, theirs, given)


def float_labels(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.float() if t.is_floating_point() else t for key, t in given.items()}


@pytest.mark.parametrize("load_as", [None, "another"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_peer_reads_the_heads_that_we_write(
    kind: str, load_as: str | None, tmp_path: Path
) -> None:
    ours, theirs = our_model(), peer_model()
    add_head(ours, kind)
    randomise(ours.heads[NAME], seed=SEED)
    ours.save_head(tmp_path, NAME)
    theirs.load_head(str(tmp_path), load_as=load_as, use_safetensors=True)
    theirs.active_head = load_as or NAME
    assert_same_outputs(ours, theirs, float_labels(head_inputs(kind)))
    saved = theirs.heads[load_as or NAME].config
    own = ours.heads[NAME].to_dict()
    assert {key: own[key] for key in saved if key in own} == {
        key: value for key, value in saved.items() if key in own
    }


def test_a_file_of_the_peer_with_another_head_in_it(tmp_path: Path) -> None:
    """The peer picks the tensors of a head by the beginning of its name."""
    theirs, ours = peer_model(), our_model()
    for name in ("mrpc", "mrpc2"):
        theirs.add_classification_head(name, num_labels=3)
    randomise_named(theirs, "heads.mrpc")
    theirs.save_head(str(tmp_path), "mrpc", use_safetensors=True)
    theirs.active_head = "mrpc"
    assert ours.load_head(tmp_path) == "mrpc"
    assert ours.heads.keys() == ("mrpc",)
    assert_same_outputs(ours, theirs, head_inputs("classification"))


@pytest.mark.parametrize("kind", ["norms", "seq_bn_inv", "lora_all"])
@pytest.mark.parametrize("reader", [transformers.BertModel, None])
def test_adapters_of_the_bare_backbone(kind: str, reader: Any, tmp_path: Path) -> None:
    """Saved from a base model and read into a base model or one with heads, both ways."""
    ours, theirs = our_model(transformers.BertModel), peer_model(transformers.BertModel)
    ours.add_adapter(NAME, FILES[kind])
    randomise(ours.adapters[NAME], seed=SEED)
    ours.set_active_adapters(NAME)
    ours.save_adapter(tmp_path / "ours", NAME)
    target = peer_model(reader or BertAdapterModel)
    peer_load(target, tmp_path / "ours")
    assert_same_outputs(ours, target)
    peer_load(theirs, tmp_path / "ours")
    theirs.save_adapter(str(tmp_path / "theirs"), NAME)
    back = our_model(reader or BertModelWithHeads)
    back.load_adapter(tmp_path / "theirs", set_active=True)
    assert_same_outputs(back, theirs)


# --- static heads -----------------------------------------------------------------------------

STATIC: dict[str, dict[str, Tensor]] = {
    "BertForSequenceClassification": ONE_OF_3,
    "BertForMultipleChoice": {"labels": labels(2, below=3)},
    "BertForTokenClassification": {"labels": token_labels(3)},
    "BertForQuestionAnswering": ANSWERS,
    "BertForMaskedLM": {"labels": lm_labels()},
    "BertLMHeadModel": {"labels": lm_labels()},
    "BertForNextSentencePrediction": {"labels": labels(3, below=2)},
    "BertForPreTraining": {
        "labels": lm_labels(),
        "next_sentence_label": labels(3, below=2),
    },
}
# Classes that the peer turns into flexible heads of its own.
CONVERTED = [name for name in STATIC if name in adapters.head_utils.STATIC_TO_FLEX_HEAD_MAP]


def static_inputs(name: str) -> dict[str, Tensor]:
    given = choice_inputs() if name == "BertForMultipleChoice" else inputs()
    return {**given, **STATIC[name]}


def static_pair(name: str) -> tuple[Any, Any]:
    """A static model with our support and one with the peer's, with different heads."""
    kind = getattr(transformers, name)
    changes = {"is_decoder": True} if name == "BertLMHeadModel" else {}
    number = 2 if name == "BertForQuestionAnswering" else 3
    models = []
    for seed, make in enumerate((our_model, peer_model)):
        model = make(kind, num_labels=number, **changes)
        for part, module in model.named_children():
            if part not in ("bert", "adapters"):
                randomise(module, std=0.2, seed=seed)
        models.append(with_backbone(model))
    return models[0], models[1]


def assert_same_logits(ours: Any, theirs: Any, name: str) -> None:
    """Outputs are the same where both have them; what labels tell is left to the static classes."""
    given = {k: t for k, t in static_inputs(name).items() if k in ("input_ids", "attention_mask")}
    one, other = tensors_of(call(ours, given)), tensors_of(call(theirs, given))
    shared = one.keys() & other.keys()
    assert shared
    for key in shared:
        assert_close(one[key], other[key], key)


@pytest.mark.parametrize("name", STATIC)
def test_the_peer_reads_our_static_heads(name: str, tmp_path: Path) -> None:
    ours, theirs = static_pair(name)
    ours.add_adapter(NAME, "seq_bn")
    randomise(ours.adapters[NAME], seed=SEED)
    ours.set_active_adapters(NAME)
    ours.save_adapter(tmp_path, NAME, with_head=True)
    peer_load(theirs, tmp_path)
    assert_same_outputs(ours, theirs, static_inputs(name))
    if name in CONVERTED:
        flexible = peer_model(**({"is_decoder": True} if name == "BertLMHeadModel" else {}))
        peer_load(flexible, tmp_path)
        assert flexible.active_head == NAME
        assert_same_logits(ours, flexible, name)


SHARED_BIAS = ("BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining")


@pytest.mark.parametrize(("name", "safe"), written(STATIC, shared=SHARED_BIAS))
def test_we_read_the_static_heads_of_the_peer(name: str, safe: bool, tmp_path: Path) -> None:
    ours, theirs = static_pair(name)
    randomised_peer_adapter(theirs, FILES["seq_bn"])
    theirs.save_adapter(str(tmp_path), NAME, with_head=True, use_safetensors=safe)
    ours.load_adapter(tmp_path, set_active=True)
    assert_same_outputs(ours, theirs, static_inputs(name))
    flexible = our_model(**({"is_decoder": True} if name == "BertLMHeadModel" else {}))
    flexible.load_adapter(tmp_path, set_active=True)
    if name == "BertForPreTraining":
        flexible.active_head = NAME
        assert_close(call(flexible)["logits"], call(theirs)["prediction_logits"])
        flexible.active_head = f"{NAME}_next_sentence"
        assert_close(call(flexible)["logits"], call(theirs)["seq_relationship_logits"])
    else:
        assert flexible.active_head == NAME
        assert_same_logits(flexible, theirs, name)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_head_goes_on_to_the_peer(name: str, tmp_path: Path) -> None:
    """A static head that became flexible here is a flexible head for the peer."""
    static, _ = static_pair(name)
    ours, theirs = our_model(), peer_model()
    static.save_head(tmp_path / "static")
    ours.load_head(tmp_path / "static", load_as=NAME)
    ours.save_head(tmp_path / "flexible", NAME)
    theirs.load_head(str(tmp_path / "flexible"), use_safetensors=True)
    if name == "BertForMultipleChoice":
        given = {key: tensor[:, :2] for key, tensor in choice_inputs().items()}
    else:
        given = inputs()
    assert_same_outputs(ours, theirs, given)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_head_that_the_peer_converted_becomes_static_again(name: str, tmp_path: Path) -> None:
    ours, static = static_pair(name)
    flexible = peer_model()
    static.save_head(str(tmp_path / "static"))
    flexible.load_head(str(tmp_path / "static"), load_as=NAME)
    flexible.save_head(str(tmp_path / "flexible"), NAME)
    ours.load_head(tmp_path / "flexible")
    assert_same_outputs(ours, static, static_inputs(name))


# --- configuration strings --------------------------------------------------------------------

STRINGS = [
    "seq_bn",
    "pfeiffer",
    "double_seq_bn",
    "houlsby",
    "par_bn",
    "parallel",
    "scaled_par_bn",
    "scaled_parallel",
    "seq_bn_inv",
    "pfeiffer+inv",
    "double_seq_bn_inv",
    "houlsby+inv",
    "lora",
    "seq_bn[reduction_factor=12]",
    "seq_bn[reduction_factor=12, non_linearity='gelu']",
    'seq_bn[reduction_factor=2.5,non_linearity="gelu",leave_out=[0, 1]]',
    "double_seq_bn[reduction_factor={'0': 2, 'default': 8}, scaling='channel']",
    "par_bn[scaling=2.0, residual_before_ln=False, inv_adapter=None]",
    "seq_bn[residual_before_ln='post_add', ln_after=True]",
    "lora[r=4, alpha=16, attn_matrices=['q', 'k', 'v'], use_gating=True]",
    "lora[intermediate_lora=True,output_lora=True,leave_out=[1]]",
    "seq_bn[]",
]


@pytest.mark.parametrize("text", STRINGS)
def test_configuration_strings(text: str) -> None:
    ours, theirs = load_config(text).to_dict(), PeerConfig.load(text).to_dict()
    if ours.get("architecture") == "lora":
        assert ours.pop("rank_stabilized") is False  # the peer does not have it
    assert ours == theirs


@pytest.mark.parametrize("changes", [{}, {"reduction_factor": 4, "mh_adapter": True}])
def test_what_files_of_the_peer_call_a_configuration(changes: dict[str, Any]) -> None:
    theirs = PeerConfig.load("seq_bn", **changes)
    assert load_config(theirs.to_dict()).to_dict() == theirs.to_dict()
