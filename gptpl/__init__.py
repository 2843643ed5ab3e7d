"""gptpl: a PyTorch Lightning experiment framework for GPT-2-style language models.

    import gptpl

    run = gptpl.build("experiment=quick", "optimizer.lr=1e-3")   # run.module, run.datamodule, run.trainer
    run.fit()
    model = gptpl.load(run.run_dir)
    print(model.generate("Every effort moves you", temperature=0.8))

Importing it imports nothing else: torch comes with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gptpl import filters as filters
    from gptpl.config.compose import compose as compose
    from gptpl.errors import InputError as InputError
    from gptpl.reports import report as report
    from gptpl.runs.build import Run as Run
    from gptpl.runs.build import build as build
    from gptpl.runs.build import resume as resume
    from gptpl.runs.classifier_rule import ClassifierRule as ClassifierRule
    from gptpl.runs.doctor import doctor as doctor
    from gptpl.runs.finders import autotune as autotune
    from gptpl.runs.finders import find_batch_size as find_batch_size
    from gptpl.runs.finders import find_lr as find_lr
    from gptpl.runs.loaded import load as load
    from gptpl.runs.parts import encode as encode
    from gptpl.runs.plan import plan as plan
    from gptpl.runs.submission import submit as submit
    from gptpl.runs.texts import data_report as data_report
    from gptpl.runs.texts import train_tokenizer as train_tokenizer
    from gptpl.runs.verify import verify_resume as verify_resume
    from gptpl.serving.server import serve as serve
    from gptpl.sweeps.sweep import sweep as sweep

_NAMES = {
    "gptpl.config.compose": ["compose"],
    "gptpl.errors": ["InputError"],
    "gptpl.reports": ["report"],
    "gptpl.runs.build": ["Run", "build", "resume"],
    "gptpl.runs.classifier_rule": ["ClassifierRule"],
    "gptpl.runs.doctor": ["doctor"],
    "gptpl.runs.finders": ["autotune", "find_batch_size", "find_lr"],
    "gptpl.runs.loaded": ["load"],
    "gptpl.runs.parts": ["encode"],
    "gptpl.runs.plan": ["plan"],
    "gptpl.runs.submission": ["submit"],
    "gptpl.runs.texts": ["data_report", "train_tokenizer"],
    "gptpl.runs.verify": ["verify_resume"],
    "gptpl.serving.server": ["serve"],
    "gptpl.sweeps.sweep": ["sweep"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULES, "filters"]


def __getattr__(name: str) -> Any:
    if name == "filters":  # a room
        return import_module("gptpl.filters")
    if name not in _MODULES:
        raise AttributeError(f"module 'gptpl' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
