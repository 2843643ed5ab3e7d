"""The end of a measurement: the first optimizer step."""

import os
import time

import lightning as L


class FirstStep(L.Callback):
    """Prints the process's CPU seconds after the first step, and ends the process."""

    def on_train_batch_end(self, *_: object) -> None:
        print(f"first step after {time.process_time():.3f}", flush=True)
        os._exit(0)
