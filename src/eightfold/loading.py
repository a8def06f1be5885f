"""Layers in a row, each read from the disk while the device works on the one before."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn

from eightfold.model import Decoder

READERS = 4  # threads that read a layer's tensors: one copies a few GB a second out of a mapped file


def loaded_layers(decoder: Decoder, indices: Iterable[int]) -> Generator[nn.Module, None, None]:
    """The layers `indices` with their weights, in order. Memory for one more than the caller holds."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[nn.Module] | None = None
        for i in indices:
            before, coming = coming, pool.submit(_load, decoder, i)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _load(decoder: Decoder, i: int) -> nn.Module:
    device = decoder.device
    if device.type != "cuda":
        return decoder.load_layer(i)
    stream = _stream(device)

    def read(name: str) -> Tensor:
        with torch.cuda.stream(stream):
            return decoder.folder.read(name, device)

    def read_all(names: Sequence[str]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(read, names)

    with torch.cuda.stream(stream):
        layer = decoder.load_layer(i, read_all)
    stream.synchronize()
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.record_stream(torch.cuda.default_stream(device))
    return layer


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
