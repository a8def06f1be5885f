"""Tiny random models of the architectures that people use, written as Hugging Face folders.

Dimensions are awkward on purpose: few are powers of two, and heads times head_dim is not always the hidden
size. Norms and biases are random too, so that one that gets lost changes the logits. Every model speaks the
bundled tokenizer, so any text can be fed to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from eightfold import bundled

# What all have in common. The vocabulary and the special token are the bundled tokenizer's.
_BASE = {
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}


def _shape(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**_BASE, **_shape(200, 344, 5, 1, 3), tie_word_embeddings=False)


def _llama_tied() -> PreTrainedConfig:
    return LlamaConfig(**_BASE, **_shape(128, 320, 4, 2, 2), tie_word_embeddings=True)


def _qwen2() -> PreTrainedConfig:  # biases on q, k and v
    return Qwen2Config(**_BASE, **_shape(96, 264, 6, 2, 2), tie_word_embeddings=True)


def _qwen3() -> PreTrainedConfig:  # norms on q and k; heads * head_dim = 96 is not the hidden size
    return Qwen3Config(**_BASE, **_shape(160, 416, 3, 1, 2), head_dim=32, tie_word_embeddings=False)


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**_BASE, **_shape(136, 408, 4, 2, 2), head_dim=32, sliding_window=48)


def _gemma3() -> PreTrainedConfig:  # sliding and full layers take different masks and rotary embeddings
    attention = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
    return Gemma3TextConfig(**_BASE, **_shape(120, 232, 4, 2, 4), **attention, head_dim=32)


def _phi3() -> PreTrainedConfig:  # q, k, v fused in one linear, gate and up in another
    return Phi3Config(**_BASE, **_shape(192, 360, 6, 2, 2), tie_word_embeddings=False)


def _llama_biased() -> PreTrainedConfig:  # biases on all of attention; 200, 360 and 40 are no sums of large powers
    return LlamaConfig(**_BASE, **_shape(200, 360, 5, 1, 2), attention_bias=True, tie_word_embeddings=True)


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama-tied": _llama_tied,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
KINDS = tuple(_CONFIGS)
_CONFIGS["llama-biased"] = _llama_biased  # not one of those that every test of all kinds takes


def write_model(kind: str, folder: Path, seed: int = 0, *, max_shard_size: str = "5GB") -> Path:
    """Write the model of `kind` (one of KINDS, or llama-biased), weights drawn from `seed`; return `folder`.

    Weights are bfloat16, but Mistral's float32 and Phi-3's float16. A small `max_shard_size` gives several
    shards and an index.
    """
    dtype = {"mistral": torch.float32, "phi3": torch.float16}.get(kind, torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[kind](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled.tiny_lm() / name, folder / name)
    return folder
