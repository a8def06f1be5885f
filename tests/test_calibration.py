from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from eightfold import bundled
from eightfold.calibration import load_texts, token_stream, tokens, windows


class Letters:
    """A tokenizer of one token a character, with or without a beginning of text."""

    eos_token_id = 1

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True):
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": begin + [ord(c) for c in text]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.tiny_lm())


@pytest.fixture
def alphabet(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(map(chr, range(1000, 1100))), encoding="utf-8")
    return file


def test_texts_of_every_kind(tmp_path):
    (tmp_path / "b.txt").write_text("plain", encoding="utf-8")
    lines = '{"text": "one"}\n\n{"text": "two\u2028x", "id": 3}\n'
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.md").write_text("not taken", encoding="utf-8")
    assert load_texts(tmp_path / "b.txt") == ["plain"]
    assert load_texts(tmp_path / "a.jsonl") == ["one", "two\u2028x"]
    assert load_texts(tmp_path) == ["one", "two\u2028x", "plain"]
    assert token_stream(tmp_path, Letters()).tolist() == [*map(ord, "one"), 1, *map(ord, "two\u2028x"), 1,
                                                          *map(ord, "plain")]  # fmt: skip


@pytest.mark.parametrize("line", ["no json", "[1]", '{"body": "x"}', '{"text": 3}'])
def test_bad_jsonl_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + line)
    with pytest.raises(ValueError, match=r"x\.jsonl:2"):
        load_texts(tmp_path / "x.jsonl")


def test_no_text(tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        load_texts(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="there is none"):
        load_texts(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bad\.txt: expected UTF-8"):
        load_texts(tmp_path)


def test_bundled_text(tokenizer):
    ids, provenance = tokens(None, tokenizer, samples=4, seqlen=32, seed=0)
    assert ids.shape == (4, 32)
    assert ids.dtype == torch.long
    assert provenance["source"] == "bundled"
    assert windows(None, tokenizer, 64, limit=2).shape == (2, 64)


def test_same_seed_same_tokens(alphabet):
    one, about = tokens(alphabet, Letters(), 5, 10, seed=3)
    two, about2 = tokens(alphabet, Letters(), 5, 10, seed=3)
    other, about3 = tokens(alphabet, Letters(), 5, 10, seed=4)
    assert torch.equal(one, two)
    assert about == about2
    assert not torch.equal(one, other)
    assert about["sha256"] != about3["sha256"]
    assert len(about["sha256"]) == 64
    json.dumps(about)


@pytest.mark.parametrize("seed", range(5))
def test_windows_do_not_overlap(alphabet, seed):
    ids, about = tokens(alphabet, Letters(), 9, 11, seed)
    assert not about["overlap"]
    assert len(ids.unique()) == 99
    assert (ids.diff(dim=1) == 1).all()


def test_overlap_is_said(alphabet):
    ids, about = tokens(alphabet, Letters(), 12, 10, seed=0)
    assert about["overlap"]
    assert len(ids[:, 0].unique()) == 12


@pytest.mark.parametrize(("samples", "seqlen"), [(1, 101), (92, 10)])
def test_short_text_says_how_short(alphabet, samples, seqlen):
    with pytest.raises(ValueError, match="came 100"):
        tokens(alphabet, Letters(), samples, seqlen, seed=0)
    with pytest.raises(ValueError, match="came 100"):
        windows(alphabet, Letters(), 101)


@pytest.mark.parametrize("counts", [(0, 8), (3, 0)])
def test_counts_are_positive(alphabet, counts):
    with pytest.raises(ValueError, match="at least 1, came 0"):
        tokens(alphabet, Letters(), *counts, seed=0)


def test_every_window_begins_as_texts_do(alphabet):
    ids, _ = tokens(alphabet, Letters(bos=7), 5, 10, seed=0)
    assert (ids[:, 0] == 7).all()
    assert (ids[:, 1:].diff(dim=1) == 1).all()
    assert windows(alphabet, Letters(bos=7), 4)[:2].tolist() == [[7, 1000, 1001, 1002], [7, 1003, 1004, 1005]]


def test_evaluation_windows_in_order(alphabet):
    assert windows(alphabet, Letters(), 30).tolist() == [list(range(a, a + 30)) for a in (1000, 1030, 1060)]
    assert len(windows(alphabet, Letters(), 30, limit=2)) == 2


def test_several_sources_in_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "then"}\n', encoding="utf-8")
    assert load_texts([tmp_path / "a.jsonl", str(tmp_path / "b.txt")]) == ["first", "then", "second"]
    with pytest.raises(ValueError, match=r"c\.txt: expected a text file"):
        load_texts((tmp_path / "b.txt", tmp_path / "c.txt"))
