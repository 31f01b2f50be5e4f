"""The command line: what each command prints, for people and for programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fixtures.more import some_of
from fixtures.tiny import COLOURS, METHODS, contents, document, ledger, make_rows, tiny_world, write_rows
from typer.testing import CliRunner, Result

import fedlora
from fedlora import config
from fedlora.cli.main import app
from fedlora.core.errors import DataError
from fedlora.runs.inference import TrainedRun
from fedlora.show.describe import SLOTS

world = pytest.fixture(scope="module")(tiny_world)


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def printed(*arguments: object) -> Any:
    """What the command prints as JSON; nothing else may be on stdout."""
    return json.loads(invoke(*arguments, "--format", "json").stdout)


@pytest.fixture(scope="module")
def run_toml(world: Path) -> Path:
    (world / "run.toml").write_text(tomli_w.dumps(document(world)))
    return world / "run.toml"


@pytest.fixture(scope="module")
def run_folder(run_toml: Path) -> Path:
    """A finished run of dense LoRA."""
    invoke("run", run_toml, "--out", run_toml.parent / "run")
    return run_toml.parent / "run"


# ---- run


@pytest.mark.parametrize("method", some_of(METHODS, ("lora", "slora", "full")))
def test_run_prints_its_result_as_json(world: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world, method)))
    found = printed("run", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert (found["label"], found["rounds"], found["folder"]) == (method, 3, str(tmp_path / "run"))
    assert found["adapter"] in (str(tmp_path / "run" / "adapter"), str(tmp_path / "run" / "model"))
    rows = ledger(tmp_path / "run")
    assert sum(found["down_bytes"].values()) == sum(sum(row["down_bytes"].values()) for row in rows)


def test_run_shows_progress_on_stderr_alone(run_toml: Path, tmp_path: Path) -> None:
    result = invoke("run", run_toml, "--out", tmp_path / "run")
    assert "9 clients with 8 to 8 examples, 3 per round, 3 rounds on cpu" in result.stderr
    assert "round 3/3" in result.stderr
    assert "round 3/3" not in result.stdout
    assert "bytes down" in result.stdout


def test_run_without_out_names_the_folder_by_method_and_settings(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = printed("run", run_toml, "-s", "method.rounds=1")
    folder = Path("runs") / f"lora-{config.digest(config.load(run_toml, ['method.rounds=1']))}"
    assert found["folder"] == str(folder)
    assert (folder / "result.json").exists()


def test_run_on_a_run_folder_goes_on_with_it(run_folder: Path) -> None:
    before = contents(run_folder)
    found = printed("run", run_folder)
    assert found["rounds"] == 3
    assert contents(run_folder) == before


def test_overrides_reach_the_run(run_toml: Path, tmp_path: Path) -> None:
    invoke("run", run_toml, "--out", tmp_path / "run", "-s", "method.rank=2", "--set", "method.rounds=1")
    held = config.load(tmp_path / "run")
    assert (held.rounds, held.phases[0].recipe.tuning.rank) == (1, 2)  # type: ignore[union-attr]


def test_tensorboard_gets_what_the_ledger_has(run_toml: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    for _ in range(2):
        invoke("run", run_toml, "--out", tmp_path / "run", "--track", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows, total, expected = ledger(tmp_path / "run"), 0, []
    for row in rows:
        total += sum(row["up_bytes"].values())
        expected.append((row["round"], total))
    assert [(event.step, int(event.value)) for event in events.Scalars("bytes/up")] == expected


# ---- before a run


def test_show_lists_what_is_trained(run_toml: Path) -> None:
    found = printed("show", run_toml)
    assert found["config"] == config.resolved(config.load(run_toml))
    (phase,) = found["phases"]
    assert phase["trainable"] == {"adapter": 4 * (4 * 32 + 32 * 4), "head": 3 * 32 + 3}
    assert phase["tensors"]["bert.encoder.layer.0.attention.self.query.lora_A"] == [4, 32]
    assert len(phase["tensors"]) == 4 * 2 + 2
    assert (phase["needs"], phase["held_bytes"]) == ("sum", 4 * sum(phase["trainable"].values()))


def test_show_prints_what_differs_and_a_summary(run_toml: Path, tmp_path: Path) -> None:
    options = ("-s", "clients.per_round=10", "-s", "clients.num=20")
    said = invoke("show", run_toml, *options).stdout
    text, summary = said.split("phase 0: ")
    (tmp_path / "again.toml").write_text(text)
    assert config.load(tmp_path / "again.toml") == config.load(run_toml, options[1::2])
    # ten in a round is the default
    assert "num = 20" in text
    assert "per_round" not in text
    assert "lora, 3 rounds; 1,123 of " in " ".join(summary.split())
    assert "aggregation holds 0.0 MB on the server" in summary
    assert "10 tensors; --full lists them" in summary
    assert "bert.encoder" not in said
    assert tomllib.loads(text) == printed("show", run_toml, *options)["differs"]


def test_show_in_full_prints_every_setting_and_the_names(run_toml: Path, tmp_path: Path) -> None:
    said = invoke("show", run_toml, "--full").stdout
    (tmp_path / "again.toml").write_text(said.split("phase 0: ")[0])
    assert tomllib.loads((tmp_path / "again.toml").read_text()) == config.resolved(config.load(run_toml))
    assert "bert.encoder.layer.1.attention.self.value.lora_B  32 x 4" in said
    assert "numbers are trained" in " ".join(said.split())


def test_cost_prints_phases_and_totals(run_toml: Path) -> None:
    found = printed("cost", run_toml, "-s", "method={kind='slora', rounds=5, warm_rounds=2, rank=4}")
    assert [(phase["tuning"], phase["rounds"]) for phase in found["phases"]] == [("sparse_mask", 2), ("lora", 3)]
    assert found["up_bytes"] == sum(phase["round_up_bytes"] * phase["rounds"] for phase in found["phases"])


def test_cost_of_a_run_that_sends_nothing_is_nothing(run_toml: Path) -> None:
    found = printed("cost", run_toml, "-s", "mode='centralised'")
    assert (found["down_bytes"], found["up_bytes"]) == (0, 0)


def test_partition_prints_sizes_and_skew(run_toml: Path) -> None:
    found = printed("partition", run_toml)
    assert (found["num_clients"], found["num_examples"], found["min_size"]) == (9, 72, 8)


def test_partition_draws_a_bar_per_client(run_toml: Path) -> None:
    said = invoke("partition", run_toml).stdout
    bars = [line.split() for line in said.splitlines() if line.endswith(" 8")]
    assert [bar[0] for bar in bars] == list("012345678")
    assert all(len(bar[1]) == 55 and set(bar[1]) <= set("abc") for bar in bars)
    assert all(f"{letter} {name}" in said for letter, name in zip("abc", COLOURS, strict=True))


def test_partition_draws_a_page(run_toml: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    invoke("partition", run_toml, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in COLOURS)


def test_list_names_every_value_of_every_slot() -> None:
    assert printed("list") == {slot: list(values) for slot, values in SLOTS.items()}


@pytest.mark.parametrize("slot", SLOTS)
def test_list_describes_every_value_of_a_slot(slot: str) -> None:
    rows = printed("list", slot)
    assert [row["kind"] for row in rows] == list(SLOTS[slot])
    assert all(len(row["text"]) > 10 for row in rows)
    said = invoke("list", slot).stdout
    assert all(row["kind"] in said for row in rows)
    for row in rows:
        assert row["settings"] == ", ".join(one["name"] for one in row["arguments"])
        assert all(one["text"] and f" {one['name']} " in said for one in row["arguments"])


def test_env_names_versions() -> None:
    found = printed("env")
    assert set(found) >= {
        "fedlora",
        "torch",
        "transformers",
        "peft",
        "python",
        "cpus",
        "gpu",
        "embedded model",
        "cache",
    }


def test_new_prints_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(invoke("new", "flasc").stdout)
    assert config.load(tmp_path / "run.toml").label == "flasc"


def test_new_names_the_schema_that_schema_prints() -> None:
    first, second, *_ = invoke("new", "flasc").stdout.splitlines()
    assert first == "#:schema ./fedlora.schema.json"
    assert "fedlora schema > fedlora.schema.json" in second
    assert json.loads(invoke("schema").stdout)["properties"].keys() >= {"seed", "method", "phases"}


# ---- after a run


def test_compare_puts_runs_side_by_side(run_folder: Path, run_toml: Path, tmp_path: Path) -> None:
    invoke("run", run_toml, "--out", tmp_path / "seed", "-s", "seed=1")
    flasc = document(run_toml.parent, "flasc")
    (tmp_path / "flasc.toml").write_text(tomli_w.dumps(flasc))
    invoke("run", tmp_path / "flasc.toml", "--out", tmp_path / "flasc")
    rows = printed("compare", run_folder, tmp_path / "seed", tmp_path / "flasc")
    assert [(row["label"], row["seeds"]) for row in rows] == [("lora", [0, 1]), ("flasc", [0])]
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio"] > 2
    assert "flasc" in invoke("compare", run_folder, tmp_path / "flasc").stdout


def test_search_names_its_best_trial_as_it_is(run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.runs.search.search", lambda *given, **settings: [])
    said = invoke("search", run_toml, "--kilobytes", 60, "--out", "a [folder]").stdout
    assert "fedlora run a [folder]/best.toml" in said


def test_predict_gives_every_class_its_probability(run_folder: Path) -> None:
    (found,) = printed("predict", run_folder, "w1 red red")
    assert found.keys() == {"input", "answer"}
    assert found["input"] == "w1 red red"
    assert set(found["answer"]) == set(COLOURS)
    assert sum(found["answer"].values()) == pytest.approx(1)
    assert list(found["answer"].values()) == sorted(found["answer"].values(), reverse=True)


def test_a_run_is_loaded_exported_and_evaluated_by_names_of_folders_and_files(run_folder: Path, tmp_path: Path) -> None:
    trained = fedlora.load_run(str(run_folder))
    assert trained.predict(["w1 red red"]) == [one["answer"] for one in printed("predict", run_folder, "w1 red red")]
    assert trained.evaluate(str(run_folder.parent / "test.jsonl")).metrics["accuracy"] <= 1
    trained.export(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(run_folder / "adapter")


def test_predict_prints_the_likeliest_class_and_those_after_it(run_folder: Path) -> None:
    (found,) = printed("predict", run_folder, "w1 red red")
    said = invoke("predict", run_folder, "w1 red red").stdout
    (line,) = [line for line in said.splitlines() if "w1 red red" in line]
    ranked = [f"{name} {value:.3g}" for name, value in found["answer"].items()]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "w1 red red",
        *ranked[0].split(),
        ", ".join(ranked[1:]),
    ]


def test_predict_shows_an_answer_of_any_length(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = {"type": "city", "text": "Bern", "start": 0, "end": 4}
    answers = [{}, {"entities": [tag, tag]}, {"answer": "[bold]all[/bold]", "score": 0.5, "start": 3, "end": 5}]
    monkeypatch.setattr(TrainedRun, "predict", lambda self, inputs: answers[: len(inputs)])
    (run_folder.parent / "inputs").write_text("one\ntwo\nthree\n")
    assert [one["answer"] for one in printed("predict", run_folder, run_folder.parent / "inputs")] == answers
    said = invoke("predict", run_folder, run_folder.parent / "inputs").stdout
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if "│" in line]
    assert cells == [
        ["one", "", "", ""],
        ["two", "Bern (city), Bern (city)", "", ""],
        ["three", "[bold]all[/bold]", "", "score 0.5, start 3"],
    ]


PAIR = '["w1 red", "blue w2"]'


def test_predict_takes_pairs_as_json_where_the_run_was_on_pairs(run_toml: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", [{**row, "text_pair": "blue w2"} for row in make_rows(24, 0)])
    options = ("-s", f"data={{kind='files', train='{rows}'}}", "-s", "clients.num=3", "-s", "method.rounds=1")
    invoke("run", run_toml, "--out", tmp_path / "run", *options)
    (pair,) = printed("predict", tmp_path / "run", PAIR)
    (text,) = printed("predict", tmp_path / "run", "w1 red")
    assert pair["input"] == PAIR
    assert pair["answer"] != pytest.approx(text["answer"], abs=1e-4)
    assert len(printed("predict", tmp_path / "run", rows)) == 24


def test_a_single_text_may_look_like_a_pair(run_folder: Path, tmp_path: Path) -> None:
    (found,) = printed("predict", run_folder, PAIR)
    (plain,) = printed("predict", run_folder, "[! w1 red !! ! blue w2 !!")  # the same tokens
    assert found["answer"] == pytest.approx(plain["answer"], abs=1e-5)
    rows = write_rows(tmp_path / "pairs.jsonl", [{"text": "w1 red", "text_pair": "blue w2"}])
    with pytest.raises(DataError, match="was trained on single texts"):
        invoke("predict", run_folder, rows)


def test_evaluate_refuses_pairs_where_the_run_was_on_single_texts(run_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", [{**row, "text_pair": "blue w2"} for row in make_rows(9, 1)])
    with pytest.raises(DataError, match="was trained on single texts"):
        invoke("evaluate", run_folder, "--data", rows)


def test_predict_reads_a_file_of_texts(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("w1 red\n\nblue w2 w3 w4\n")
    found = printed("predict", run_folder, tmp_path / "texts")
    assert [one["input"] for one in found] == ["w1 red", "blue w2 w3 w4"]
    (alone,) = printed("predict", run_folder, "w1 red")
    assert found[0]["answer"] == pytest.approx(alone["answer"], abs=1e-5)


@pytest.mark.parametrize("text", ["see [/b] there", "[bold]red[/bold]", "x" * 5000])
def test_predict_takes_any_text_as_it_is(run_folder: Path, text: str) -> None:
    assert text[:20] in invoke("predict", run_folder, text).stdout


def test_evaluate_finds_what_the_run_found(run_folder: Path) -> None:
    found = printed("evaluate", run_folder, "--data", run_folder.parent / "test.jsonl")
    result = json.loads((run_folder / "result.json").read_text())
    assert found.pop("warnings") is not None
    assert found == pytest.approx(result["after"], abs=1e-5)


def test_evaluate_takes_other_columns_and_label_numbers(run_folder: Path, tmp_path: Path) -> None:
    rows = [{"body": row["text"], "class": COLOURS.index(row["label"])} for row in make_rows(24, 1)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = printed("evaluate", run_folder, "--data", file, "-c", "text=body", "--column", "label=class")
    assert found["accuracy"] == pytest.approx(json.loads((run_folder / "result.json").read_text())["after"]["accuracy"])


def test_predict_needs_neither_the_data_nor_the_cache(run_folder: Path, tmp_path: Path, world: Path) -> None:
    shutil.move(world / "train.jsonl", tmp_path / "train.jsonl")
    try:
        assert printed("predict", run_folder, "red")
    finally:
        shutil.move(tmp_path / "train.jsonl", world / "train.jsonl")


def test_export_says_where_it_wrote(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "[a] folder with a name that is much longer than a line of eighty characters can hold"
    assert invoke("export", run_folder, out).stdout == f"written to {out}\n"
    assert contents(out) == contents(run_folder / "adapter")


# ---- real processes


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['fedlora', '--help']\n"
        "from fedlora.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pydantic', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in (
        "run",
        "show",
        "cost",
        "list",
        "new",
        "partition",
        "compare",
        "export",
        "push",
        "predict",
        "evaluate",
        "env",
    ):
        assert f" {command} " in done.stdout
