"""What happens besides training (`conf/callbacks` has the YAML of each callback).

- kept: `checkpoints` (also what an exact resume needs), `records` (evaluations, steps to the last bit).
- shown: `progress`, `samples` (texts, answers), `metrics` (loss curve, learning rate, speed, settings with
  the best values), `classification` (pictures, and scores at the end), `diagnostics`, `benchmarks`.
- ended: `stopping` (signals, time limits, no more improvement).

`after_step` is what they share. None of them changes a weight, the order of the data, or a random number that
training draws.
"""
