"""Plain versions of the mathematics, float64, written from the definitions; and problems to quantize."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from eightfold.e8p import codebook
from eightfold.format import LayerSpec, PackedWeight
from eightfold.rotation import layout_blocks


@cache
def sylvester(size: int) -> Tensor:
    """(-1)^popcount(i & j) / sqrt(size), the orthonormal Hadamard matrix in natural order."""
    parity = [[(i & j).bit_count() & 1 for j in range(size)] for i in range(size)]
    return (1 - 2 * torch.tensor(parity)).double() / size**0.5


@cache
def rotation_matrix(blocks: tuple[int, ...]) -> Tensor:
    """Block diagonal of Sylvester matrices."""
    if set(blocks) == {1}:
        return torch.eye(len(blocks)).double().to_sparse()
    return torch.block_diag(*[sylvester(b) for b in blocks])


def dense(packed: PackedWeight) -> Tensor:
    """diag(s_out) cut(R_out^T (sum of stages) R_in) diag(s_in) by explicit matrices."""
    spec, recipe = packed.spec, packed.recipe
    C = torch.zeros(spec.padded_out, spec.padded_in, dtype=torch.float64)
    for stage, ratio, codes in zip(recipe.stages, recipe.ratios, packed.codes, strict=True):
        numbers = codes.long() & ((1 << codebook(stage).bits) - 1)
        C += ratio * codebook(stage).points().double()[numbers].flatten(1)
    W = rotation_matrix(spec.out_blocks) @ (C @ rotation_matrix(spec.in_blocks))  # symmetric
    cut = W[: spec.out_features, : spec.in_features]
    return packed.scale_out.double()[:, None] * cut * packed.scale_in.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, K: int, seed: int = 1) -> Tensor:
    """Activations [tokens, K] with a few strong directions, as models have them."""
    return normal(tokens, K, seed=seed) + 2 * normal(tokens, 4, seed=seed + 1) @ normal(4, K, seed=seed + 2)


def hessian(K: int, seed: int = 1) -> Tensor:
    """E[x x^T] of such activations, float32 [K, K]."""
    x = inputs(4 * K, K, seed).double()
    return (x.T @ x / len(x)).float()


def spec(N: int, K: int, bits: int = 2, layout: str = "equal-256", bias: str | None = None) -> LayerSpec:
    return LayerSpec(N, K, bits, layout_blocks(N, layout, 16), layout_blocks(K, layout, 64), bias)
