"""What to tell when a step's loss or gradient is no longer a number."""

# B windows in a batch, T tokens in a window

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptpl.data.tokenizers import Tokenizer
from gptpl.training.resume_state import Position
from gptpl.training.sharding import whole


class NonFiniteError(ArithmeticError):
    """A step whose loss or gradient is infinite or not a number; the weights are still those before it.

    Attributes:
        step: the optimizer step, from 1.
        report: lines that describe the batch and the model.
    """

    def __init__(self, step: int, report: list[str]) -> None:
        super().__init__(f"the loss or the gradient of step {step} is not finite")
        self.step = step
        self.report = report


def non_finite_report(
    net: nn.Module,
    tokenizer: Tokenizer,
    *,
    position: Position,
    micro_batches: Sequence[Tensor],
    micro_losses: Sequence[Tensor],
    grad_norm: Tensor,
) -> list[str]:
    """Lines for the reader who has to find the cause: where it was, the texts, the norms of every parameter.

    Args:
        net: the model, its gradients those of the step, not clipped.
        tokenizer: decodes the batch.
        position: the boundary before the step.
        micro_batches: this rank's inputs of the step, each (B, T).
        micro_losses: their losses in nats per token.
        grad_norm: the norm of the whole gradient.
    """
    lines = [
        f"step {position.step + 1}: epoch {position.epoch}, after its batch {position.batch};"
        f" gradient norm {grad_norm.item():g}",
        "",
        "parameter: norm of its values, norm of its gradient",
    ]
    for name, parameter in net.named_parameters():
        gradient = "none" if parameter.grad is None else f"{_norm(parameter.grad):.4g}"
        lines.append(f"  {name}: {_norm(parameter):.4g}, {gradient}")
    for number, (inputs, loss) in enumerate(zip(micro_batches, micro_losses, strict=True), start=1):
        lines += ["", f"batch {position.batch + number} of the epoch: loss {loss.item():g}"]
        for row in inputs.tolist():
            lines.append(f"  {tokenizer.decode(row)!r}")
    return lines


def _norm(tensor: Tensor) -> float:
    """In fp32, or the norm of a large half-precision tensor would be infinite by itself."""
    return float(whole(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)))
