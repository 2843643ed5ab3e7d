"""The arithmetic that training needs, and the most a device can do: for model FLOPs utilisation (MFU)."""

# T time, D model, V vocabulary

import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptpl.model import GPTClassifier, GPTConfig, GPTModel
from gptpl.model.gpt import EXPANSION
from gptpl.training.memory import Prepare, of_any_depth

PEAKS = {
    # Dense bf16 (fp16 where there is no bf16) tensor FLOP/s from NVIDIA's data sheets, without sparsity. The
    # first name that is part of torch's name of the device counts. (Lightning's table lacks half of these.)
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def training_flops_per_token(config: GPTConfig, max_length: int) -> int:
    """Floating-point operations of forward and backward pass for one token in a sequence of `max_length`.

    6 N + 12 L T D: two for each multiplication and addition, once forward and twice backward, for the N
    weights of all matrices that multiply (the head counts, tied or not, the embedding tables do not) and for
    attention's two products (Chowdhery et al. 2022, "PaLM", appendix B). As there, attention counts in full,
    although half of its scores are masked.
    """
    D = config.emb_dim
    weights = config.n_layers * config.block_matrices + config.vocab_size * D
    return 6 * weights + 12 * config.n_layers * max_length * D


def counted_flops_per_token(config: GPTConfig, max_length: int, prepare: Prepare) -> int:
    """`training_flops_per_token` where only a part is trained: counted by torch for one block and for two."""

    def counted(of_few: GPTConfig) -> int:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net = prepare(GPTModel(of_few))
            tokens = torch.zeros(1, max_length, dtype=torch.int64)
            lengths = (torch.full((1,), max_length),) if isinstance(net, GPTClassifier) else ()
            net(tokens, *lengths).sum().backward()
        return counter.get_total_flops()

    return of_any_depth(config, counted) // max_length


def peak_flops(device: torch.device, dtype: torch.dtype, config: object) -> float | None:
    """The most FLOP/s that the device can do; None where it is not known.

    For a CUDA device by its name. For a CPU it is measured, in 0.1 s, on the product of a feed-forward
    network as wide as the `config`'s `emb_dim`, or as GPT-2 small's.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), None)
    if device.type == "cpu":
        D = getattr(config, "emb_dim", 768)
        return matrix_product_flops(2048, EXPANSION * D, D, dtype)
    return None


def matrix_product_flops(rows: int, outputs: int, inputs: int, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measured FLOP/s of (rows, inputs) @ (inputs, outputs) on the CPU: the median, after a warm-up."""
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(x, weight.t())
        seconds.append(time.perf_counter() - started)
    return 2 * rows * outputs * inputs / statistics.median(seconds[1:])
