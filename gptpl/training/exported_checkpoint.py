"""A model alone as a checkpoint of gptpl: to generate, evaluate and start from, not to resume."""

from pathlib import Path

from gptpl.training.checkpoint import HEADER_KEY, NET_PREFIX, LoadedCheckpoint, checkpoint_header, describe
from gptpl.training.checkpoint_io import write_checkpoint


def write_model(loaded: LoadedCheckpoint, path: Path) -> None:
    """Writes the checkpoint and its SHA-256; what is known of the model's past stays with it."""
    header = checkpoint_header(describe(loaded.net, loaded.model), loaded.tokenizer, loaded.run_config)
    weights = {f"{NET_PREFIX}{name}": tensor for name, tensor in loaded.net.state_dict().items()}
    write_checkpoint(
        {
            HEADER_KEY: header | {"lineage": loaded.lineage},
            "state_dict": weights,
            "global_step": loaded.step,
        },
        path,
    )
