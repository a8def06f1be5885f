"""Quantize language models to 2 to 8 bits per weight with the E8P lattice codebook, and run them.

Importing this package makes transformers able to load such models. It imports neither torch nor transformers
by itself, so it costs nothing where they are not needed.

Letters, the same in every module:

    M  tokens: rows of an activation     W, W_hat     a weight [N, K], and what its codes say it is
    N  out_features                      H            its Hessian [K, K]: mean of x xᵀ over tokens
    K  in_features                       R            a rotation: block-diagonal, orthonormal
    S  stages of residual codes          s_in, s_out  the two real vectors of a linear, [K] and [N]

    y = s_out ∘ R_outᵀ( W_hat · R_in( s_in ∘ x ) ) + bias

`bits` is the nominal rate, 2 to 8; `stored_bits` is what a file spends per original weight.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from wrapt import when_imported

__version__ = "0.1.0"


@when_imported("transformers.quantizers.auto")
def _register(_: ModuleType) -> None:
    """Register the format the moment transformers' table of quantizers exists, at once if it does already."""
    import_module("eightfold.hf")
    import_module("eightfold.hf_glq")
