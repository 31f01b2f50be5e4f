"""Upload of what a finished run exported to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.digests import damaged
from fedlora.core.errors import ConfigError, DataError, first_line
from fedlora.core.later import huggingface_hub
from fedlora.runs.folder import RunFolder

TOKEN = "HF_TOKEN"
"""The environment variable with the access token, which is read from nowhere else."""


@dataclass(frozen=True)
class Upload:
    """What is uploaded of a run.

    Args:
        folder: its folder ``adapter`` or ``model``.
        sizes: the bytes of each file, by its path in the folder.
        title: what the run is, for the message of the commit.
    """

    folder: Path
    sizes: dict[str, int]
    title: str


def push(run: Path | str, name: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads the adapter or model of a finished run to the Hugging Face Hub, as one commit.

    The files are those of ``RUN/adapter`` or ``RUN/model`` and no others. The access token is the environment variable
    ``HF_TOKEN``; the address of the Hub is ``HF_ENDPOINT``, if set.

    Args:
        run: the run's folder.
        name: the repository, ``owner/name``; created if it does not exist.
        private: create it as a private one; an existing public one is refused.
        revision: the branch, created if it does not exist; ``main`` if None.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the run is unfinished or damaged, exported nothing, or there is no token.
        DataError: the upload failed.
    """
    return send(to_upload(run), name, private, revision)


def to_upload(run: Path | str) -> Upload:
    """What ``push`` uploads of a run.

    Raises:
        ConfigError: the run is unfinished or damaged, or exported nothing.
    """
    run = Path(run)
    result = RunFolder(run).read_json("result.json")
    if result["adapter"] is None:
        raise ConfigError(
            f"in {run} clients trained alone, and each has a model of its own: push one of {run / 'clients'}/N"
        )
    folder = run / str(result["adapter"])
    wrong = damaged(folder) if folder.is_dir() else "."
    if wrong:
        raise ConfigError(
            f"{folder / wrong} is missing or differs from what was written: write it again with: fedlora run {run}"
        )
    _check_base(folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Upload(folder, dict(sorted(sizes.items())), f"{result['label']}, {result['rounds']} rounds of fedlora")


def send(upload: Upload, name: str, private: bool, revision: str | None) -> str:
    """Uploads files as ``push`` does.

    Raises:
        ConfigError: there is no token, or the repository is public and should be private.
        DataError: the upload failed.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"the environment variable {TOKEN} holds no access token, which an upload needs: create one with the right "
            f"to write at https://huggingface.co/settings/tokens and export it as {TOKEN}"
        )
    try:
        return _commit(huggingface_hub.HfApi(token=token), upload, name, private, revision)
    except ConfigError:
        raise
    except Exception as error:  # the client and its transport raise exceptions of many kinds
        raise DataError(
            f"the upload to {name} failed ({first_line(error).replace(token, TOKEN)}); nothing of it is in the "
            f"repository: check the name, the rights of {TOKEN} and the connection, and run the same command again"
        ) from error


def _commit(hub: huggingface_hub.HfApi, upload: Upload, name: str, private: bool, revision: str | None) -> str:
    # None leaves the choice to the settings of the owner
    name = hub.create_repo(name, private=private or None, exist_ok=True).repo_id
    if private and not hub.model_info(name).private:
        raise ConfigError(
            f"the repository {name} exists and is public, but --private was asked for: make it private in its settings "
            "on the Hub, or choose another name"
        )
    if revision is not None:
        hub.create_branch(name, branch=revision, exist_ok=True)
    files = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=upload.folder / path)
        for path in upload.sizes
    ]
    # one commit: a reader of the repository sees all files or none
    return str(hub.create_commit(name, files, commit_message=upload.title, revision=revision).commit_url)


def _check_base(folder: Path) -> None:
    """Refuses an adapter of an older version, which names its base by a path of this machine."""
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base and os.path.isabs(str(base)):
        raise ConfigError(
            f"{file} was written by an older version and names the base model by a path of this machine: remove "
            f"{folder} and run: fedlora run {folder.parent}"
        )
