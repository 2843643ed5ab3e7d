"""What a settled run's training step takes of memory, and what there is."""

from typing import Any

import torch

from gptpl.cli.build import Settled
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.trainer import choose, device_type
from gptpl.cli.tuned import preparation
from gptpl.errors import InputError
from gptpl.training.batch_size import USABLE, free_memory, largest_batch_size
from gptpl.training.precision import product_dtype
from gptpl.training.step_memory import StepMemory, optimizer_state_bytes, step_memory


def step_memory_of(settled: Settled, batch_size: int | None = None) -> StepMemory:
    """Of the run's training step, with its own batch or another one (which then is a whole step)."""
    own = batch_size is None
    return step_memory(
        settled.config,
        settled.fast_path,
        batch_size=settled.datamodule.batch_size if batch_size is None else batch_size,
        max_length=settled.datamodule.max_length,
        low=_products_are_low(settled),
        accumulates=own and settled.cfg.trainer.accumulate_grad_batches > 1,
        **_of_weights(settled),
    )


def _of_weights(settled: Settled) -> dict[str, Any]:
    size, prepare = _weight_bytes(settled), preparation(settled.cfg)
    make_optimizer = instantiate(settled.cfg.optimizer)
    state = optimizer_state_bytes(settled.config, make_optimizer, weight_bytes=size, prepare=prepare)
    return {"optimizer_bytes": state, "weight_bytes": size, "prepare": prepare}


def largest_batch_of(settled: Settled, windows: int) -> int | None:
    """The largest power of two of up to so many windows that fits; 0: none; None: not known."""
    usable = usable_memory(settled)
    if usable is None:
        return None
    try:
        return largest_batch_size(
            settled.config,
            settled.fast_path,
            max_length=settled.datamodule.max_length,
            windows=2 ** (windows.bit_length() - 1),
            low=_products_are_low(settled),
            free=round(usable / USABLE),
            **_of_weights(settled),
        )
    except InputError:  # not even one window
        return 0


def check_fits(settled: Settled) -> None:
    """Raises InputError where the run's training step needs more memory than is free."""
    needed, usable = step_memory_of(settled).peak, usable_memory(settled)
    if usable is not None and needed > usable:
        raise InputError(
            f"data.batch_size={settled.datamodule.batch_size}: a step needs about {needed / 1e9:.1f} GB and"
            f" may take {usable / 1e9:.1f} GB of what is free: lower data.batch_size, or give"
            " trainer.recompute_activations=true"
        )


def usable_memory(settled: Settled) -> int | None:
    """Bytes of the device that a training step may take; None where the device does not tell."""
    kind = device_type(settled.cfg.trainer.accelerator)
    return None if kind == "mps" else int(USABLE * free_memory(kind))


def _products_are_low(settled: Settled) -> bool:
    """Whether matrix products are bf16."""
    return product_dtype(choose(settled.cfg.trainer).precision) == torch.bfloat16


def _weight_bytes(settled: Settled) -> int:
    """Bytes of one weight in the run's precision."""
    return 2 if choose(settled.cfg.trainer).precision in ("bf16-true", "16-true") else 4
