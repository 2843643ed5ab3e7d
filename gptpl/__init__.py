"""gptpl: a PyTorch Lightning experiment framework for GPT-2-style language models.

    import gptpl

    run = gptpl.build("experiment=quick", "optimizer.lr=1e-3")   # run.module, run.datamodule, run.trainer
    run.fit()
    model = gptpl.load(run.run_dir)
    print(model.generate("Every effort moves you", temperature=0.8))

Importing it imports nothing more: torch comes with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gptpl.config.compose import compose
    from gptpl.errors import InputError
    from gptpl.reports import report
    from gptpl.runs.build import Run, build, resume
    from gptpl.runs.finders import find_batch_size, find_lr
    from gptpl.runs.loaded import load
    from gptpl.runs.plan import plan
    from gptpl.runs.verify import verify_resume
    from gptpl.sweeps.sweep import sweep

_PLACES = {
    "InputError": "gptpl.errors",
    "Run": "gptpl.runs.build",
    "build": "gptpl.runs.build",
    "compose": "gptpl.config.compose",
    "find_batch_size": "gptpl.runs.finders",
    "find_lr": "gptpl.runs.finders",
    "load": "gptpl.runs.loaded",
    "plan": "gptpl.runs.plan",
    "report": "gptpl.reports",
    "resume": "gptpl.runs.build",
    "sweep": "gptpl.sweeps.sweep",
    "verify_resume": "gptpl.runs.verify",
}
__all__ = [
    "InputError",
    "Run",
    "build",
    "compose",
    "find_batch_size",
    "find_lr",
    "load",
    "plan",
    "report",
    "resume",
    "sweep",
    "verify_resume",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gptpl' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
