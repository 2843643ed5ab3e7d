"""The weights of an earlier run as what a new one starts from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gptpl.checkpoints.files import checkpoint_file
from gptpl.checkpoints.format import (
    HEADER_KEY,
    check_same_model,
    check_same_tokenizer,
    check_shapes,
    check_writes_text,
    lineage_of,
    model_config,
    net_weights,
    read_checkpoint,
    read_header,
)
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.adapter import is_adapter
from gptpl.weights.model_files import state_dict_source
from gptpl.weights.starting import CroppedWeights
from gptpl.weights.torch_files import OURS
from gptpl.weights.transfer import check_fits, load_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunWeights(CroppedWeights):
    """The weights of a gptpl checkpoint; optimizer, schedule and position in the data start from scratch."""

    checkpoint: str | None = None
    """A run's folder (its last checkpoint) or a `.ckpt` file."""

    @property
    def file(self) -> Path:
        """The checkpoint's file. Raises InputError if none is given, or an adapter without its base."""
        if self.checkpoint is None:
            raise InputError("init.checkpoint is not set: give init.checkpoint=RUN_FOLDER or FILE.ckpt")
        if is_adapter(Path(self.checkpoint).expanduser()):
            raise InputError(
                f"init.checkpoint={self.checkpoint} is an adapter: add it to its base first, gptpl weights"
                f" convert checkpoint={self.checkpoint} format=gptpl output=FOLDER, and give that FOLDER"
            )
        return checkpoint_file(self.checkpoint, key="init.checkpoint")

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """See `StartingWeights`."""
        path = self.file
        header = read_header(path)
        check_writes_text(header, path, key="init.checkpoint")
        check_same_tokenizer(header, tokenizer)
        check_fits(
            config,
            model_config(header, path),
            name=f"init.checkpoint={self.checkpoint}: the weights",
            crop=self.crop,
        )

    def load_into(self, net: GPTModel) -> dict[str, Any]:
        """See `StartingWeights`; the run's own lineage is the `parent`."""
        path = self.file
        checkpoint = read_checkpoint(path)
        source = state_dict_source(net_weights(checkpoint), str(path))
        load_tensors(net, source, OURS, crop=self.crop)
        return self._origin(checkpoint, path)

    def fill(
        self, net: nn.Module, built_from: Mapping[str, Any], tokenizer: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `StartingWeights`; the run's model must have the same class and keywords."""
        path = self.file
        checkpoint = read_checkpoint(path)
        check_same_model(checkpoint[HEADER_KEY], built_from, tokenizer)
        weights = net_weights(checkpoint)
        check_shapes(net, weights, path)
        net.load_state_dict(weights)
        return self._origin(checkpoint, path)

    def _origin(self, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
        log.info("weights: %s, step %d", path, int(checkpoint.get("global_step", 0)))
        return {
            "init": "run",
            "checkpoint": str(path.resolve()),
            "crop_context": self.crop_context,
            "crop_vocabulary": self.crop_vocabulary,
            "parent": lineage_of(checkpoint, path),
        }
