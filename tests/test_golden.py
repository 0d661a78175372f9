"""What the peer libraries wrote and the outputs they gave: we read the files and get the same.

``FLEXHEADS_GOLDEN`` names the folder. Every file there of an installed architecture takes part,
as far as this version has the methods, blocks and heads; `left_out` says what is not, and why.
Where a peer is wrong its numbers are no target: those cases assert the right outcome instead.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import flexheads
from flexheads.checkpoints.store import read_tensors
from flexheads.composition import BLOCKS, BatchSplit, route
from flexheads.errors import UnknownNameError
from flexheads.plugins import registry

FOLDER = os.environ.get("FLEXHEADS_GOLDEN")
GOLDEN = Path(FOLDER or "not-set")

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(
        FOLDER is None or not GOLDEN.is_dir(), reason="FLEXHEADS_GOLDEN names no folder"
    ),
]

ATOL = 1e-5

# Fields of adapter configurations that this version does not support when they are set.
UNSUPPORTED_FIELDS = ("phm_layer", "use_dora", "vera_d")
UNSUPPORTED_ACTIONS = ("skip_layers", "average", "share_parameters", "adapter_setup", "full")


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's or a head's configuration file; empty where there is none."""
    files = [folder / "adapter_config.json", folder / "head_config.json"]
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else json.loads(file.read_text("utf-8"))


def installed(model_type: str) -> bool:
    try:
        registry().architecture_for(model_type)
    except UnknownNameError:
        return False
    return True


def unsupported_adapter(folder: Path) -> str | None:
    """Why an adapter cannot be loaded by this version, or None."""
    config = read_config(folder)["config"]
    try:
        registry().method_for_tag(config.get("architecture") or "bottleneck")
    except UnknownNameError:
        return f"method {config['architecture']}"
    return next(
        (f"field {f}" for f in UNSUPPORTED_FIELDS if config.get(f) not in (None, False)), None
    )


def unsupported_head(config: Mapping[str, Any] | None) -> str | None:
    """Why a flexible head cannot be loaded by this version, or None."""
    if config is not None and config["head_type"] not in registry().head_types:
        return f"head {config['head_type']}"
    return None


# --- cases that a manifest lists --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One entry of a manifest.

    Attributes:
        folder: Where the manifest lies.
        entry: The entry.
    """

    folder: Path
    entry: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.folder.relative_to(GOLDEN).as_posix()}/{self.entry['id']}"

    @property
    def manifest(self) -> Mapping[str, Any]:
        return manifest(self.folder)

    @property
    def newest(self) -> bool:
        """Whether the newest release wrote it."""
        return "legacy" not in self.folder.relative_to(GOLDEN).parts

    def blocks(self) -> set[str]:
        return set() if self.entry.get("setup") is None else set(_types(self.entry["setup"]))

    def left_out(self) -> str | None:
        """Why this version leaves the case out, or None where it takes part."""
        if action := next((key for key in UNSUPPORTED_ACTIONS if key in self.entry), None):
            return f"action {action}"
        if unknown := sorted(self.blocks() - {"single", *BLOCKS}):
            return f"block {unknown[0]}"
        for folder in self.entry.get("adapters", {}).values():
            if reason := unsupported_adapter(self.folder / folder):
                return reason
        for folder in self.entry.get("heads", {}).values():
            if reason := unsupported_head(read_config(self.folder / folder)["config"]):
                return reason
        return None

    def inputs(self, **changes: Any) -> dict[str, Any]:
        tensors = load_file(self.folder / self.manifest["inputs_file"])
        named = self.manifest["inputs"][self.entry["input"]]
        given = {name: tensors[key] for name, key in named.items()}
        if "loss" not in self.entry["outputs"]:
            for label in ("labels", "start_positions", "end_positions"):
                given.pop(label, None)
        return given | changes

    def expected(self) -> dict[str, Tensor]:
        tensors = expected_tensors(self.folder / self.manifest["expected_file"])
        return {name: tensors[key] for name, key in self.entry["outputs"].items()}

    def other(self, case_id: str) -> Case:
        """Another case of the same manifest."""
        return next(case for case in cases(self.folder) if case.entry["id"] == case_id)


def _types(setup: Mapping[str, Any]) -> Iterator[str]:
    yield setup["type"]
    for child in setup["children"]:
        if isinstance(child, dict):
            yield from _types(child)


@functools.cache
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


@functools.cache
def expected_tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


@functools.cache
def cases(folder: Path) -> tuple[Case, ...]:
    return tuple(Case(folder, entry) for entry in manifest(folder)["cases"])


def all_cases() -> list[Case]:
    files = sorted(
        [
            *GOLDEN.glob("adapters*/*/manifest.json"),
            *GOLDEN.glob("legacy/adapters*/*/manifest.json"),
        ]
    )
    folders = [file.parent for file in files]
    known = [f for f in folders if installed(config_of(f / manifest(f)["base"])["model_type"])]
    return [case for folder in known for case in cases(folder)]


def config_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text("utf-8"))


def block_of(setup: Mapping[str, Any] | None) -> Any:
    """A composition of the peer's as one of ours."""
    if setup is None:
        return None
    if setup["type"] == "single":
        return setup["children"][0]
    children = [block_of(child) for child in setup["children"]]
    if setup["type"] == "BatchSplit":
        return BatchSplit(*children, batch_sizes=setup["kwargs"]["batch_sizes"])
    return BLOCKS[setup["type"]](*children)


def model_for(case: Case) -> Any:
    """The case's model, with the adapters and heads loaded by us."""
    entry, folder = case.entry, case.folder
    attention = entry.get("attn_implementation") or case.manifest.get("attn_implementation")
    path = folder / entry.get("model", case.manifest["base"])
    auto = flexheads.AutoModelWithHeads
    if entry["level"] == "static":
        auto = getattr(transformers, entry["static_class"])
    model = auto.from_pretrained(str(path), attn_implementation=attention or "eager").eval()
    flexheads.init(model)
    heads = bool(entry.get("adapters_with_head"))
    for name, where in entry.get("adapters", {}).items():
        assert model.load_adapter(folder / where, load_as=name, with_head=heads) == name
    for name, where in entry.get("heads", {}).items():
        assert model.load_head(folder / where, load_as=name, set_active=False) == name
    return model


def run(case: Case, model: Any, setup: Any = ..., **changes: Any) -> dict[str, Tensor]:
    """Runs the case with its own setup and head, or with another setup."""
    setup = block_of(case.entry.get("setup")) if setup is ... else setup
    model.set_active_adapters(setup)
    if case.entry["level"] == "base":
        model.active_head = None
    elif case.entry.get("active_head") is not None:
        model.active_head = case.entry["active_head"]
    with torch.no_grad():
        output = model(**case.inputs(**changes))
    return {name: pick(output, name) for name in case.entry["outputs"]}


def pick(output: Any, name: str) -> Tensor:
    """A field of an output; ``1.logits`` is one of the second head's."""
    number, dot, field = name.partition(".")
    return output[int(number)][field] if dot else output[name]


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=ATOL, rtol=0, msg=_named(name))


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


# --- where the peer's numbers are no target ---------------------------------------------------


def check_chains(case: Case, model: Any) -> None:
    """Every row goes through its chain as a Stack at the top level would, inverse and all."""
    routing = route(block_of(case.entry["setup"]))
    got = run(case, model)
    heads = [name for name in got if name[0].isdigit()]
    whole = case.inputs()
    starts = [sum(routing.sizes[:n]) for n in range(len(routing.chains))] if routing.sizes else None
    for number, chain in enumerate(routing.chains):
        rows = slice(None)
        if starts is not None:
            rows = slice(starts[number], starts[number] + routing.sizes[number])
        with torch.no_grad():
            head = chain[-1] if heads else []
            single = model(
                **{k: v[rows] for k, v in whole.items()}, adapter_names=list(chain), head=head
            )
        batch = single[0].shape[0]
        for name in heads[number : number + 1] or got:
            own = got[name] if heads else got[name][number * batch : (number + 1) * batch]
            torch.testing.assert_close(
                own, pick(single, name.rpartition(".")[2]), atol=ATOL, rtol=0
            )


def check_added_deltas(case: Case, model: Any) -> None:
    """Stacked LoRAs add their deltas: the plain model with the sum folded in gives the same."""
    plain = model_for(case.other("base"))
    state = plain.base_model.state_dict()
    for folder in case.entry["adapters"].values():
        config = read_config(case.folder / folder)["config"]
        factors: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for key, tensor in tensors_of(case.folder / folder).items():
            path, _, rest = key.partition(".loras.")
            factors[path.removeprefix(f"{plain.base_model_prefix}.")][rest[-6:]] = tensor
        for path, parts in factors.items():
            delta = parts["lora_B"] @ parts["lora_A"] * (config["alpha"] / config["r"])
            state[f"{path}.weight"] += delta
    assert_close(run(case, model), run(case, plain, None))


def check_merged(case: Case, model: Any) -> None:
    """A merged IA3 equals the unmerged one, biases of the projections included."""
    merged = run(case, model)
    alone = case.other(f"adapter/{case.entry['merge']}")
    assert_close(merged, alone.expected())
    model.reset_adapter()
    assert_close(run(case, model), case.other("base").expected())


def check_whole_checkpoint(case: Case, model: Any) -> None:
    """The head of a static checkpoint, taken over, gives the static outputs, decoder bias and all.

    The peer converts while it loads the checkpoint; we save the static head and load it.
    """
    plain = case.other(case.entry["id"].replace("flex_auto", "plain"))
    with tempfile.TemporaryDirectory() as folder:
        model_for(plain).save_head(folder)
        assert model.load_head(folder, load_as="default") == "default"
    expected = {name: plain.expected()[name] for name in case.entry["outputs"]}
    assert_close(run(case, model), expected)


def check_like_static(case: Case, model: Any) -> None:
    """The converted head gives the peer's outputs, and those of the static class."""
    assert_close(run(case, model), case.expected())
    static = case.other(case.entry["id"].replace("flex_adapter", "adapter"))
    assert_close(run(case, model), static.expected())


def check_stacked_couplings(case: Case, model: Any) -> None:
    """Stacked invertible adapters follow one another behind the embeddings."""
    plain, names = model_for(case.other("base")), list(case.entry["adapters"])
    couplings = []
    for name, folder in case.entry["adapters"].items():
        config = read_config(case.folder / folder)["config"]
        plain.add_adapter(name, {**config, "inv_adapter": None, "architecture": None})
        own = model.adapters[name].state_dict()
        rest = {key: tensor for key, tensor in own.items() if not key.startswith("embeddings.")}
        plain.adapters[name].load_state_dict(rest)
        stem = f".invertible_adapters.{name}."
        tensors = tensors_of(case.folder / folder).items()
        couplings.append(
            ({k.partition(stem)[2]: t for k, t in tensors if stem in k}, config["non_linearity"])
        )

    def behind_embeddings(module: Any, args: Any, hidden: Tensor) -> Tensor:
        for tensors, non_linearity in couplings:
            hidden = nice(hidden, tensors, getattr(torch.nn.functional, non_linearity))
        return hidden

    plain.base_model.embeddings.register_forward_hook(behind_embeddings)
    assert_close(run(case, model), run(case, plain, names))


def nice(hidden: Tensor, tensors: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """The additive coupling, written out."""

    def subnet(word: str, half: Tensor) -> Tensor:
        inner = act(half @ tensors[f"{word}.0.weight"].T + tensors[f"{word}.0.bias"])
        return inner @ tensors[f"{word}.2.weight"].T + tensors[f"{word}.2.bias"]

    left, right = hidden.chunk(2, dim=-1)
    left = left + subnet("F", right)
    return torch.cat([left, right + subnet("G", left)], dim=-1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    safe = folder / "adapter.safetensors"
    return read_tensors(safe if safe.is_file() else folder / "pytorch_adapter.bin")


# By the case's id, or the end of it. What the peer does there: a Stack inside another block misses
# the residual and the norm between its members; invertible adapters take the first member for all
# rows, and of a Stack; a second LoRA acts on the first one's delta; IA3 is merged without the
# projections' biases; the bias of a language-model head is lost where a whole checkpoint is
# converted.
CHECKS: dict[str, Callable[[Case, Any], None]] = {
    "compose/bn_parallel_stack": check_chains,
    "compose/bn_batchsplit_stack": check_chains,
    "compose_heads/parallel_stack": check_chains,
    "compose/inv_parallel": check_chains,
    "compose/inv_batchsplit": check_chains,
    "compose/inv_stack": check_stacked_couplings,
    "compose/lora_stack": check_added_deltas,
    "merge/ia3": check_merged,
    "flex_auto": check_whole_checkpoint,
    "flex_adapter": check_like_static,
}


@pytest.mark.parametrize(
    "case", [c for c in all_cases() if c.left_out() is None], ids=lambda case: case.name
)
def test_case(case: Case) -> None:
    model = model_for(case)
    if "merge" in case.entry:
        model.merge_adapter(case.entry["merge"])
    check = CHECKS.get(case.entry["id"]) or CHECKS.get(case.entry["id"].rpartition("/")[2])
    if check is not None:
        check(case, model)
    else:
        assert "quirk" not in case.entry, "the peer is known to be wrong here; say what is right"
        assert_close(run(case, model), case.expected())
    if "parameters" in case.entry:
        (adapter,) = model.adapters.values()
        assert sum(p.numel() for p in adapter.parameters()) == case.entry["parameters"]
    if "config" in case.entry:
        (head,) = model.heads.values()
        ours, theirs = head.to_dict(), case.entry["config"]
        assert {k: ours[k] for k in theirs if k in ours} == {
            k: theirs[k] for k in theirs if k in ours
        }


# --- files that we write ----------------------------------------------------------------------


def saved_once(part: str) -> list[Case]:
    """For each adapter (or head) of the newest release, one case that loads it."""
    found: dict[tuple[Path, str], Case] = {}
    for case in all_cases():
        folders = list(case.entry.get(part, {}).values())
        alone = len(folders) == 1 and case.entry["level"] != "static" and "full" not in case.entry
        if alone and case.newest and case.left_out() is None:
            found.setdefault((case.folder, folders[0]), case)
    return list(found.values())


@pytest.mark.parametrize("case", saved_once("adapters"), ids=lambda case: case.name)
def test_an_adapter_is_written_as_the_peer_writes_it(case: Case, tmp_path: Path) -> None:
    model, ((name, folder),) = model_for(case), case.entry["adapters"].items()
    model.save_adapter(tmp_path, name, with_head=False)
    theirs, ours = tensors_of(case.folder / folder), tensors_of(tmp_path)
    # The peer's base models, unlike its models with heads, leave out the backbone's own name.
    prefix = f"{model.base_model_prefix}."
    assert {k.removeprefix(prefix): t for k, t in ours.items()}.keys() == {
        k.removeprefix(prefix) for k in theirs
    }
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours.get(key, ours.get(prefix + key)))
    written, read = read_config(tmp_path), read_config(case.folder / folder)
    assert {k: written["config"][k] for k in read["config"]} == read["config"]
    assert written["model_type"] == read["model_type"]
    assert written["hidden_size"] == read["hidden_size"]


@pytest.mark.parametrize("case", saved_once("heads"), ids=lambda case: case.name)
def test_a_head_is_written_as_the_peer_writes_it(case: Case, tmp_path: Path) -> None:
    model, ((name, folder),) = model_for(case), case.entry["heads"].items()
    model.save_head(tmp_path, name)
    theirs, ours = head_tensors(case.folder / folder), head_tensors(tmp_path)
    saved_as = read_config(case.folder / folder)["name"]
    renamed = {k.replace(f"heads.{saved_as}.", f"heads.{name}.", 1): t for k, t in theirs.items()}
    assert ours.keys() == renamed.keys()
    for key, tensor in renamed.items():
        assert torch.equal(tensor, ours[key])
    written, read = read_config(tmp_path)["config"], read_config(case.folder / folder)["config"]
    assert written == read


def head_tensors(folder: Path) -> dict[str, Tensor]:
    safe = folder / "model_head.safetensors"
    return read_tensors(safe if safe.is_file() else folder / "pytorch_model_head.bin")


# --- folders that the ancestor's releases wrote -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Legacy:
    """One folder ``legacy/<release>/<architecture>/<case>``, with ``expected.pt`` in it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.relative_to(GOLDEN).as_posix()

    @property
    def base(self) -> str:
        return str(self.folder.parent / "base")

    @property
    def head(self) -> dict[str, Any]:
        """The content of ``head_config.json``; empty where there is none."""
        file = self.folder / "head_config.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def left_out(self) -> str | None:
        if self.folder.name == "fusion":
            return "block Fuse"
        if self.folder.name == "full_model":
            return "whole model"
        if not (self.folder / "expected.pt").is_file():
            return "no outputs recorded"
        return unsupported_adapter(self.folder) or unsupported_head(self.head.get("config"))

    def recorded(self, file: str = "expected.pt") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inputs and the outputs that the release has recorded."""
        content = torch.load(self.folder / file, weights_only=True)
        return content["inputs"], content["outputs"]

    def flexible(self) -> Any:
        """A model with flexible heads, with the adapter and (converted) heads loaded and active."""
        auto = flexheads.AutoModelWithHeads
        model = auto.from_pretrained(self.base, attn_implementation="eager")
        model.load_adapter(self.folder, set_active=True)
        return model

    def static(self) -> Any:
        """The class that saved the folder, with adapter and head loaded and active."""
        kind = getattr(transformers, self.head["model_class"])
        labels = {"num_labels": len(self.head["label2id"])}
        model = kind.from_pretrained(self.base, attn_implementation="eager", **labels)
        flexheads.init(model.eval()).load_adapter(self.folder, set_active=True)
        return model


def all_legacy() -> list[Legacy]:
    bases = sorted(GOLDEN.glob("legacy/*/*/base"))
    known = [b for b in bases if b.parents[1].name[0].isdigit()]
    known = [base for base in known if installed(config_of(base)["model_type"])]
    folders = [folder for base in known for folder in sorted(base.parent.iterdir())]
    return [Legacy(folder) for folder in folders if folder.name != "base"]


LEGACY = [case for case in all_legacy() if case.left_out() is None]
STATIC = [case for case in LEGACY if case.folder.name.startswith("static_")]


@torch.no_grad()
def call(model: Any, inputs: Mapping[str, Any], **how: Any) -> Any:
    return model(**inputs, **how)


def chosen(output: Any, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: output[name] for name in expected}


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: case.name)
def test_legacy(case: Legacy) -> None:
    inputs, expected = case.recorded()
    model = case.static() if case in STATIC else case.flexible()
    assert_close(chosen(call(model, inputs), expected), expected)


@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name)
def test_legacy_static_head_becomes_flexible(case: Legacy) -> None:
    """The converted heads give what the static class gives, also where that release refused."""
    inputs, expected = case.recorded()
    static, model = case.static(), case.flexible()
    rules = registry().conversion(case.head["model_class"]).heads
    assert len(model.heads) == len(rules)
    whole = call(static, inputs)
    for rule in rules:
        output = call(model, inputs, head=model.adapters.keys()[0] + rule.suffix)
        fields = [rule.output, "end_logits"] if rule.output == "start_logits" else [rule.output]
        for field in fields:
            own = output[field if field in output else "logits"]
            torch.testing.assert_close(own, whole[field], atol=ATOL, rtol=0)
            if field in expected:
                torch.testing.assert_close(own, expected[field], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "case", [c for c in STATIC if (c.folder / "converted.pt").is_file()], ids=lambda c: c.name
)
def test_legacy_conversion(case: Legacy) -> None:
    """Our conversion gives the outputs and the configuration of that release's own."""
    inputs, expected = case.recorded("converted.pt")
    model = case.flexible()
    assert_close(chosen(call(model, inputs), expected), expected)
    theirs = torch.load(case.folder / "converted.pt", weights_only=True)["head_config"]
    ours = model.heads[model.active_head].to_dict()
    differing = {k: (v, ours[k]) for k, v in theirs.items() if k in ours and ours[k] != v}
    if ours["head_type"] == "multiple_choice":
        # That release took the label names of the static class, by default two, for the choices.
        # Ours reads the number of choices off each input.
        differing.pop("num_choices", None)
        differing.pop("label2id", None)
    assert not differing


# --- what takes part --------------------------------------------------------------------------

# Fewest cases that take part, of the folders that are there.
COVERED = {"adapters130/bert": 120, "legacy/adapters1.0.1/bert": 36}
COVERED_LEGACY = {"legacy/1.1.1/bert": 20, "legacy/2.1.2/bert": 22, "legacy/3.2.1/bert": 24}
# Everything that may be left out begins with one of these words.
REASONS = ("action", "block", "field", "head", "method", "no outputs", "whole model")


def test_coverage() -> None:
    """The cases that take part are not fewer than they were, and the others have a known reason."""
    found = [(c.folder, c.left_out()) for c in all_cases()]
    found += [(c.folder.parent, c.left_out()) for c in all_legacy()]
    reasons = {reason for _, reason in found if reason is not None}
    assert not {reason for reason in reasons if not reason.startswith(REASONS)}
    counts = collections.Counter(
        folder.relative_to(GOLDEN).as_posix() for folder, reason in found if reason is None
    )
    wanted = {f: n for f, n in {**COVERED, **COVERED_LEGACY}.items() if (GOLDEN / f).is_dir()}
    assert wanted, "the folder holds nothing of what this test is about"
    assert {f: n for f, n in wanted.items() if counts[f] < n} == {}


def test_every_known_mistake_of_the_peer_has_a_check() -> None:
    flagged = {c.entry["id"] for c in all_cases() if c.left_out() is None and "quirk" in c.entry}
    assert flagged <= set(CHECKS)
