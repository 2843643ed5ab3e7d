"""Tokens per second of gptpl's decoding, of Hugging Face's `generate` and of the book's loop, side by side.

    python experiments/generation_speed/benchmark.py            # GPT-2 small, a CPU: about 6 minutes

All three have the same random weights and the same prompt; what they write in fp32 is compared. The programs
take turns within each round, so that a machine that slows down slows all of them; medians are reported.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from gptpl.generation import Decoding, SamplingRules, generate
from gptpl.model import CachedGPT, GPTConfig, GPTModel

HERE = Path(__file__).parent
CONTEXT, PROMPT, NEW = 1024, 32, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLING = SamplingRules(temperature=1.0, top_k=50)


def models(dtype: torch.dtype, device: str) -> tuple[GPT2LMHeadModel, GPTModel]:
    """GPT-2 small of both libraries, the same weights."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config())
    ours = GPTModel(
        GPTConfig(
            vocab_size=50257,
            context_length=CONTEXT,
            emb_dim=768,
            n_heads=12,
            n_layers=12,
            drop_rate=0.1,
            qkv_bias=True,
            tie_weights=True,
        )
    )
    theirs.generation_config.pad_token_id = 50256
    ours.load_state_dict(to_ours(theirs.state_dict()))
    return theirs.to(device, dtype).eval(), ours.to(device, dtype).eval()


def to_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.out_proj"}
    names |= {"mlp.c_fc": "ff.up_proj", "mlp.c_proj": "ff.down_proj"}
    tops = {"transformer.wte": "tok_emb", "transformer.wpe": "pos_emb", "transformer.ln_f": "final_norm"}
    ours = {}
    for name, tensor in theirs.items():
        for old, new in (tops | names | {"transformer.h.": "blocks.", "lm_head": "out_head"}).items():
            name = name.replace(old, new)
        matrix = any(part in name for part in ("qkv.weight", "proj.weight"))
        ours[name] = tensor.T.contiguous() if matrix else tensor
    return ours


def book_loop(model: GPTModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(tokens[:, -CONTEXT:])[:, -1, :]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens


def hugging_face(model: GPT2LMHeadModel, tokens: Tensor, cache: str = "dynamic", **sampling: float) -> Tensor:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        eos_token_id=None,
        cache_implementation=cache,
        **({"do_sample": True} | sampling if sampling else {"do_sample": False}),
    )


def seconds(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    started = time.perf_counter()
    out = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def alternated(dtype: str, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every contestant, the median of the rounds and the extremes."""
    theirs, ours = models(DTYPES[dtype], device)
    prompt = torch.randint(50000, (1, PROMPT), device=device)
    eight = torch.randint(50000, (8, PROMPT), device=device)
    fast, fast_eight = CachedGPT(ours, rows=1), CachedGPT(ours, rows=8)  # as their model: made once
    warm = {"temperature": 1.0, "top_k": 50}
    contestants: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "gptpl": (1, lambda: generate(fast, prompt, max_new_tokens=NEW)),
        "hugging_face": (1, lambda: hugging_face(theirs, prompt)),
        "gptpl_batch_8": (8, lambda: generate(fast_eight, eight, max_new_tokens=NEW)),
        "hugging_face_batch_8": (8, lambda: hugging_face(theirs, eight)),
        "gptpl_sampling": (1, lambda: generate(fast, prompt, max_new_tokens=NEW, rules=SAMPLING)),
        "hugging_face_sampling": (1, lambda: hugging_face(theirs, prompt, **warm)),
        "uncached_loop": (1, lambda: book_loop(ours, prompt)),
    }
    if device == "cuda":  # where transformers compiles such a step, with CUDA graphs
        contestants["hugging_face_compiled"] = (1, lambda: hugging_face(theirs, prompt, "static"))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    written: dict[str, Tensor] = {}
    for number in tqdm(range(rounds + 1), desc=dtype, unit="round"):
        for name, (_, run) in contestants.items():
            if name == "uncached_loop" and number > 2:
                continue  # the slow one: twice is enough
            taken, written[name] = seconds(run, device)
            if number:  # the first round warms up
                times[name].append(taken)
    if dtype == "fp32":
        assert torch.equal(written["gptpl"], written["hugging_face"])
        assert torch.equal(written["gptpl"], written["uncached_loop"])
        assert torch.equal(written["gptpl_batch_8"], written["hugging_face_batch_8"])
    result = {}
    for name, (rows, _) in contestants.items():
        rates = sorted(rows * NEW / taken for taken in times[name])
        result[name] = {
            "median": round(statistics.median(rates), 1),
            "least": round(rates[0], 1),
            "most": round(rates[-1], 1),
        }
    return result


def by_position(dtype: str, device: str) -> dict[str, float]:
    """Milliseconds a token, the medians of a hundred tokens, from the first to the thousandth."""
    _, ours = models(DTYPES[dtype], device)
    prompt = torch.randint(50000, (CONTEXT - 1000,)).tolist()
    decoding = Decoding(ours, [prompt], rules=SamplingRules(), max_new_tokens=1000)
    marks = [time.perf_counter()]
    while decoding.step():
        marks.append(time.perf_counter())
    taken = [1000 * (end - start) for start, end in itertools.pairwise(marks[1:])]  # not the reading
    return {
        f"tokens {n + 1}-{n + 100}": round(statistics.median(taken[n : n + 100]), 2)
        for n in range(0, 1000, 100)
    }


def beyond_the_context(dtype: str, device: str) -> float:
    """Seconds a token if each one costs a whole forward pass of the context."""
    _, ours = models(DTYPES[dtype], device)
    prompt = torch.randint(50000, (CONTEXT + 1,)).tolist()
    decoding = Decoding(ours, [prompt], rules=SamplingRules(), max_new_tokens=4)
    decoding.step()
    return statistics.median(seconds(decoding.step, device)[0] for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    result: dict[str, object] = {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "read_gb_per_second": round(_read_rate(options.device), 1),
    }
    for dtype in options.dtypes:
        rates = alternated(dtype, options.device, options.rounds)
        rate = {name: each["median"] for name, each in rates.items()}
        positions = by_position(dtype, options.device)
        result[dtype] = {
            "tokens_per_second": rates,
            "over_hugging_face": round(rate["gptpl"] / rate["hugging_face"], 2),
            "over_hugging_face_batch_8": round(rate["gptpl_batch_8"] / rate["hugging_face_batch_8"], 2),
            "over_hugging_face_sampling": round(rate["gptpl_sampling"] / rate["hugging_face_sampling"], 2),
            "over_uncached_loop": round(rate["gptpl"] / rate["uncached_loop"], 1),
            "batch_8_over_batch_1": round(rate["gptpl_batch_8"] / rate["gptpl"], 2),
            "milliseconds_by_position": positions,
            "slowest_over_fastest_position": round(max(positions.values()) / min(positions.values()), 2),
            "seconds_a_token_beyond_the_window": round(beyond_the_context(dtype, options.device), 2),
        }
        print(json.dumps({dtype: result[dtype]}, indent=2))
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _read_rate(device: str) -> float:
    """How fast the memory can be read, in GB/s: no decoding reads its weights faster."""
    numbers = torch.randn(125_000_000, device=device)
    taken = statistics.median(seconds(numbers.sum, device)[0] for _ in range(15))
    return numbers.numel() * 4 / taken / 1e9


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
