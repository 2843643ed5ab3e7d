"""What may become of a setting when a run is resumed, said where the setting is: on its parameter.

    def __init__(self, *, num_workers: Annotated[int, FREE] = 0, max_length: int) -> None: ...

A setting that says nothing made the steps so far, and cannot change, except in callbacks, loggers, the
trainer, optimizers and schedules, whose slots have defaults of their own (`gptpl.config.slots.SLOTS`).
"""

from typing import Literal

Resume = Literal["free", "inexact", "next_step", "never"]

FREE: Resume = "free"
"""It may change: the weights become what they would have become."""
INEXACT: Resume = "inexact"
"""It may change: the same training by other kernels, or in another order of additions."""
NEXT_STEP: Resume = "next_step"
"""It may change, and changes the training from the next step on."""
NEVER: Resume = "never"
"""It made the steps so far: another value is another run."""
KINDS = (FREE, INEXACT, NEXT_STEP, NEVER)
