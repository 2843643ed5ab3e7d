"""The data that a run was trained on, made again from what its folder says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from gptpl.config.check import settings_of
from gptpl.config.instantiate import check_paths_inside, check_trusted, instantiate, locate
from gptpl.data.datamodule import TextDataModule
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.stock_data import StockData
from gptpl.data.tokenizers import Tokenizer
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.records.run_record import CONFIG_FILE, is_run, parse_yaml, read_mapping
from gptpl.weights.adapter import FORMAT as ADAPTER

REMEDY = "give the data to evaluate on, data=..."
"""What helps where a model's own data cannot be had."""


def run_dir_of(path: Path) -> Path | None:
    """The run folder of a checkpoint or adapter; None: it lies elsewhere, and nothing it names counts."""
    run_dir = path.parent if path.name == ADAPTER else path.parent.parent
    own = path.name == ADAPTER or path.parent.name == "checkpoints"
    return run_dir if own and is_run(run_dir) else None


def own_data(
    run_dir: Path,
    *,
    tokenizer: Tokenizer,
    sha256: str,
    template: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    trust: Sequence[str] = (),
) -> L.LightningDataModule:
    """The datamodule that a run's `config.yaml` describes, for evaluation.

    Args:
        run_dir: the run's folder.
        tokenizer: of the run's model.
        sha256: hash of the data that the model was trained on; "": not recorded, and not checked.
        template: state of the `PromptTemplate` that the model was tuned with.
        max_length: tokens of a sequence; None: as in training.
        batch_size: sequences evaluated at a time.
        trust: packages of the user's whose classes may be used, beside gptpl's own.

    Raises InputError where the data are gone, changed, or read by a class that is not trusted.
    """
    where = run_dir / CONFIG_FILE
    config = read_mapping(where, parse_yaml)
    node = config.get("data")
    if not isinstance(node, dict):
        raise InputError(f"{where} names no data: {REMEDY}")
    check_trusted({"data": node}, str(where), frozenset(trust))
    check_paths_inside({"data": node}, run_dir, source=str(where))
    kind = locate(str(node.get("_target_")), f"{where}: data._target_")
    if isinstance(corpus := node.get("corpus"), dict):
        node = {**node, "corpus": instantiate(corpus)}
    datamodule = make_datamodule(
        kind,
        node if max_length is None else {**node, "max_length": max_length},
        tokenizer=tokenizer,
        template=template,
        batch_size=batch_size,
    )
    if not isinstance(datamodule, TrainingData):
        datamodule = StockData(datamodule, tokenizer=tokenizer, seed=int(config.get("seed", 0)))
        datamodule.load()
        datamodule.setup()
    found = datamodule.content_sha256()
    if sha256 and found != sha256:
        raise InputError(
            f"the data of {run_dir} are not what its model was trained on (SHA-256 {found[:12] or 'unknown'},"
            f" not {sha256[:12]}): restore them, or {REMEDY}"
        )
    return datamodule


def make_datamodule(
    kind: type[L.LightningDataModule],
    settings: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    template: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> L.LightningDataModule:
    """A datamodule for evaluation from the settings of a run's data; those that the class lacks are left out.

    `template` None is the settings'. Raises InputError for settings that do not fit the class.
    """
    given = {**settings, "tokenizer": tokenizer, "batch_size": batch_size}
    own = None if template is None else PromptTemplate.from_state(template)
    if issubclass(kind, TextDataModule):
        given["stride"] = given.get("max_length")
    if issubclass(kind, InstructionDataModule):
        given["packing"] = False
        if own is not None:  # nothing is read for it, should the settings name a file
            given |= {"template": own.source, "response_marker": own.response_marker}
    named = settings_of(kind, "data").parameters
    datamodule: L.LightningDataModule = _made(
        kind, {k: v for k, v in given.items() if k in named and k != "global_batch_size"}
    )
    if isinstance(datamodule, InstructionDataModule) and own is not None:
        datamodule.template = own
    return datamodule


def _made(kind: type, settings: Mapping[str, Any]) -> Any:
    try:
        return kind(**{name: value for name, value in settings.items() if name != "_target_"})
    except TypeError as error:
        raise InputError(
            f"the settings of the data do not fit {kind.__name__} ({error}): {REMEDY}"
        ) from error
