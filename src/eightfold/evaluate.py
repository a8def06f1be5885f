"""How good a model is: perplexity on a text, and how far it is from another model.

Both models are walked layer by layer over the same windows, so neither is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eightfold.folder import ModelFolder
from eightfold.loading import loaded_layers
from eightfold.model import Decoder
from eightfold.parallel import ordered_map, workers_for

LOGITS_BYTES = 64 << 20  # of one chunk of logits in float32
HIDDEN_BYTES = 4 << 30  # hidden states of one pass; more windows take more passes over the weights

Progress = Callable[[int, int], None]  # (steps done, steps in all)


class NotFiniteError(ValueError):
    """A model that gives logits that are no numbers."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Averages over windows; each `_se` is the standard error of what it follows, None for a single window.

    `nll` in nats per token; `perplexity` = exp(nll). Against another model (None without): its perplexity,
    `ratio` of this model's perplexity to it, `kl` = KL(other || this) in nats per token, `top1` the share of
    tokens for which both predict the same one. `tokens` are predicted tokens.
    """

    windows: int
    tokens: int
    nll: float
    nll_se: float | None
    perplexity: float
    perplexity_se: float | None
    against_perplexity: float | None = None
    ratio: float | None = None
    ratio_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, ready for JSON."""
        return asdict(self)


def evaluate(
    folder: ModelFolder,
    windows: Tensor,
    against: ModelFolder | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    known: Sequence[Tensor] = (),
) -> EvalResult:
    """Run the model in `folder`, and `against`, over `windows` (long [W, T], T >= 2) of tokens.

    `known`: what `final_hidden` gives for `against`, where another process has computed it, on `device`.

    Each window is on its own: its first token is given, the T - 1 others are predicted. Standard errors take
    windows as independent draws; that of a perplexity is first-order (delta method), and that of the ratio
    uses that both models read the same windows. Raises ValueError for models with different vocabularies, and
    NotFiniteError for logits that are not finite, naming the window.
    """
    if windows.ndim != 2 or windows.dtype != torch.long or windows.shape[1] < 2:
        raise ValueError(f"windows: expected long [W, T], T >= 2, came {windows.dtype} {list(windows.shape)}")
    place = torch.device(device)
    decoders = [Decoder(each, place, dtype) for each in (folder, against) if each is not None]
    walked = decoders[:1] if known else decoders
    steps = _Steps(progress, len(windows), len(decoders) + sum(len(d.layer_names) for d in walked))
    rows = [row for chosen in _passes(windows, decoders) for row in _pass(decoders, windows, chosen, known, steps)]
    return _summary(torch.tensor(rows, dtype=torch.float64), windows)


def final_hidden(decoder: Decoder, windows: Tensor) -> list[Tensor]:
    """The last layer's hidden states [1, T, D] of every window, on the decoder's device: what `evaluate` may know. None
    where that takes the windows in several passes."""
    if len(_passes(windows, [decoder, decoder])) > 1:
        return []
    return _final_hidden(decoder, windows, _Steps(None, 0, 0))


class _Steps:
    """Counts (window, layer) steps for the caller's progress bar."""

    def __init__(self, progress: Progress | None, windows: int, layers: int) -> None:
        self.progress, self.done, self.total = progress, 0, windows * layers

    def step(self, count: int = 1) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def _passes(windows: Tensor, decoders: list[Decoder]) -> list[range]:
    """The windows of each pass over the weights, as many as HIDDEN_BYTES allow."""
    size = sum(hidden.nbytes for hidden in (decoder.prologue(windows[0]) for decoder in decoders))
    count = max(1, HIDDEN_BYTES // size)
    return [range(w, min(w + count, len(windows))) for w in range(0, len(windows), count)]


def _pass(
    decoders: list[Decoder], windows: Tensor, chosen: range, known: Sequence[Tensor], steps: _Steps
) -> Iterator[list[float]]:
    """For each chosen window: mean nll; against another model also its nll, KL, share of equal tokens."""
    part = slice(chosen.start, chosen.stop)
    hidden = [_final_hidden(decoders[0], windows[part], steps)]
    hidden += [list(known[part]) or _final_hidden(other, windows[part], steps) for other in decoders[1:]]

    def compare(w: int) -> list[float]:
        row = _compare(decoders, [states[w - chosen.start] for states in hidden], windows[w])
        if not all(map(math.isfinite, row)):
            raise NotFiniteError(f"evaluation window {w}: the logits are not finite; the model is broken")
        return row

    for row in ordered_map(compare, chosen, workers_for(decoders[0].device)):
        steps.step(len(decoders))
        yield row
    for decoder in decoders:
        decoder.release()


def _final_hidden(decoder: Decoder, windows: Tensor, steps: _Steps) -> list[Tensor]:
    """The last layer's hidden states of every window."""
    workers = workers_for(decoder.device)
    hidden = list(ordered_map(decoder.prologue, windows, workers))
    decoder.release()
    indices = range(len(decoder.layer_names))
    with closing(loaded_layers(decoder, indices)) as layers:
        for i, layer in zip(indices, layers, strict=True):

            def run(x: Tensor, i: int = i, layer: torch.nn.Module = layer) -> Tensor:
                return decoder.call(i, layer, x)

            for w, x in enumerate(ordered_map(run, hidden, workers)):
                hidden[w] = x
                steps.step()
    return hidden


@torch.no_grad()
def _compare(decoders: list[Decoder], hidden: list[Tensor], tokens: Tensor) -> list[float]:
    """Sums in float64 over chunks of positions, since whole logits may be gigabytes."""
    vocabulary = decoders[0].epilogue(hidden[0][:, :1]).shape[-1]
    targets = tokens[1:].to(hidden[0].device)
    sums = torch.zeros(1 if len(decoders) == 1 else 4, dtype=torch.float64)
    chunk = max(1, LOGITS_BYTES // (4 * vocabulary))
    for a in range(0, len(targets), chunk):
        b = min(a + chunk, len(targets))
        logp = [_log_probabilities(d, h[:, a:b]) for d, h in zip(decoders, hidden, strict=True)]
        terms = [-each.gather(1, targets[a:b, None])[:, 0] for each in logp]
        if len(logp) == 2:
            this, other = logp
            if this.shape != other.shape:
                raise ValueError(f"expected two models with one vocabulary, came {this.shape[1]} and {other.shape[1]}")
            terms += [(other.exp() * (other - this)).sum(1), this.argmax(1) == other.argmax(1)]
        sums += torch.stack([term.double().sum() for term in terms]).cpu()
    return (sums / len(targets)).tolist()


def _log_probabilities(decoder: Decoder, hidden: Tensor) -> Tensor:
    return torch.log_softmax(decoder.epilogue(hidden)[0], dim=-1)


def _summary(rows: Tensor, windows: Tensor) -> EvalResult:
    """Means and standard errors over windows; all windows have the same number of tokens."""
    count = len(rows)
    means = rows.mean(0).tolist()

    def se(column: Tensor) -> float | None:
        return float(column.std()) / math.sqrt(count) if count > 1 else None

    def scaled(factor: float, error: float | None) -> float | None:
        return None if error is None else factor * error

    perplexity, error = _exp(means[0]), se(rows[:, 0])
    result = EvalResult(
        windows=count,
        tokens=count * (windows.shape[1] - 1),
        nll=means[0],
        nll_se=error,
        perplexity=perplexity,
        perplexity_se=scaled(perplexity, error),
    )
    if len(means) == 1:
        return result
    ratio = _exp(means[0] - means[1])
    return EvalResult(
        **asdict(result)
        | {
            "against_perplexity": _exp(means[1]),
            "ratio": ratio,
            "ratio_se": scaled(ratio, se(rows[:, 0] - rows[:, 1])),
            "kl": means[2],
            "kl_se": se(rows[:, 2]),
            "top1": means[3],
            "top1_se": se(rows[:, 3]),
        }
    )


def _exp(x: float) -> float:
    """e to the x, infinite where floats end: a broken model is to be reported, not to be an OverflowError."""
    return math.exp(x) if x < 709 else math.inf
