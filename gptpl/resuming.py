"""How a setting may change when a run is resumed, declared on the setting's own parameter.

    def __init__(self, *, num_workers: Annotated[int, FREE] = 0, max_length: int) -> None: ...

Without a declaration it cannot change, except in callbacks, loggers, the trainer, optimizers and schedules,
whose places in the config have defaults of their own (`gptpl.config.slots.SLOTS`).
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
"""It made the steps so far: with another value it is another run."""
KINDS = (FREE, INEXACT, NEXT_STEP, NEVER)
