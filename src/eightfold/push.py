"""Upload a checkpoint to the Hugging Face hub: private first, then tried from there, then public if that is asked."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of the HTTP library that the client uses)
)

from eightfold.calibration import windows as cut_windows
from eightfold.card import CARD
from eightfold.checkpoint import verify_files
from eightfold.files import read_json
from eightfold.folder import SINGLE
from eightfold.format import CheckpointError
from eightfold.gate import EVALUATION, LEAST_DISTINCT, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, generate
from eightfold.inspect import quantized_folder
from eightfold.verify import Advance, Phase, verify
from eightfold.workspace import MANIFEST

KEPT = ".gitattributes"  # the hub's own file


@dataclass(frozen=True, slots=True)
class Pushed:
    """`commit`: the upload's; `problems`: of the smoke test, none if it passed; `samples`: (prompt, continuation)."""

    repo: str
    url: str
    commit: str
    public: bool
    problems: list[str]
    samples: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        samples = [{"prompt": prompt, "continuation": text} for prompt, text in self.samples]
        return {
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "public": self.public,
            "problems": self.problems,
            "samples": samples,
        }


def check_whole(path: str | Path) -> list[str]:
    """The names of a checkpoint's files. Raises CheckpointError for what must not be uploaded: a working folder, a
    checkpoint that failed the gate, files that differ from the manifest."""
    path = Path(path)
    if path.resolve().parent.name.endswith(".partial"):
        raise CheckpointError(
            f"{path}: expected a finished checkpoint, this is a working folder: let quantize end first"
        )
    quantized_folder(path)
    if problems := verify_files(path):
        raise CheckpointError(f"{path}: expected a whole checkpoint: {problems[0]} ({len(problems)} problems in all)")
    if (path / EVALUATION).is_file() and not (verdict := read_json(path / EVALUATION))["passed"]:
        raise CheckpointError(f"{path}: expected a checkpoint that passed the gate: {'; '.join(verdict['reasons'])}")
    return sorted({*read_json(path / MANIFEST)["files"], MANIFEST})


def push(
    path: str | Path, repo: str, public: bool, device: torch.device, dtype: torch.dtype, told: tuple[Phase, Advance]
) -> Pushed:
    """Upload the checkpoint in `path` to `repo`, in one commit that leaves no other files there; download it into a
    folder that is thrown away, verify it, generate with it; make it public if `public` and if all of that went well.

    The repository is made, private; one that is public already is refused. Raises CheckpointError for a checkpoint that
    is not whole or has no card, ValueError for what the hub refuses. A failing smoke test is no exception: see
    `problems`.
    """
    files = [*check_whole(path), CARD]
    if not (Path(path) / CARD).is_file():
        raise CheckpointError(f"{path}: expected a model card, {CARD}: make it with eightfold card")
    phase, advance = told
    api = HfApi(library_name="eightfold")
    try:
        phase("uploading", 1)
        url, commit = _upload(api, Path(path), files, repo)
        advance(1)
        with tempfile.TemporaryDirectory(prefix=".eightfold-", dir=Path(path).resolve().parent) as folder:
            problems, samples = _try_out(api, (repo, commit), Path(folder), (device, dtype), told)
        if public and not problems:
            api.update_repo_settings(repo, private=False)
    except (HTTPError, HFValidationError) as error:  # HTTPError: no answer, too
        raise ValueError(f"{repo}: the hub refused: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        # That is how the client says that the upload of a large file failed; others are not ours.
        if not isinstance(error.__cause__, HTTPError | OSError):
            raise
        reason = " ".join(f"{error} {error.__cause__}".split())
        raise ValueError(f"{repo}: the hub refused: {reason}") from error
    return Pushed(repo, url, commit, public and not problems, problems, samples)


def _try_out(
    api: HfApi,
    upload: tuple[str, str],
    folder: Path,
    place: tuple[torch.device, torch.dtype],
    told: tuple[Phase, Advance],
) -> tuple[list[str], list[tuple[str, str]]]:
    """The smoke test of a (repository, commit), downloaded into `folder`; what goes wrong on the way is a problem."""
    (repo, commit), (phase, advance) = upload, told
    try:
        phase("downloading", 1)
        copy = Path(api.snapshot_download(repo, revision=commit, local_dir=folder / Path(repo).name))
        advance(1)
        return smoke_test(copy, *place, phase, advance)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        return [f"it cannot be tried out: {' '.join(str(error).split())}"], []


def smoke_test(
    path: Path, device: torch.device, dtype: torch.dtype, phase: Phase, advance: Advance
) -> tuple[list[str], list[tuple[str, str]]]:
    """What is wrong with a downloaded checkpoint, and what it generates: hashes, tensors, loading, generation."""
    from transformers import AutoTokenizer

    problems = verify(path, None, phase, advance).problems
    if problems:
        return problems, []
    phase("generating", 1)
    windows = cut_windows(None, AutoTokenizer.from_pretrained(path), PROMPT_TOKENS, PROMPTS)
    samples, distinct = generate(path, windows, device, dtype)
    advance(1)
    if distinct < LEAST_DISTINCT:
        return [f"it generates the same token over and over ({distinct} different ones in {NEW_TOKENS})"], samples
    return [], samples


def _upload(api: HfApi, path: Path, files: list[str], repo: str) -> tuple[str, str]:
    """URL of the repository and the commit."""
    url = api.create_repo(repo, private=True, exist_ok=True)
    if not api.model_info(repo).private:
        raise ValueError(
            f"{repo}: expected a private repository or none, it is public: a copy is tried out before it is shown; "
            f"make it private, or give another name"
        )
    there = [name for name in api.list_repo_files(repo) if name not in (*files, KEPT)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path / name) for name in files
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in there]
    message = f"Upload by eightfold: {SINGLE if SINGLE in files else 'shards'}, {len(files)} files"
    commit = api.create_commit(repo, operations, commit_message=message)
    return str(url), commit.oid
