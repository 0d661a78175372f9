"""benchmarks/speed: ratios and their noise, files and the page, and what counts as worse."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import __main__ as command
from benchmarks.speed import importing, library, pairing, report, sessions, uninstalled
from benchmarks.speed.check import checked, worse
from benchmarks.speed.pairing import Found, Trial
from benchmarks.speed.results import Results, table
from benchmarks.speed.rows import ROWS

sys.path.pop(0)

PROBE = {"device": "cpu", "dtype": "float32", "threads": 2}
MADE = {
    "note": "On a busy day.",
    "probe": PROBE,
    "machine": "an abacus",
    "repeats": 15,
    "versions": {"flexheads": {"version": "1", "torch": "2", "transformers": "5"}},
}


def results(**rows: dict[str, Found]) -> Results:
    return Results(MADE, rows)


def ours(value: float, noise: float = 0.01) -> dict[str, Found]:
    return {"flexheads": Found(value, noise, value, 15)}


# --- timing -----------------------------------------------------------------------------------


class Watch:
    """A clock that only works move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *takes: float) -> Callable[[], None]:
        rest = [*takes]

        def run() -> None:
            self.now += rest.pop(0) if len(rest) > 1 else rest[0]

        return run


def test_a_ratio_is_that_to_the_runs_around_it() -> None:
    cpu, wall = Watch(), Watch()
    reference, call = cpu.work(2.0), cpu.work(3.0)
    slow = wall.work(4.0)
    both = {"a": Trial(lambda: (reference(), slow()), lambda: (call(), slow()))}
    found = pairing.compare(both, 5, [cpu, wall])["a"]
    assert (found.value, found.noise, found.wall, found.repeats) == (1.5, 0.0, 1.0, 5)


def test_the_result_is_the_median_and_its_noise_half_the_quartile_distance() -> None:
    watch = Watch()
    warm = [1.0] * pairing.WARM_UP
    call = watch.work(*warm, 1.0, 1.1, 1.2, 1.3, 9.0)
    found = pairing.compare({"a": Trial(watch.work(1.0), call)}, 5, [watch])["a"]
    assert found.value == pytest.approx(1.2)
    assert found.noise == pytest.approx(0.1)
    assert found.wall is None


def test_what_drifts_falls_on_both() -> None:
    watch = Watch()
    drift = [1.0] * pairing.WARM_UP + [float(n) for n in range(1, 21)]
    trial = Trial(watch.work(*drift), watch.work(*[1.0] * pairing.WARM_UP, *range(3, 43, 4)))
    # Between n and n + 1 the work takes twice their mean.
    assert pairing.compare({"a": trial}, 10, [watch])["a"] == Found(2.0, 0.0, None, 10)


def test_a_work_alone_begins_without_garbage_and_ends_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, events = Watch(), []
    monkeypatch.setattr(pairing.gc, "collect", lambda: events.append("collect"))
    monkeypatch.setattr(pairing.time, "perf_counter", watch)

    def prepared() -> Callable[[], None]:
        events.append("prepare")
        work = watch.work(8.0)
        return lambda: (events.append("work"), work())[1]

    found = pairing.spent(prepared, 5, [watch])
    assert (found.value, found.repeats) == (8.0, 3)  # the fourth would begin after 24 seconds
    assert events == ["prepare", "work", *["prepare", "collect", "work"] * 3]
    assert pairing.spent(prepared, 2, [watch]).repeats == 2


# --- what is worse ----------------------------------------------------------------------------


def test_worse_is_more_than_the_noise_of_this_run() -> None:
    committed = results(seq_bn=ours(1.04, 0.5), lora=ours(1.02), ia3=ours(1.03))
    now = results(seq_bn=ours(1.08, 0.02), lora=ours(1.035, 0.02), ia3=ours(0.9))
    found = worse(committed, now)
    assert [each.key for each in found] == ["seq_bn"]
    assert str(found[0]) == (
        "seq_bn: 1.080, where 1.040 is committed; the noise of this run is 0.020"
    )


def test_only_flexheads_is_checked() -> None:
    committed = results(lora={**ours(1.02), "peft": Found(1.0), "floor": Found(1.0)})
    now = results(lora={**ours(1.02), "peft": Found(9.0), "floor": Found(9.0)})
    assert worse(committed, now) == []


def test_seconds_are_not_checked_and_counts_are() -> None:
    committed = results(add=ours(0.1), switch=ours(0.1), kept=ours(400.0, 0.0))
    assert checked(committed) == ["kept"]
    now = results(add=ours(9.0), switch=ours(9.0), kept=ours(401.0, 0.0))
    assert [each.key for each in worse(committed, now)] == ["kept"]


def test_rows_that_were_not_run_are_left_out() -> None:
    assert worse(results(lora=ours(1.0), fuse=ours(1.0)), results(lora=ours(1.0))) == []


@pytest.mark.parametrize(("second", "code"), [(1.2, 1), (1.04, 0)])
def test_what_seems_worse_is_measured_twice(
    second: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    file = tmp_path / "results.json"
    results(seq_bn=ours(1.04), lora=ours(1.02), add=ours(0.1)).write(file)
    runs = [results(seq_bn=ours(1.2), lora=ours(1.02)), results(seq_bn=ours(second))]
    asked = []

    def measure(side: str, probe: object, keys: list[str], repeats: int) -> Results:
        asked.append(keys)
        return runs[len(asked) - 1]

    monkeypatch.setattr(command, "measure", measure)
    assert command.main(["--check", str(file)]) == code
    assert asked == [["seq_bn", "lora"], ["seq_bn"]]
    assert ("worse: seq_bn" in capsys.readouterr().out) is bool(code)


def test_a_row_that_could_not_be_measured_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    file = tmp_path / "results.json"
    results(seq_bn=ours(1.04), lora=ours(1.02)).write(file)
    monkeypatch.setattr(command, "measure", lambda *_: results(lora=ours(1.02)))
    assert command.main(["--check", str(file)]) == 1
    assert "seq_bn" in capsys.readouterr().out


# --- files and pages --------------------------------------------------------------------------


def test_results_survive_their_file(tmp_path: Path) -> None:
    own = results(seq_bn=ours(1.04), kept_full={"bare": Found(1099.0)})
    own.write(tmp_path / "a.json")
    assert Results.read(tmp_path / "a.json") == own


def test_sides_come_together() -> None:
    own = results(lora=ours(1.02))
    made = {**MADE, "versions": {"peft": {"version": "0"}}}
    own.take(Results(made, {"lora": {"peft": Found(1.1)}, "ia3": {"peft": Found(1.2)}}))
    assert set(own.rows["lora"]) == {"flexheads", "peft"}
    assert set(own.rows) == {"lora", "ia3"}
    assert set(own.made["versions"]) == {"flexheads", "peft"}


def test_the_table_has_a_line_for_each_row_and_a_column_for_each_side() -> None:
    own = results(
        ia3={**ours(1.02), "peft": Found(1.07, 0.02)},
        kept_full={"bare": Found(1098.6)},
        switch=ours(0.0512, 0.004),
    )
    assert table(own).splitlines() == [
        "|  | over | flexheads | PEFT | wanted | flexheads, wall |",
        "| --- | --- | --- | --- | --- | --- |",
        "| IA³ | bare backbone | 1.020 ±0.010 | 1.070 ±0.020 | 1.04 | 1.020 |",
        "| activations kept, full fine-tuning, 32 x 128: 1099 MiB |  |  |  |  |  |",
        "| activate one of 100 LoRAs, with the next call |  "
        "| 0.0512 ms ±0.004 |  | 0.2 ms | 0.0512 ms |",
    ]


def test_the_page_shows_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "FILE", tmp_path / "results.json")
    results(lora=ours(1.02)).write(tmp_path / "other.json")
    page = report.filled("before\n<!-- speed: other.json -->\nold\n<!-- end -->\nbehind\n")
    assert page.startswith("before\n<!-- speed: other.json -->\n\n|  | over | flexheads |")
    assert "1.020 ±0.010" in page
    assert "old" not in page
    assert "an abacus, 2 threads" in page
    assert "On a busy day." in page
    assert page.endswith("<!-- end -->\nbehind\n")


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    page = report.PAGE.read_text("utf-8")
    assert report.PART.search(page)
    assert report.filled(page) == page


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    own = results(lora={**ours(1.02), "peft": Found(1.07, 0.02)}, switch=ours(0.05))
    report.draw(own, tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text("utf-8")
    assert "LoRA, r=8 on query and value" in drawn
    assert "PEFT" in drawn
    assert ROWS["switch"].title not in drawn  # no ratio


# --- the command ------------------------------------------------------------------------------


def test_each_side_runs_apart_with_the_same_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = []

    def run_apart(side: str, pythons: list[str], arguments: list[str]) -> Results | None:
        asked.append((side, pythons[0], arguments))
        return None if side == "peft" else Results(MADE, {"lora": {side: Found(1.0, 0.1)}})

    monkeypatch.setattr(command, "run_apart", run_apart)
    file = tmp_path / "out.json"
    words = ["--only=lora", "--json", str(file), "--peer-python", "there", "--quick"]
    assert command.main(words) == 0
    assert asked == [
        ("flexheads", sys.executable, ["--only=lora", "--quick"]),
        ("adapters", "there", ["--only=lora", "--quick"]),
        ("peft", "there", ["--only=lora", "--quick"]),
    ]
    assert set(json.loads(file.read_text())["rows"]["lora"]) == {"flexheads", "adapters"}
    assert "peft is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--only", "seqbn"], ["--sides", "flex"], ["--groups", "no"], ["--small", "32"]]
)
def test_what_is_not_known_is_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_row_is_measured_by_flexheads() -> None:
    from benchmarks.speed import side_flexheads

    assert set(side_flexheads.MEASURES) == set(ROWS)


def test_a_module_that_is_not_there_is_noticed() -> None:
    assert sessions.pythons_for("peft", None) == [sys.executable]
    assert sessions.run_apart("no_such_module", [sys.executable], []) is None


def test_packages_are_found_where_they_are_not_installed(tmp_path: Path) -> None:
    toml = pytest.importorskip("tomllib")
    members = sorted(uninstalled.ROOT.glob("p*/*/pyproject.toml"))
    assert len(members) > 30
    for file in members:
        uninstalled.describe(uninstalled.read(file)["project"], tmp_path)
    found = {each.name: each for each in importlib.metadata.distributions(path=[str(tmp_path)])}
    for file in members:
        project = toml.loads(file.read_text("utf-8"))["project"]
        own = found[project["name"]]
        assert own.version == project["version"]
        assert own.requires == project["dependencies"]
        points = {point.name: point.value for point in own.entry_points}
        assert points == project.get("entry-points", {}).get("flexheads", {})


def test_imports_are_measured_together_and_anew_when_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes: list[str] = []
    seconds = {"": 4.0, "small": 5.0, "large": 6.0}

    def run(code: str, environment: Mapping[str, str]) -> tuple[float, float]:
        codes.append(code.removeprefix(importing.BASE).lstrip("; "))
        return seconds[codes[-1]], 2 * seconds[codes[-1]]

    monkeypatch.setattr(importing, "_run", run)
    found = importing.import_ratios({"a": "small", "b": "large"}, 25, {})
    assert codes == ["", "small", "large", "", *["small", "", "large", ""] * 3]
    assert {name: each.value for name, each in found.items()} == {"a": 1.25, "b": 1.5}
    assert found["a"] == Found(1.25, 0.0, 1.25, 3)

    some: Any = SimpleNamespace(
        environment={}, imports={"import": "small", "import_class": "large"}
    )

    def measured(row: str) -> float:
        return library.measured(some, some, row, 25).value

    codes.clear()
    assert (measured("import"), measured("import_class")) == (1.25, 1.5)
    once = len(codes)
    assert measured("import") == 1.25
    assert len(codes) == 2 * once
    library._imported.clear()
