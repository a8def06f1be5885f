"""The model card of a checkpoint: where it comes from, what it stores, how good it is, how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of the HTTP library that the client uses)
)

from eightfold.console import plus_minus, size
from eightfold.files import read_json, write_text
from eightfold.gate import EVALUATION
from eightfold.inspect import Inspection, inspect
from eightfold.rates import RECIPE

CARD = "README.md"
# What a copy of a model inherits from the original's card. Its evaluation results are not the copy's.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
INHERITED += ("extra_gated_prompt", "extra_gated_fields")


def model_card(path: str | Path, base: str | None = None, license: str | None = None, repo: str | None = None) -> str:
    """Text of the card of the checkpoint in `path`.

    base: the original model, a folder or a hub id, whose card gives licence and metadata; without it what the
    checkpoint's provenance names. license: in place of the original's. repo: where the card will lie. Raises
    CheckpointError for what is no eightfold checkpoint, ValueError where no licence is known.
    """
    facts = inspect(path)
    named = base or str(facts.config.provenance.get("base_model", ""))
    inherited = _inherited(named)
    if license is not None:
        inherited = {k: v for k, v in inherited.items() if not k.startswith("license")} | {"license": license}
    if "license" not in inherited:
        raise ValueError(
            f"{named or path}: expected a card of the original model that says its licence, there is none; "
            f"give --base MODEL or --license ID"
        )
    tags = ["eightfold", "quantized", f"{facts.bits:.3g}-bit"]
    public = None if _is_folder(named) or "/" not in named else named  # the hub knows no local folders
    metadata: dict[str, Any] = {"pipeline_tag": "text-generation", "library_name": "transformers", "tags": tags}
    if public:
        metadata |= {"base_model": public, "base_model_relation": "quantized"}
    metadata |= inherited
    data = ModelCardData(**metadata)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts, Path(named).name, repo or Path(path).name)}"))


def write_card(path: str | Path, text: str) -> Path:
    """Put the card into the checkpoint's folder. It is not in the manifest: whoever uploads it may change it."""
    file = Path(path) / CARD
    write_text(file, text)
    return file


def _inherited(base: str) -> dict[str, Any]:
    """Metadata of the original's card; nothing where it has none."""
    if _is_folder(base):
        file = Path(base) / CARD
        if not file.is_file():
            return {}
    elif "/" in base:
        try:
            file = Path(HfApi().hf_hub_download(base, CARD))
        except EntryNotFoundError as error:
            if isinstance(error, HfHubHTTPError):
                return {}
            raise ValueError(f"{base}: its card cannot be had ({error}); give --license ID") from error
        except (HTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{base}: the hub would not give us its card ({reason}); give --license ID") from error
    else:
        return {}
    data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in INHERITED if data.get(key) is not None}


def _is_folder(base: str) -> bool:
    return bool(base) and Path(base).is_dir()


def _body(facts: Inspection, base: str, repo: str) -> str:
    sections = [_what(facts, base), _quality(facts), _run(facts, repo), _origin(facts)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(facts: Inspection, base: str) -> str:
    count = Counter(layer.bits for layer in facts.layers)
    rates = ", ".join(f"{count[bits]} at {bits} bits" for bits in sorted(count))
    rows = [
        ("nominal bits a weight", f"{facts.bits:.4g}"),
        ("**stored bits** per original weight, padding and scale vectors included", f"{facts.stored_bits:.4f}"),
        ("quantized linears", f"{len(facts.layers)} ({rates}), {facts.weights:,} weights"),
        ("their bytes", f"{facts.bytes_measured:,}"),
        ("everything else (embeddings, norms, head), as in the original", f"{facts.other_bytes:,} bytes"),
        ("weight files", f"{facts.file_bytes:,} bytes ({size(facts.file_bytes)})"),
        ("tensor parallel up to", str(facts.config.tp_max)),
    ]
    more = f"\n\nThe bits of each linear are in `{RECIPE}`." if (facts.path / RECIPE).is_file() else ""
    about = f"{base or 'A language model'}, quantized by eightfold (E8P lattice codes, Hadamard rotations, LDLQ)."
    return f"# {facts.path.name}\n\n{about}\n\n" + "\n".join(_table(("", ""), rows)) + more


def _quality(facts: Inspection) -> str:
    file = facts.path / EVALUATION
    if not file.is_file():
        return ""
    found = read_json(file)
    evaluation = found["evaluation"]
    if evaluation is None:
        return f"## Quality\n\nNot evaluated: {'; '.join(found['reasons'])}."
    rows = [
        ("perplexity", plus_minus(evaluation["perplexity"], evaluation["perplexity_se"])),
        ("the original's perplexity", f"{evaluation['against_perplexity']:.4f}"),
        ("ratio", plus_minus(evaluation["ratio"], evaluation["ratio_se"])),
        ("KL divergence from the original, nats a token", plus_minus(evaluation["kl"], evaluation["kl_se"])),
        ("top-1 agreement with the original", plus_minus(evaluation["top1"], evaluation["top1_se"])),
        ("at stored bits per original weight", f"{facts.stored_bits:.4f}"),
    ]
    text = f"{found['text']['source']} text" if found["text"]["source"] == "bundled" else found["text"]["source"]
    note = (
        f"On {evaluation['windows']} windows of {found['seqlen']} tokens of held-out text ({text}, sha256 of its "
        f"tokens {found['text']['sha256'][:16]}…), {evaluation['tokens']:,} predicted tokens, in {found['dtype']}; "
        "± is the standard error over windows."
    )
    return "## Quality\n\n" + "\n".join(_table(("", ""), rows)) + f"\n\n{note}"


def _run(facts: Inspection, repo: str) -> str:
    return f"""## Run it

With transformers (`pip install eightfold`):

```python
import eightfold  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

With vLLM (`pip install 'eightfold[vllm]'`), at any tensor-parallel size that divides {facts.config.tp_max}:

    vllm serve {repo}

`eightfold verify DIR` checks a downloaded copy against the hashes in `eightfold.json`."""


def _origin(facts: Inspection) -> str:
    rows = [(key.replace("_", " "), _flat(value)) for key, value in facts.config.provenance.items()]
    format_version = ("format version", str(facts.config.format_version))
    return "## Provenance\n\n" + "\n".join(_table(("", ""), [*rows, format_version]))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(each)}" for key, each in value.items())
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _table(columns: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    body = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return [f"| {columns[0]} | {columns[1]} |", "|---|---|", *body]
