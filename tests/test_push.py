"""Model cards, and uploads through the real client to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import TOKEN, FakeHub, Repo
from huggingface_hub import ModelCard, constants
from models import write_model
from small import Silent, files_of, small_request

from eightfold import cli
from eightfold.card import CARD, model_card
from eightfold.gate import EVALUATION
from eightfold.pipeline import quantize_model
from eightfold.preflight import make_plan
from eightfold.workspace import MANIFEST, partial_path

# The client of huggingface_hub 2.4 calls its own HTTP library in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

BASE_CARD = """---
license: llama3.2
license_name: community
license_link: https://example.org/licence
language: [en, de]
tags: [llama]
model-index: []
---
# The original
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original with a card."""
    folder = write_model("llama-tied", tmp_path_factory.mktemp("base") / "Llama-tiny")
    (folder / CARD).write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as quantize makes it. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "tiny-2bit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))
        return quantize_model(make_plan(small_request(base, out, exclude=("*.mlp.*",))), Silent()).path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    return shutil.copytree(made, tmp_path / "tiny-2bit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the client talks to, by plain LFS, as the user with the token."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    huggingface_hub.close_session()
    fake.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON object, standard error of a command."""
    status = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


# --- what the gate found --------------------------------------------------------------------------------------------


def test_the_gate_leaves_what_it_found(made: Path) -> None:
    found = json.loads((made / EVALUATION).read_text())
    assert found["passed"] is True
    assert found["seqlen"] == 32
    assert found["text"]["source"] == "text.txt"
    assert found["evaluation"]["windows"] == 2
    assert found["evaluation"]["kl"] > 0
    assert EVALUATION in json.loads((made / MANIFEST).read_text())["files"]


# --- cards ----------------------------------------------------------------------------------------------------------


def test_a_card(made: Path, base: Path) -> None:
    text = model_card(made, str(base), repo="me/tiny-2bit")
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "llama3.2"
    assert data["license_name"] == "community"
    assert data["license_link"] == "https://example.org/licence"
    assert data["language"] == ["en", "de"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"eightfold", "quantized", "2-bit"} == set(data["tags"])
    assert "base_model" not in data  # a folder of this machine is no model of the hub
    assert "model-index" not in data
    found = json.loads((made / EVALUATION).read_text())["evaluation"]
    for words in (
        "# tiny-2bit",
        "Llama-tiny, quantized by eightfold",
        f"| KL divergence from the original, nats a token | {found['kl']:.4f} ± {found['kl_se']:.4f} |",
        "**stored bits** per original weight",
        "8 (8 at 2 bits)",
        'from_pretrained("me/tiny-2bit"',
        "vllm serve me/tiny-2bit",
        "| base sha256 | ",
    ):
        assert words in text, words
    assert model_card(made, str(base), repo="me/tiny-2bit") == text


def test_a_card_needs_a_licence(made: Path, model_folder, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Llama-tiny: expected a card .* says its licence.* give --base MODEL or --lic"
    ):
        model_card(made)
    with pytest.raises(ValueError, match="says its licence"):
        model_card(made, str(model_folder("llama-tied")))
    data = ModelCard(model_card(made, license="mit")).data.to_dict()
    assert data["license"] == "mit"


def test_another_licence_takes_the_place_of_all_of_the_original_s(made: Path, base: Path) -> None:
    data = ModelCard(model_card(made, str(base), "apache-2.0")).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert "license_name" not in data


def test_the_card_of_a_base_on_the_hub(made: Path, hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repos["org/base"] = Repo(False, {"1" * 40: {CARD: BASE_CARD.encode()}})
    hub.repos["org/bare"] = Repo(False, {"1" * 40: {"config.json": b"{}"}})
    data = ModelCard(model_card(made, "org/base")).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "quantized", "llama3.2")
    with pytest.raises(ValueError, match="org/bare: expected a card of the original"):
        model_card(made, "org/bare")
    with pytest.raises(ValueError, match=r"org/none: .*give --license ID"):
        model_card(made, "org/none")


def test_card_command(copy: Path, base: Path, capsys) -> None:
    before = files_of(copy)
    status, content, _ = run(capsys, "card", copy, "--base", base)
    assert status == 0
    assert (copy / CARD).read_text() == content["card"]
    assert content["path"] == str(copy / CARD)
    assert {name: data for name, data in files_of(copy).items() if name != CARD} == before
    assert run(capsys, "verify", copy)[0] == 0  # a card is nobody's damage
    assert run(capsys, "card", base)[0] == 1


# --- uploads --------------------------------------------------------------------------------------------------------


def test_push(copy: Path, base: Path, hub: FakeHub, capsys) -> None:
    """Private, tried, public; then once more, over what lay there."""
    status, content, err = run(capsys, "push", copy, "me/tiny", "--base", base, "--public")
    assert status == 0, err
    repo = hub.repos["me/tiny"]
    assert repo.history == ["created private", f"{len(files_of(copy))} files, private", "made public"]
    assert repo.files == files_of(copy)
    assert content["public"] is True
    assert content["commit"] == repo.head
    assert len(content["samples"]) == 3
    assert any(line.startswith("PUT /lfs/") for line in hub.requests)
    assert f"GET /me/tiny/resolve/{repo.head}/model.safetensors" in hub.requests
    assert hub.requests.index("PUT /api/models/me/tiny/settings") > hub.requests.index(
        f"GET /me/tiny/resolve/{repo.head}/model.safetensors"
    )

    status, content, err = run(capsys, "push", copy, "me/tiny")
    assert status == 1
    assert "me/tiny: expected a private repository or none, it is public" in err
    repo.private = True
    repo.commits["2" * 40] = repo.files | {"model-00001-of-00002.safetensors": b"old", ".gitattributes": b"hub's"}
    status, content, err = run(capsys, "push", copy, "me/tiny")
    assert status == 0, err
    assert repo.files == files_of(copy) | {".gitattributes": b"hub's"}
    assert content["public"] is False
    assert repo.private


def test_a_failing_smoke_test_leaves_it_private(copy: Path, base: Path, hub: FakeHub, capsys) -> None:
    hub.damage = "model.safetensors"
    status, content, err = run(capsys, "push", copy, "me/tiny", "--base", base, "--public")
    assert status == 1
    assert "me/tiny: the smoke test failed, the repository stays private: model.safetensors: expected" in err
    assert hub.repos["me/tiny"].private
    assert "made public" not in hub.repos["me/tiny"].history
    assert content["public"] is False
    assert content["problems"]


def test_an_upload_that_cannot_be_downloaded_stays_private(copy: Path, base: Path, hub: FakeHub, capsys) -> None:
    hub.lost = "config.json"
    status, _, err = run(capsys, "push", copy, "me/tiny", "--base", base, "--public")
    assert status == 1
    assert "the smoke test failed, the repository stays private: it cannot be tried out: " in err
    assert hub.repos["me/tiny"].private
    assert sorted(path.name for path in copy.parent.iterdir()) == ["tiny-2bit"]


def test_a_model_that_repeats_itself_fails_the_smoke_test(copy: Path, base: Path, hub: FakeHub, capsys, monkeypatch):
    monkeypatch.setattr("eightfold.push.generate", lambda *_: ([("a", "b b b")], 1))
    status, _, err = run(capsys, "push", copy, "me/tiny", "--base", base, "--public")
    assert status == 1
    assert "generates the same token over and over" in err
    assert hub.repos["me/tiny"].private


def _cut(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _fail_gate(copy: Path) -> None:
    content = json.loads((copy / EVALUATION).read_text())
    (copy / EVALUATION).write_text(json.dumps(content | {"passed": False, "reasons": ["perplexity is 9 times"]}))
    from eightfold.files import measure

    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][EVALUATION] = measure(copy / EVALUATION)
    (copy / MANIFEST).write_text(json.dumps(manifest))


def _move_into_a_working_folder(copy: Path) -> None:
    partial = partial_path(copy)
    partial.mkdir()
    copy.rename(partial / "out")
    copy.symlink_to(partial / "out")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_cut, "not a whole safetensors file"),
        (lambda copy: (copy / "tokenizer.json").unlink(), "tokenizer.json: listed in eightfold.json, there is no such"),
        (lambda copy: (copy / MANIFEST).unlink(), "it has no eightfold.json"),
        (lambda copy: (copy / "config.json").unlink(), "it has no config.json"),
        (_fail_gate, "expected a checkpoint that passed the gate: perplexity is 9 times"),
        (_move_into_a_working_folder, "expected a finished checkpoint, this is a working folder"),
    ],
)
def test_what_is_not_whole_is_not_uploaded(spoil, sentence: str, copy: Path, base: Path, hub: FakeHub, capsys) -> None:
    spoil(copy)
    status, content, err = run(capsys, "push", copy, "me/tiny", "--base", base)
    assert status == 1
    assert sentence in err
    assert content["error"] in err
    assert not hub.requests
    assert not (copy / CARD).exists()


def test_what_the_hub_refuses(copy: Path, base: Path, hub: FakeHub, capsys, monkeypatch) -> None:
    hub.refuse_commits = True  # after the files
    status, _, err = run(capsys, "push", copy, "me/tiny", "--base", base)
    assert status == 1
    assert "me/tiny: the hub refused: " in err
    assert "over your storage" in err
    assert hub.repos["me/tiny"].private
    hub.refuse_files = True
    hub.blobs.clear()
    status, _, err = run(capsys, "push", copy, "me/tiny", "--base", base)
    assert status == 1
    assert "the hub refused: Error while uploading 'model.safetensors' to the Hub. " in err
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    status, _, err = run(capsys, "push", copy, "me/other", "--base", base)
    assert status == 1
    assert "the hub refused: Client error '401 Unauthorized'" in err
    status, _, err = run(capsys, "push", copy, "a/b/c", "--base", base)
    assert status == 1
    assert "the hub refused: Repo id must" in err
