"""Serving in vLLM against transformers on one GPU: the same tokens, the same perplexity, the next checkpoint's values.

    python benchmarks/serving.py check=MODEL ...      greedy tokens, graphs on, and perplexity, by vLLM and transformers
    python benchmarks/serving.py swapped=MODEL        MODEL, then other weights in its folder, vLLM's compile cache on
    python benchmarks/serving.py lora=MODEL           tokens with a random adapter on every linear, by both
    python benchmarks/serving.py parallel=2           log-probabilities at a tensor-parallel size against those at 1

Several may follow each other. For all but parallel set VLLM_ENABLE_V1_MULTIPROCESSING=0. Results go to
benchmarks/results/serving.jsonl. Speed: `eightfold bench serve`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from results import append
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eightfold.calibration import windows
from eightfold.format import QuantConfig
from eightfold.shapes import Rate, random_config, write_config
from eightfold.skeleton import skeleton

PROMPTS, PROMPT, NEW = 8, 32, 64  # prompts, their tokens, new ones
DEVICE = "cuda" if torch.cuda.device_count() else "cpu"  # is_available would keep vLLM's processes from using CUDA
SEQLEN, WINDOWS = 256, 32  # of the text for perplexity


class Heard(logging.Handler):
    """Keeps vLLM's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Served:
    """A model in vLLM, in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), and all that it took to load it."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm import LLM

        self.heard = Heard()
        logging.getLogger("vllm").addHandler(self.heard)
        start = time.perf_counter()
        # A fixed cache, so that several of these may share a GPU.
        defaults = {"max_model_len": 512, "max_num_seqs": 32, "gpu_memory_utilization": 0.1, "dtype": "bfloat16"}
        defaults |= {"kv_cache_memory_bytes": 1 << 30}
        self.llm = LLM(model=model, enable_prefix_caching=False, **defaults | options)
        self.seconds = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """What was captured, and what vLLM warned of."""
        compilation = self.llm.llm_engine.vllm_config.compilation_config
        fallback = [line for line in self.heard.lines if "cudagraph" in line.lower() or "cuda graph" in line.lower()]
        return {
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "capture_sizes": list(compilation.cudagraph_capture_sizes or ()),
            "graphs": self.llm.collective_rpc(_graphs)[0],
            "warnings": self.heard.lines,
            "fallback_warnings": fallback,
            "start_seconds": round(self.seconds, 1),
        }

    def tokens(self, prompts: list[list[int]], count: int, adapter: Any = None) -> list[list[int]]:
        """Greedy continuations."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        inputs = [{"prompt_token_ids": each} for each in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_likelihood(self, rows: list[list[int]]) -> tuple[float, int]:
        """Sum of the log-probabilities of all tokens but the first of each row, and how many they are."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = self.llm.generate([{"prompt_token_ids": each} for each in rows], params, use_tqdm=False)
        total, count = 0.0, 0
        for row, output in zip(rows, outputs, strict=True):
            for token, found in zip(row[1:], output.prompt_logprobs[1:], strict=True):
                total += found[token].logprob
                count += 1
        return total, count

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        logging.getLogger("vllm").removeHandler(self.heard)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _graphs(worker: Any) -> dict[str, int]:
    """How many graphs of each kind a worker captured, and how many it meant to."""
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    if manager is None:
        return {}
    meant = {mode.name: len(descriptions) for mode, descriptions in manager._capture_descs.items()}
    return {f"meant {mode}": count for mode, count in meant.items()} | {"captured FULL": len(manager.graphs)}


def check(model: str) -> dict[str, Any]:
    """Tokens and perplexity of both; where tokens part, how far the two best logits of transformers are apart there."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = windows(None, tokenizer, PROMPT, limit=PROMPTS).tolist()
    rows = windows(None, tokenizer, SEQLEN, limit=WINDOWS)
    served = Served(model)
    ours = served.tokens(prompts, NEW)
    total, count = served.log_likelihood(rows.tolist())
    facts = served.facts()
    served.close()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map=DEVICE)
    theirs = [generate(reference, prompt) for prompt in prompts]
    parted = partings(reference, prompts, theirs, ours)
    perplexity, expected = math.exp(-total / count), math.exp(-log_likelihood(reference, rows) / count)
    del reference
    torch.cuda.empty_cache()
    result = {"case": "check", "model": Path(model).name, "prompts": len(prompts), "same": len(prompts) - len(parted)}
    result |= {"parted": parted, "tokens": count, "perplexity": perplexity, "perplexity_transformers": expected}
    return result | {"perplexity_ratio": perplexity / expected} | facts


def generate(model: Any, prompt: list[int]) -> list[int]:
    """Greedy continuation by transformers; end-of-text is a token like any other, which its `generate` cannot do."""
    ids, cache, made = torch.tensor([prompt], device=DEVICE), None, []
    with torch.no_grad():
        for _ in range(NEW):
            found = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = found.past_key_values, found.logits[:, -1:].argmax(-1)
            made.append(int(ids))
    return made


def partings(model: Any, prompts: list[Any], theirs: list[Any], ours: list[Any]) -> list[dict[str, Any]]:
    """`part` of every prompt whose continuations are not the same."""
    return [part(model, p, a, b) for p, a, b in zip(prompts, theirs, ours, strict=True) if a != b]


def part(model: Any, prompt: list[int], theirs: list[int], ours: list[int]) -> dict[str, Any]:
    """Where two continuations part, and what the logits are there, in steps of bfloat16 of the largest."""
    at = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:at]], device=DEVICE)).logits[0, -1].float()
    top = logits.topk(2).values.tolist()
    step = 2.0 ** (math.floor(math.log2(max(abs(top[0]), 1e-9))) - 7)
    between = abs(float(logits[theirs[at]] - logits[ours[at]]))
    return {"at": at, "top": top, "apart_in_steps": (top[0] - top[1]) / step, "chosen_apart_in_steps": between / step}


def log_likelihood(model: Any, rows: torch.Tensor) -> float:
    """As Served.log_likelihood, by transformers."""
    total = 0.0
    with torch.no_grad():
        for row in rows.to(DEVICE):
            scores = model(row[None]).logits[0, :-1].float().log_softmax(-1)
            total += float(scores.gather(1, row[1:, None]).sum())
    return total


def swapped(model: str) -> dict[str, Any]:
    """Serve `model`, put other weights under the same config.json in its folder, serve again from vLLM's compile cache:
    are the tokens those that transformers makes of the other weights?"""
    prompts = windows(None, AutoTokenizer.from_pretrained(model), PROMPT, limit=PROMPTS).tolist()
    found, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        shutil.copytree(model, place)
        for turn in range(2):
            if turn:
                change(place / "model.safetensors")
            served = Served(str(place))
            found.append(served.tokens(prompts, NEW))
            starts.append(round(served.seconds, 1))
            served.close()
        reference = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, device_map=DEVICE)
        expected = [generate(reference, prompt) for prompt in prompts]
        parted = partings(reference, prompts, expected, found[1])
    moved = sum(a != b for a, b in zip(*found, strict=True))
    same = len(prompts) - len(parted)
    result = {"case": "swapped", "prompts": len(prompts), "differ_from_the_first": moved, "as_transformers": same}
    return result | {
        "parted": parted,
        "start_seconds": starts,
        "cache": os.environ.get("VLLM_DISABLE_COMPILE_CACHE") != "1",
    }


def change(file: Path) -> None:
    """Other scales in a checkpoint, everything else as it is."""
    tensors = load_file(file)
    random = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("scale_out"):
            tensors[name] = (tensor.float() * (1 + 0.2 * torch.randn(tensor.shape, generator=random))).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})


def lora(model: str) -> dict[str, Any]:
    """Tokens with a random adapter of rank 8 on every linear of the decoder, by vLLM and by transformers."""
    from vllm.lora.request import LoRARequest

    prompts = windows(None, AutoTokenizer.from_pretrained(model), PROMPT, limit=PROMPTS).tolist()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map=DEVICE)
    plain = [generate(reference, prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(reference, Path(folder))
        theirs = [generate(reference, prompt) for prompt in prompts]
        served = Served(model, enable_lora=True, max_lora_rank=8)
        ours = served.tokens(prompts, NEW, LoRARequest("random", 1, folder))
        without = served.tokens(prompts, NEW)
        served.close()
    parted = partings(reference, prompts, theirs, ours)
    moved = sum(a != b for a, b in zip(plain, theirs, strict=True))
    unadapted = sum(a == b for a, b in zip(plain, without, strict=True))
    result = {"case": "lora", "prompts": len(prompts), "changed_by_the_adapter": moved}
    return result | {"same": len(prompts) - len(parted), "same_without_adapter": unadapted, "parted": parted}


def write_adapter(model: Any, folder: Path) -> None:
    """An adapter in peft's format for all decoder linears of `model`, and the same as hooks on its modules."""
    random, rank, names = torch.Generator().manual_seed(0), 8, set()
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.model.named_modules():
        if not name.endswith("_proj"):
            continue
        names.add(name.rpartition(".")[2])
        A = torch.randn(rank, module.in_features, generator=random) * module.in_features**-0.5
        B = torch.randn(module.out_features, rank, generator=random) * 0.1
        A, B = A.bfloat16(), B.bfloat16()
        tensors |= {f"base_model.model.model.{name}.lora_{n}.weight": t for n, t in (("A", A), ("B", B))}
        module.register_forward_hook(partial(_adapted, A.to(DEVICE), B.to(DEVICE)))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(names), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _adapted(A: torch.Tensor, B: torch.Tensor, _: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
    return y + args[0] @ A.T @ B.T


SMALL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}
SMALL |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
SMALL |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False}
SMALL |= {"max_position_embeddings": 2048}


def write_small(folder: Path) -> Path:
    """A small model of random codes, 3 bits with a head of 4, that up to eight devices can share."""
    content = random_config(SMALL, Rate(3, 4))
    quant = QuantConfig.from_dict(content["quantization_config"])
    random = torch.Generator().manual_seed(0)
    scales: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in quant.layers.items():
        rows, end = f"{name}.", name.rpartition(".")[2]
        group = name.rpartition(".")[0] + ("" if end in ("o_proj", "down_proj") else "+") + str(spec.in_features)
        for key, (dtype, shape) in quant.tensors(name).items():
            if key.startswith(rows + "qweight"):
                tensors[key] = torch.randint(-128, 128, (*shape[:-1], shape[-1] * dtype.itemsize), generator=random)
                tensors[key] = tensors[key].to(torch.int8).view(dtype)
                continue
            signs = (torch.randint(2, shape, generator=random) * 2 - 1).to(dtype)
            own = scales.setdefault(group, signs) if key.endswith("scale_in") else signs * spec.in_features**-0.5
            tensors[key] = own.clone()
    model = skeleton(AutoConfig.for_model(**SMALL), torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quant.layers:
            ones = torch.ones(parameter.shape, dtype=torch.bfloat16)
            tensors[name] = ones if parameter.ndim == 1 else torch.randn(parameter.shape, generator=random).bfloat16()
    write_config(content, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def log_probabilities(model: str, devices: int) -> list[float]:
    """Of every token of some random prompts, by vLLM."""
    from vllm import LLM, SamplingParams

    rows = torch.randint(8192, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    graphs = {"cudagraph_capture_sizes": [1, 8]}
    llm = LLM(
        model, skip_tokenizer_init=True, tensor_parallel_size=devices, max_model_len=256, max_num_seqs=8,
        gpu_memory_utilization=0.3, disable_custom_all_reduce=devices > 1, compilation_config=graphs,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    found = []
    for row, output in zip(rows, outputs, strict=True):
        found += [each[token].logprob for token, each in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        first = output.outputs[0]
        found.append(first.logprobs[0][first.token_ids[0]].logprob)
    return found


def parallel(devices: int) -> dict[str, Any]:
    """Log-probabilities of a small model at a tensor-parallel size against those at 1, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_small(Path(folder) / "model")
        found = []
        for size in (1, devices):
            out = Path(folder) / f"{size}.json"
            command = [sys.executable, __file__, "log-probabilities", str(model), str(size), str(out)]
            subprocess.run(command, check=True, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
            found.append(torch.tensor(json.loads(out.read_text(encoding="utf-8"))))
    apart = (found[0] - found[1]).abs()
    spread = float(found[0].std())
    return {"case": "parallel", "devices": devices, "tokens": len(apart), "mean_apart": float(apart.mean()),
            "most_apart": float(apart.max()), "spread": spread}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["log-probabilities"]:
        model, size, out = sys.argv[2:5]
        Path(out).write_text(json.dumps(log_probabilities(model, int(size))), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE=WHAT")
    cases = {"check": check, "swapped": swapped, "lora": lora, "parallel": lambda size: parallel(int(size))}
    for case in parser.parse_args().cases:
        name, _, what = case.partition("=")
        row = cases[name](what)
        print(json.dumps(row), flush=True)
        append("serving", [row], case=name, model=Path(what).name, vllm=metadata.version("vllm"))


if __name__ == "__main__":
    main()
