"""Representation fine-tuning: against its definition, at the right tokens, however it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexheads
from flexheads import BatchSplit, LoReftConfig, NoReftConfig, Parallel, Rows, Stack, load_config
from flexheads.checkpoints.store import read_tensors
from flexheads.errors import ConfigError
from flexheads.methods.householder import orthonormal_rows, reflections
from flexheads.sites.call import Tokens
from flexheads.testing import randomise, tiny_model, tiny_static

METHODS = ("loreft", "noreft", "direft")
each_method = pytest.mark.parametrize("method", METHODS)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(method: str = "loreft", name: str = "x", model: Any = None, **fields: Any) -> Any:
    model = randomise(tiny_model("bert", **NO_DROPOUT), std=0.15) if model is None else model
    fields = {"r": 2, "dropout": 0.0, **fields}
    model.add_adapter(name, load_config(method, **fields), set_active=True)
    randomise(model.adapters[name], seed=len(model.adapters))
    return model


# --- the definition ---------------------------------------------------------------------------

Chooser = Callable[[int], dict[int, int]]
"""From a row to its edited columns, each with the number of its edit."""


def edited(part: Any, config: Any, hidden: Tensor, choose: Chooser) -> Tensor:
    """``h + R^T (act(W h + b) - R h)``, token by token."""
    act = {None: lambda t: t, "tanh": torch.tanh}[config.non_linearity]
    rows = []
    for row in range(hidden.shape[0]):
        states = list(hidden[row])
        for column, number in choose(row).items():
            unit = part.units[0 if config.tied_weights else number]
            projection = projection_of(unit, config)
            state = states[column]
            source = act(unit.learned_source.weight @ state + unit.learned_source.bias)
            if config.subtract_projection:
                source = source - projection @ state
            states[column] = state + projection.T @ source
        rows.append(torch.stack(states))
    return torch.stack(rows)


def projection_of(unit: Any, config: Any) -> Tensor:
    weight = unit.projection.weight
    if not config.orthogonality:
        return weight
    whole = torch.eye(weight.shape[1], dtype=weight.dtype)
    for index, row in enumerate(weight):
        vector = torch.cat([torch.zeros(index), torch.ones(1), row[index + 1 :]])
        reflection = torch.eye(len(row)) - 2 * torch.outer(vector, vector) / vector.dot(vector)
        whole = whole @ reflection.to(whole)
    return whole[:, : weight.shape[0]].T * weight.diagonal().sign().unsqueeze(1)


def edges(mask: Tensor, first: int, last: int) -> Chooser:
    """The first and last real tokens of each row, the last ones first where both are the same."""

    def choose(row: int) -> dict[int, int]:
        real = mask[row].nonzero().flatten().tolist()
        return dict.fromkeys(real[:first], 0) | dict.fromkeys(real[max(0, len(real) - last) :], 1)

    return choose


def defined(model: Any, given: dict[str, Tensor], choose: Chooser, name: str = "x") -> Tensor:
    """What a model without hooks gives, edited behind each layer as defined."""
    plain = tiny_model("bert", **NO_DROPOUT)
    backbone, adapter = plain.base_model, model.adapters[name]
    backbone.load_state_dict(model.base_model.state_dict())

    def hook_of(part: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            tensor = output[0] if isinstance(output, tuple) else output
            changed = edited(part, adapter.config, tensor, choose)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    for number, layer in enumerate(backbone.encoder.layer):
        part = adapter.parts.get(f"layers.{number}.output")
        if part is not None:
            layer.register_forward_hook(hook_of(part))
    return plain(**given).last_hidden_state


def inputs(padding: str = "right") -> dict[str, Tensor]:
    """Rows of 7, 4, 1 and 2 tokens."""
    generator = torch.Generator().manual_seed(4)
    given = {"input_ids": torch.randint(3, 99, (4, 7), generator=generator)}
    mask = torch.ones(4, 7, dtype=torch.long)
    for row, length in enumerate((7, 4, 1, 2)):
        mask[row, length:] = 0
    if padding == "left":
        mask = mask.flip(1)
    if padding == "holes":
        mask[:, 2] = 0
        mask[2, 4] = 1
    return given if padding == "none" else {**given, "attention_mask": mask}


def mask_of(given: dict[str, Tensor]) -> Tensor:
    return given.get("attention_mask", torch.ones_like(given["input_ids"]))


FIELDS: list[dict[str, Any]] = [
    {},
    {"suffix_positions": 2},
    {"prefix_positions": 0, "suffix_positions": 3},
    {"suffix_positions": 2, "tied_weights": True},
    {"prefix_positions": 5, "suffix_positions": 5},
    {"layers": [1], "suffix_positions": 1},
    {"non_linearity": "tanh", "suffix_positions": 1},
]


@each_method
@pytest.mark.parametrize("padding", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_definition(method: str, padding: str, fields: dict[str, Any]) -> None:
    model, given = build(method, **fields), inputs(padding)
    config = model.adapters["x"].config
    choose = edges(mask_of(given), config.prefix_positions, config.suffix_positions)
    ours, defining = model(**given).last_hidden_state, defined(model, given, choose)
    assert (ours - model(**given, adapter_names=[]).last_hidden_state).abs().max() > 0.1
    real = mask_of(given).bool()
    torch.testing.assert_close(ours[real], defining[real], atol=1e-5, rtol=1e-5)
    learned = list(model.adapters["x"].parameters())
    weights = torch.linspace(-1, 1, ours[real].numel()).view_as(ours[real])
    one, other = (
        torch.autograd.grad((t[real] * weights).sum(), learned, allow_unused=True)
        for t in (ours, defining)
    )
    for mine, theirs in zip(one, other, strict=True):
        assert (mine is None) <= (theirs is None or not theirs.any())
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_dropout_is_on_the_edited_state() -> None:
    model = build(prefix_positions=2, dropout=0.5).train()
    part = model.adapters["x"].parts["layers.0.output"]
    hidden = torch.randn(2, 5, 32)
    whole = copy.deepcopy(part).eval()(hidden, Tokens(None))
    torch.manual_seed(0)
    dropped = part(hidden, Tokens(None))
    assert torch.equal(dropped[:, 2:], hidden[:, 2:])
    edits = dropped[:, :2]
    is_zero = edits.abs() < 1e-5
    assert 0.3 < is_zero.float().mean() < 0.7
    torch.testing.assert_close(edits[~is_zero], 2 * whole[:, :2][~is_zero])


# --- orthonormal rows -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_rows_are_orthonormal_and_come_back(rank: int) -> None:
    weight = torch.randn(rank, 8, dtype=torch.float64)
    rows = orthonormal_rows(weight)
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(orthonormal_rows(reflections(rows)), rows)
    unit = torch.eye(rank, 8, dtype=torch.float64)  # where a reflection has nothing to do
    torch.testing.assert_close(orthonormal_rows(reflections(unit)), unit)


def test_nothing_square_is_stored_and_decay_does_no_harm() -> None:
    model = build(r=2)
    shapes = [tuple(t.shape) for t in model.adapters["x"].state_dict().values()]
    assert set(shapes) == {(2, 32), (2,)}
    projection = model.adapters["x"].parts["layers.0.output"].units[0].projection
    before = projection().diagonal()
    with torch.no_grad():
        projection.weight.diagonal().mul_(0.001)  # what weight decay does to what has no gradient
    torch.testing.assert_close(projection().diagonal(), before)


def test_the_projection_is_made_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(suffix_positions=1), []
    made = torch.linalg.householder_product
    monkeypatch.setattr(
        torch.linalg, "householder_product", lambda *args: calls.append(1) or made(*args)
    )
    model(**inputs())
    assert len(calls) == 2 * 2  # layers, edits


def test_torch_reads_the_projection_in_our_file(tmp_path: Path) -> None:
    model = build(r=3)
    model.save_adapter(tmp_path, "x")
    tensors = read_tensors(tmp_path / "adapter.safetensors")
    stem = "bert.encoder.layer.1.reft_layer.refts.x.units.1.projection."
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(32, 3, bias=False))
    layer.load_state_dict({k.removeprefix(stem): t for k, t in tensors.items() if stem in k})
    ours = model.adapters["x"].parts["layers.1.output"].units[1].projection()
    torch.testing.assert_close(layer.weight, ours)


@each_method
def test_files(method: str, tmp_path: Path) -> None:
    model = build(method, suffix_positions=1)
    expected = model(**inputs()).last_hidden_state
    model.save_adapter(tmp_path, "x")
    other = randomise(tiny_model("bert", **NO_DROPOUT), std=0.15)
    other.load_adapter(tmp_path, set_active=True)
    assert other.adapters["x"].config.subtract_projection == (method != "direft")
    assert torch.equal(other(**inputs()).last_hidden_state, expected)


# --- caches and generation --------------------------------------------------------------------


def decoder(kind: str = "BertLMHeadModel", **fields: Any) -> Any:
    also = {"is_decoder": True} if kind.startswith("Bert") else {}
    model = flexheads.init(tiny_static(kind, pad_token_id=0, **also))
    model.generation_config.eos_token_id = None
    return build(model=model, **fields)


def prompts(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :3], mask[0, :3] = 0, 0
        ids[2, :4], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_is_the_full_forward(padded: bool, kind: str) -> None:
    """A row of one token has its second and third edit at tokens that were generated."""
    if kind == "static":  # of which the oldest BERT knows nothing
        pytest.importorskip("flexheads_llama")
    name = {"static": "LlamaForCausalLM", "dynamic": "BertLMHeadModel"}[kind]
    model, given = decoder(name, prefix_positions=3), prompts(padded)
    how = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    if kind == "static":
        how["cache_implementation"] = "static"
        how["disable_compile"] = True
    cached = model.generate(**given, **how, do_sample=False)
    plain = model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached.sequences, plain)
    mask = torch.cat([given["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    whole = {
        "input_ids": cached.sequences[:, :-1],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    full, bare = model(**whole).logits, model(**whole, adapter_names=[]).logits
    for step, scores in enumerate(cached.scores):
        torch.testing.assert_close(scores, full[:, 4 + step], atol=1e-4, rtol=1e-4)
    assert (full[:, -1] - bare[:, -1]).abs().max() > 1e-3


def test_generated_tokens_are_not_the_last_of_the_prompt() -> None:
    """Step by step is one forward in which the prompt's last tokens are edited."""
    model = decoder(prefix_positions=1, suffix_positions=2)
    given = prompts(padded=False)
    ids = torch.cat([given["input_ids"], torch.randint(3, 99, (3, 2))], dim=1)
    first = model(**given, use_cache=True)
    steps, cache = [first.logits[:, -1]], first.past_key_values
    for column in (5, 6):
        out = model(
            input_ids=ids[:, column : column + 1],
            attention_mask=torch.ones(3, column + 1, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(out.logits[:, -1])
        cache = out.past_key_values
    adapter = model.adapters["x"]
    model.set_active_adapters(None)

    def hook_of(part: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            tensor = output[0] if isinstance(output, tuple) else output
            changed = edited(part, adapter.config, tensor, lambda _: {0: 0, 3: 1, 4: 1})
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(hook_of(adapter.parts[f"layers.{number}.output"]))
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 4:], atol=1e-4, rtol=1e-4)


def test_an_encoder_that_generation_calls_by_itself() -> None:
    """Each side has its own tokens, also where the encoder is called without the model."""
    pytest.importorskip("flexheads_t5")
    model = flexheads.init(tiny_static("T5ForConditionalGeneration"))
    build(model=model, suffix_positions=2)
    model.generation_config.eos_token_id = None
    given, states = prompts(padded=True), []
    model.get_encoder().register_forward_hook(lambda *args: states.append(args[2][0].clone()))
    start = torch.zeros(3, 1, dtype=torch.long)
    model(**{key: t.flip(1) for key, t in given.items()}, decoder_input_ids=start)
    model.generate(**given, max_new_tokens=2)
    model(**given, decoder_input_ids=start)
    model.set_active_adapters(None)
    model(**given, decoder_input_ids=start)
    _, alone, whole, bare = states
    torch.testing.assert_close(alone, whole)
    real = given["attention_mask"].bool()
    assert ((whole - bare).abs().amax(-1) > 1e-3)[real].all()


def test_decoder_tokens_without_a_mask_are_all_real() -> None:
    pytest.importorskip("flexheads_t5")
    model = flexheads.init(tiny_static("T5ForConditionalGeneration"))
    build(model=model, layers=[3], prefix_positions=1, suffix_positions=1)
    given = prompts(padded=True)
    ids = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    states = []
    model.get_decoder().block[1].register_forward_hook(
        lambda *args: states.append(args[2][0] if isinstance(args[2], tuple) else args[2])
    )
    for how in ({}, {"decoder_attention_mask": mask}):
        for names in (None, []):
            model(**given, decoder_input_ids=ids, **how, adapter_names=names)
    changed = [(states[i] - states[i + 1]).abs().amax(-1) > 1e-6 for i in (0, 2)]
    assert changed[0].tolist() == [[True, False, False, False, False, True]] * 3
    assert changed[1][1].tolist() == [True, False, False, True, False, False]


def test_generation_of_an_encoder_decoder_with_and_without_a_cache() -> None:
    pytest.importorskip("flexheads_t5")
    model = flexheads.init(tiny_static("T5ForConditionalGeneration"))
    build(model=model)
    model.generation_config.eos_token_id = None
    how = {"max_new_tokens": 5, "do_sample": False}
    one, other = (model.generate(**prompts(True), **how, use_cache=u) for u in (True, False))
    assert torch.equal(one, other)
    assert not torch.equal(one, model.generate(**prompts(True), **how, adapter_names=[]))


@pytest.mark.parametrize("form", ["added", "boolean", "integer", "by kind of layer"])
def test_masks_that_transformers_has_prepared(form: str) -> None:
    """Caches of fixed size are longer than the tokens; the prepared mask says what is there."""
    two = inputs("left")["attention_mask"]
    seen = torch.cat([two, torch.zeros(4, 3, dtype=torch.long)], 1)[:, None, None]
    seen = seen.expand(4, 1, 7, 10).bool()
    prepared: Any = {
        "added": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "boolean": seen,
        "integer": seen.long(),
        "by kind of layer": {"sliding_attention": seen[:, :, :, 5:], "full_attention": seen},
    }[form]
    hidden = torch.zeros(4, 7, 2)
    for one, other in zip(
        Tokens(prepared).edges(hidden, 3, 2), Tokens(two).edges(hidden, 3, 2), strict=True
    ):
        assert torch.equal(one, other)


def test_virtual_tokens_in_front_are_none() -> None:
    columns, real = Tokens(inputs("left")["attention_mask"]).edges(torch.zeros(4, 9, 2), 1, 1)
    assert columns[real.all(1)].tolist() == [[2, 8], [5, 8], [7, 8]]
    assert real.tolist()[2] == [False, True]  # one token, so it comes once


# --- rows, compiling, checkpointing, precision --------------------------------------------------


@pytest.fixture
def two() -> Any:
    model = build("loreft", "a", suffix_positions=1)
    return build("direft", "b", model, prefix_positions=1, suffix_positions=2)


def test_rows_take_their_positions_along(two: Any) -> None:
    given = inputs("left")
    with torch.no_grad():
        a, b, none = (two(**given, adapter_names=name).last_hidden_state for name in ("a", "b", []))
        split = two(**given, adapter_names=BatchSplit("a", "b", batch_sizes=[3, 1]))
        rows = two(**given, adapter_names=Rows(["b", "a", None, "a"]))
        both = two(**given, adapter_names=Parallel("a", "b"))
        stack = two(**given, adapter_names=Stack("a", "b"))
    assert min((a - none).abs().max(), (b - none).abs().max(), (a - b).abs().max()) > 0.1
    torch.testing.assert_close(split.last_hidden_state, torch.cat([a[:3], b[3:]]))
    torch.testing.assert_close(rows.last_hidden_state, torch.stack([b[0], a[1], none[2], a[3]]))
    torch.testing.assert_close(both.last_hidden_state, torch.cat([a, b]))
    assert min((stack[0] - a).abs().max(), (stack[0] - b).abs().max()) > 0.1


@each_method
def test_compiled_in_one_graph(method: str) -> None:
    """Which also means that nothing waits for the device."""
    torch._dynamo.reset()
    model = build(method, suffix_positions=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for padding in ("left", "right"):
            given = inputs(padding)
            torch.testing.assert_close(
                compiled(**given).last_hidden_state, model(**given).last_hidden_state
            )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_the_mask_of_its_own_call(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(suffix_positions=1)
        model.train_adapter("x")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        state = model(**inputs("left")).last_hidden_state
        model(**inputs("right"))
        (state**2).sum().backward()
        found.append([p.grad for p in model.adapters["x"].parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


@each_method
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_half_precision(method: str, dtype: str | None) -> None:
    model = build(method, model=tiny_model("bert").to(torch.bfloat16), dtype=dtype)
    own = {p.dtype for p in model.adapters["x"].parameters()}
    assert own == {torch.float32 if dtype else torch.bfloat16}
    assert model(**inputs()).last_hidden_state.dtype == torch.bfloat16


def test_nothing_of_a_call_is_kept() -> None:
    model = build()
    model(**inputs())
    assert model._attachment.runtime.peek("call") is None


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LoReftConfig(layers=[0, 2]), r"layers names layers \[2\], but the model has 2"),
        (lambda: LoReftConfig(layers=[]), "adapts nothing"),
        (lambda: LoReftConfig(output_reft=False), "adapts nothing"),
        (lambda: LoReftConfig(layers="some"), "layers='some'"),
        (lambda: LoReftConfig(r=32), "r=32 must be less than the hidden size, 32"),
        (lambda: NoReftConfig(r=0), "r=0"),
        (lambda: NoReftConfig(prefix_positions=0), "edits nothing"),
        (lambda: NoReftConfig(suffix_positions=-1), "suffix_positions=-1"),
        (lambda: NoReftConfig(dropout=1.0), "dropout=1.0"),
        (lambda: NoReftConfig(dtype="half float"), "dtype='half float'"),
    ],
)
def test_bad_input(config: Any, message: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("x", config())
    assert len(model.adapters) == 0
