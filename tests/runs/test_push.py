"""Uploads of finished runs, to a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from fixtures.hub import COMMIT, TOKEN, StandIn, stand_in
from fixtures.tiny import COLOURS, contents, experiment, tiny_world
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora.core.errors import ConfigError, DataError
from fedlora.runs.push import to_upload

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    fedlora.run(experiment(world, "lora", rounds=2), world / "run")
    return world / "run"


def pushed(hub: StandIn, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as the address of the Hub is read once."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    # large files by git-lfs: the stand-in does not speak the protocol of Xet
    environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "fedlora", "push", *words, "--debug"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_files_of_the_adapter_arrive_in_one_commit_and_load_with_peft(world: Path, run: Path) -> None:
    with stand_in() as hub:
        done = pushed(hub, str(run), "me/colours", "--private", "--revision", "trial")
        assert done.returncode == 0, done.stderr
    ((name, branch, files),) = hub.commits
    assert (name, branch, hub.branches, hub.private) == ("me/colours", "trial", ["trial"], {"me/colours": True})
    assert files == contents(run / "adapter")
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    for path, raw in files.items():
        assert f"{len(raw):>15,}  {path}\n" in done.stdout
    assert f"{run / 'adapter'} -> me/colours (branch trial), private\n" in done.stdout
    assert f"uploaded as {hub.url}/me/colours/commit/{COMMIT}\n" in done.stdout
    fetched = world / "fetched"
    for path, raw in files.items():
        (fetched / path).parent.mkdir(parents=True, exist_ok=True)
        (fetched / path).write_bytes(raw)
    names = {int(number): label for number, label in json.loads((fetched / "id2label.json").read_text()).items()}
    assert names == dict(enumerate(COLOURS))
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", id2label=names)
    model = PeftModel.from_pretrained(base, str(fetched)).eval()
    batch = AutoTokenizer.from_pretrained(fetched)("red w1 w2", return_tensors="pt")
    with torch.no_grad():
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(1)[0]
    (ours,) = fedlora.load_run(run).predict(["red w1 w2"])
    torch.testing.assert_close(found, torch.tensor([ours[names[n]] for n in range(3)]), atol=1e-4, rtol=0)


def test_a_refused_token_is_reported_without_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub_client = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_another_secret")
    with stand_in() as hub:
        monkeypatch.setattr(hub_client.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_client.constants, "HF_HUB_DISABLE_XET", True)
        with pytest.raises(DataError, match=r"the upload to me/colours failed \(") as failed:
            fedlora.push(run, "me/colours")
    assert hub.commits == []
    said = "".join([*traceback.format_exception(failed.value), *capfd.readouterr()])  # as --debug prints it
    assert "the upload to me/colours failed (" in said
    assert "hf_another_secret" not in said


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_an_existing_public_repository_takes_no_private_upload(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_client = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with stand_in() as hub:
        hub.private["me/colours"] = False
        monkeypatch.setattr(hub_client.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_client.constants, "HF_HUB_DISABLE_XET", True)
        with pytest.raises(ConfigError, match="me/colours exists and is public, but --private was asked for"):
            fedlora.push(run, "me/colours", private=True)
        assert hub.commits == []
        assert fedlora.push(run, "me/colours") == f"{hub.url}/me/colours/commit/{COMMIT}"
    assert hub.commits[0][2] == contents(run / "adapter")


def test_an_upload_that_fails_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(DataError, match=r"the upload to not a/name failed \(.*the rights of HF_TOKEN"):
        fedlora.push(run, "not a/name")


@pytest.mark.parametrize("token", ["", "two words", "gehe\u00edm"])
def test_without_a_token_nothing_is_sent(run: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match="the environment variable HF_TOKEN holds no access token"):
        fedlora.push(run, "me/colours")


def test_an_unfinished_or_damaged_run_is_refused(world: Path, run: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "lora", rounds=2), tmp_path / "half", until=1)
    with pytest.raises(ConfigError, match=r"it has no result\.json yet; finish it with: fedlora run"):
        to_upload(tmp_path / "half")
    with pytest.raises(ConfigError, match="there is no such folder"):
        to_upload(tmp_path / "none")
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ConfigError, match=f"{file} is missing or differs .*: write it again with: fedlora run"):
        to_upload(tmp_path / "run")
    shutil.rmtree(file.parent)
    with pytest.raises(ConfigError, match="is missing or differs"):
        to_upload(tmp_path / "run")


def test_a_card_may_be_edited_before_the_upload(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert to_upload(tmp_path / "run").sizes["README.md"] == 25


def test_the_adapter_of_an_older_version_is_written_anew_first(world: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    new = (adapter / "adapter_config.json").read_bytes()
    old = {**json.loads(new), "base_model_name_or_path": str(world / "bert")}
    (adapter / "adapter_config.json").write_text(json.dumps(old))
    (adapter / "digests.json").unlink()
    with pytest.raises(ConfigError, match=r"names the base model by a path of this machine: remove .* and run: fedl"):
        to_upload(tmp_path / "run")
    shutil.rmtree(adapter)
    fedlora.run(experiment(world, "lora", rounds=2), tmp_path / "run")
    assert (adapter / "adapter_config.json").read_bytes() == new
    assert to_upload(tmp_path / "run").folder == adapter


def test_clients_trained_alone_have_no_common_adapter(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "lora", "mode=local", "num_local=1", rounds=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="clients trained alone, and each has a model of its own"):
        to_upload(tmp_path / "run")
    (client,) = (tmp_path / "run" / "clients").iterdir()
    upload = to_upload(client)
    assert "adapter_model.safetensors" in upload.sizes
    assert "not the result of a federation" in (upload.folder / "README.md").read_text()
