"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Let vLLM load eightfold's and GLQ's checkpoints. May be called again. Where another package has registered GLQ's
    name, it keeps it, and a warning says so."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from eightfold import glq
    from eightfold.format import QUANT_METHOD
    from eightfold.vllm import EightfoldConfig
    from eightfold.vllm_glq import GlqConfig

    register_quantization_config(QUANT_METHOD)(EightfoldConfig)
    if glq.QUANT_METHOD not in QUANTIZATION_METHODS or _ours:
        register_quantization_config(glq.QUANT_METHOD)(GlqConfig)
        _ours.append(glq.QUANT_METHOD)
    else:
        logger.warning(
            "GLQ checkpoints (quant_method 'glq') are served by another package that was registered before: "
            "convert them with `eightfold convert`, or uninstall it"
        )


_ours: list[str] = []
