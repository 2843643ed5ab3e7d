"""The words and numbers beside the progress bar."""

from collections.abc import Mapping

LABELS = {
    "train/loss": ("loss", ".2f"),
    "train/perplexity": ("ppl", ",.0f"),
    "train/tokens_per_second": ("tok/s", ",.0f"),
}
"""What each metric is called beside the bar, and how its value is written."""


def training_text(*, epoch: int, metrics: Mapping[str, float | None], end: str) -> str:
    """Such as "(epoch 4) loss 5.12 ppl 167 tok/s 310 time left 1:20"; metrics that are None are left out."""
    parts = [f"(epoch {epoch})"]
    for name, (label, form) in LABELS.items():
        value = metrics.get(name)
        if value is not None:
            parts.append(f"{label} {value:{form}}")
    return " ".join([*parts, end]).rstrip()


def evaluation_text(*, train_loss: float | None, val_loss: float | None, val_perplexity: float | None) -> str:
    """Such as "train loss 4.07, val loss 6.23 (val perplexity 506)"; losses that are None are left out."""
    parts = []
    if train_loss is not None:
        parts.append(f"train loss {train_loss:.2f}")
    if val_loss is not None:
        perplexity = "" if val_perplexity is None else f" (val perplexity {val_perplexity:,.0f})"
        parts.append(f"val loss {val_loss:.2f}{perplexity}")
    return ", ".join(parts)


def clock_text(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds from one hour on."""
    minutes, seconds_rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    return f"{hours}:{minutes_rest:02}:{seconds_rest:02}" if hours else f"{minutes}:{seconds_rest:02}"
