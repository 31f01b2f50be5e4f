"""What a user can get wrong: one clear sentence on stderr, exit code 2, nothing lost, no traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from fixtures.tiny import contents, document, make_rows, save_model, tiny_world, write_rows

from fedlora.cli import main as cli
from fedlora.core.errors import ConfigError, first_line
from fedlora.show import describe

world = pytest.fixture(scope="module")(tiny_world)

NATURAL = "clients.partition={kind='natural', column='user'}"
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "key": (
        ("clients.per_ronud=3",),
        "unknown key 'clients.per_ronud', did you mean 'per_round'; known here: partition, num, per_round, "
        "sampling, test_clients, allow_empty",
    ),
    "key of a component": (
        ("method.local.optimizer.lrr=1",),
        "unknown key 'method.local.optimizer.lrr', did you mean 'lr'; known here: kind, lr, beta1",
    ),
    "key of a slot's value": (
        ("clients.alpha=1",),
        "unknown key 'clients.alpha', did you mean 'partition.alpha'; known",
    ),
    "argument of a method": (("method.rnk=3",), "unknown key 'method.rnk', did you mean 'rank'"),
    "table": (
        ("clinets.num=3",),
        "unknown key 'clinets.num', did you mean 'clients.num'; known here: label, seed, mode",
    ),
    "method": (("method.kind='flask'",), "there is no method 'flask', did you mean 'flasc'; known: fedavg, lora"),
    "kind": (("clients.partition.kind='irichlet'",), "did you mean 'dirichlet'; known: iid, pooled, dirichlet"),
    "no kind": (("data={path='x'}",), "data needs a kind, one of: docstrings, docstring_questions, files, hub"),
    "no kind of task": (("task={max_length=8}",), "task needs a kind, one of: "),
    "no field": (("data={kind='files'}",), "data.train is missing"),
    "type": (("clients.num='many'",), "clients.num = 'many': input should be a valid integer"),
    "range": (("method.rounds=0",), "method.rounds = 0: input should be greater than or equal to 1"),
    "no override": (("rounds",), "-s 'rounds' is not of the form key.key=value"),
    "override of a value": (("label.x=3",), "'label' is a value, not a table"),
    "phases and method": (("phases=[]",), "either [method] or [[phases]], not both"),
    "rank": (
        ("method.rank=33", "method.tuning.strict_rank=true"),
        "rank = 33 is above the smaller side of bert.encoder.layer.0",
    ),
    "targets": (("method.targets='nothing'",), "targets = 'nothing' matches nothing in BertForSequenceClassification"),
    "pattern": (("method.targets='('",), "is not a regular expression"),
    "padding": (
        ("task={kind='text_classification', pad_to=16}",),
        "task.pad_to = 16 has no room for texts of up to max_length = 128 tokens",
    ),
    "model": (("model.path='no/such/model'",), "the model 'no/such/model' cannot be loaded"),
    "file": (("data.train='trian.jsonl'",), "there is no file 'trian.jsonl'"),
    "column": (("data.columns.text='body'",), "the training rows have no column 'body', only text, label, user: "),
    "near column": (("data.columns={text='txt'}",), "no column 'txt', only text, label, user: did you mean 'text'?"),
    "column twice": (("data.columns={text='user', label='user'}",), "names one column twice, but each has its own use"),
    "column over another": (("data.columns.text='user'",), "column 'user' is to become 'text', but the training rows"),
    "key of the old version": (("data.text='body'",), "unknown key 'data.text'"),
    "column of clients": (
        ("clients.partition={kind='natural', column='usr'}",),
        "rows have no column 'usr', only text, user, label: did you mean 'user'?",
    ),
    "lists": (
        ("task={kind='text_classification', problem='multi'}",),
        "column 'label' of the training rows holds no lists",
    ),
    "numbers": (
        ("task={kind='text_classification', problem='regression'}",),
        'is not all finite numbers, which problem = "regression" needs',
    ),
    "precision": (("model.load='8bit'",), "model.load = '8bit' needs the package bitsandbytes"),
    "kernel": (
        ("model.attention='flash_attention_2'",),
        "cannot be loaded as asked (the package for FlashAttention2 ",
    ),
    "users in both splits": ((NATURAL, "data.test={root}/train.jsonl"), "are in both the training and the test data"),
    "clients": (("clients.num=1000",), "1000 clients were asked for, but there are only 72 rows"),
    "cohort": (("clients.per_round=10",), "clients.per_round = 10 exceeds the 9 clients there are"),
    "empty clients": (
        ("clients.num=70", "clients.partition={kind='dirichlet', alpha=1.0}"),
        "of 70 clients got no rows, but each needs one at least",
    ),
    "one class": (("data.train={root}/single.jsonl", "data.test={root}/single.jsonl"), "all rows have the class 'red'"),
    "no rows": (("data.train={root}/empty.jsonl",), "is empty, but rows were to be read from it"),
    "not finite": (
        ("method.local.optimizer={kind='sgd', lr=1e30}",),
        "lower local.optimizer.lr, or set local.clip_norm",
    ),
    "warm rounds": (("method={kind='slora', rounds=2, warm_rounds=2}",), "leaves no round for LoRA"),
}


def fedlora(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of ``fedlora ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


@pytest.fixture(scope="module")
def run_toml(world: Path) -> Path:
    write_rows(world / "single.jsonl", [row for row in make_rows(60, 0) if row["label"] == "red"])
    write_rows(world / "empty.jsonl", [])
    file = world / "run.toml"
    file.write_text(tomli_w.dumps(document(world)))
    return file


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error, which is the last thing said."""
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert line.startswith("error: ")
    assert captured.err.count("error: ") == 1
    return line


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    overrides, expected = CASES[case]
    options = [word for one in overrides for word in ("-s", one.replace("{root}", str(run_toml.parent)))]
    assert fedlora(monkeypatch, "run", run_toml, "--out", tmp_path / "run", *options) == 2
    assert expected in sentence(capsys)
    # one that fails in training has its first evaluation on record
    assert (tmp_path / "run").exists() == (case == "not finite")


def test_losses_that_are_not_finite_leave_the_checkpoint_of_the_round_before(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("-s", "method.local.optimizer={kind='sgd', lr=1e30}", "-s", "method.local.max_steps=1")
    assert fedlora(monkeypatch, "run", run_toml, "--out", tmp_path / "run", *options) == 2
    assert "lower" in sentence(capsys)
    assert (tmp_path / "run" / "ledger.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "`fedlora new flasc > run.toml` writes one to start from"),
        (b"seed = = 3", "is not TOML"),
        (b"\xff\xfe", "save it as UTF-8"),
        (b'[data]\ntrain = "C:\\Users\\me\\t.csv"', r"write 'C:\Users\me\t.csv' in single quotes, or /"),
        (b"seed = " + b"[" * 50_000, "is not TOML that can be read"),
    ],
    ids=["missing", "not TOML", "not text", "backslashes", "too deep"],
)
def test_a_file_that_is_no_configuration(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: bytes | None,
    expected: str,
) -> None:
    if text is not None:
        (tmp_path / "run.toml").write_bytes(text)
    assert fedlora(monkeypatch, "show", tmp_path / "run.toml") == 2
    assert expected in sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "{tmp}"), "is a folder without config.toml"),
        (("run", "{toml}", "--out", "{toml}"), "is a file, not a folder"),
        (("run", "{toml}", "--out", "{tmp}"), "is not empty and holds no run"),
        (("run", "{toml}", "--out", "{tmp}/run", "--track", "paper"), "there is no tracker 'paper'"),
        (("compare", "{tmp}"), "is not the folder of a finished run"),
        (("predict", "{tmp}", "red"), "is not a run's folder"),
        (("evaluate", "{tmp}", "--data", "{toml}"), "is not a run's folder"),
        (("evaluate", "{tmp}", "--data", "{toml}", "-c", "text"), "--column 'text' is not of the form use=name"),
        (("predict", "{tmp}", "red", "-c", "=body"), "--column '=body' is not of the form use=name"),
        (("export", "{tmp}", "{tmp}/out"), "is not a run's folder"),
        (("push", "{tmp}", "owner/name"), "is not the folder of a finished run"),
        (("list", "flavour"), "there is no slot 'flavour'; there are: method, tuning"),
        (("new", "flask"), "there is no method 'flask', did you mean 'flasc'"),
        (("partition", "{toml}", "--html", "{tmp}/no/where.html"), "cannot be written"),
        (("show", "{toml}", "-s", "data.rows.3=1"), "unknown key 'data.rows'"),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else "",
)
def test_commands_say_what_is_wrong_with_their_arguments(
    run_toml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    (tmp_path / "other.txt").touch()
    filled = [word.replace("{toml}", str(run_toml)).replace("{tmp}", str(tmp_path)) for word in arguments]
    before = contents(tmp_path)
    assert fedlora(monkeypatch, *filled) == 2
    assert expected in sentence(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [("run", "{toml}", "--report"), ("study", "{toml}", "--figures", "drawn")])
def test_figures_that_cannot_be_drawn_are_refused_before_anything_is_trained(
    run_toml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    filled = [word.replace("{toml}", str(run_toml)) for word in arguments]
    assert fedlora(monkeypatch, *filled, "--out", tmp_path / "run") == 2
    assert "figures need matplotlib: pip install" in sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("assignment", ["phases.7.rounds=3", "phases.first.rounds=3", "phases.rounds=3"])
def test_an_override_that_misses_a_list_says_how_long_it_is(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], assignment: str
) -> None:
    (tmp_path / "config.toml").write_text("[[phases]]\nrounds = 1\n")
    assert fedlora(monkeypatch, "show", tmp_path, "-s", assignment) == 2
    assert "should be the number of one of the 1 entries there" in sentence(capsys)


def test_a_model_folder_without_weights(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    assert fedlora(monkeypatch, "run", run_toml, "--out", tmp_path / "run", "-s", f"model.path={folder}") == 2
    assert "should be a folder with config.json and model.safetensors" in sentence(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedlora(monkeypatch, "run", run_toml, "--out", tmp_path / "run", "-s", "device=cuda") == 2
    assert "sees no GPU; use 'cpu' or 'auto'" in sentence(capsys)


def test_a_full_disk_is_no_fault_of_ours_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "x.key")

    monkeypatch.setattr(describe, "environment", full)
    assert fedlora(monkeypatch, "env") == 2
    assert "x.key cannot be written (No space left on device); make room, or choose another" in sentence(capsys)


@pytest.mark.parametrize("place", ["config", "checkpoints"])
def test_a_folder_that_cannot_be_read_is_no_fault_of_ours(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Rights as they are for a user who is not root."""
    (tmp_path / "config.toml").touch()
    (tmp_path / "checkpoints").mkdir()

    def refuse(self: Path, *how: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    if place == "config":
        monkeypatch.setattr(Path, "exists", refuse)
        assert fedlora(monkeypatch, "show", tmp_path / "run.toml") == 2
    else:
        monkeypatch.setattr(os, "listdir", refuse)
        monkeypatch.setattr(os, "scandir", refuse)
        assert fedlora(monkeypatch, "predict", tmp_path, "red") == 2
    assert "cannot be accessed (Permission denied); correct its rights" in sentence(capsys)


@pytest.mark.parametrize(
    "arguments",
    [("--log-file", "~nobody-of-this-name/x", "env"), ("show", "{toml}", "-s", "model.path=~nobody-of-this-name/x")],
    ids=["log", "model"],
)
def test_a_home_that_is_not_there_is_no_fault_of_ours(
    run_toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert fedlora(monkeypatch, *(word.replace("{toml}", str(run_toml)) for word in arguments)) == 2
    assert "write the whole path, or set HOME" in sentence(capsys)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()]
)
def test_memory_that_runs_out_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full() -> None:
        raise error

    monkeypatch.setattr(describe, "environment", full)
    assert fedlora(monkeypatch, "env") == 2
    assert f"memory ran out ({first_line(error)}): lower method.local.batch_size" in sentence(capsys)


def test_a_fault_of_ours_exits_with_1_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise KeyError("gone")

    monkeypatch.setattr(describe, "environment", broken)
    assert fedlora(monkeypatch, "env") == 1
    said = capsys.readouterr().err
    assert "because of a bug in fedlora (KeyError: 'gone'); run the command again with --debug" in said
    assert "Traceback" not in said


FAILING = """
from dataclasses import dataclass
from fedlora.parts import Partition

@dataclass(frozen=True)
class Fails(Partition):
    def split(self, labels, column, num_clients, rng):
        return {}["gone"]
"""


def test_a_class_of_the_users_own_that_fails_is_no_fault_of_ours(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_parts.py").write_text(FAILING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = ("-s", "clients.partition={kind='failing_parts:Fails'}")
    assert fedlora(monkeypatch, "partition", str(run_toml), *own) == 2
    assert "failing_parts.py, line 8, failed (KeyError: 'gone'); correct this class of your own" in sentence(capsys)


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedlora", "show", str(tmp_path / "none.toml"), "--debug"])
    with pytest.raises(ConfigError, match="there is no file"):
        cli.main()
