"""What happens besides training, one file a callback (`conf/callbacks` has the YAML of each).

- kept: `checkpoints`, `exact_resume`, `record_file` (evaluations), `stopping` (signals and time limits).
- shown: `progress`, `sample_text`, `sample_responses`, `loss_curve`, `classification_report`,
  `hyperparameters`, `learning_rate`, `throughput`.
- measured: `final_scores`, `step_trace`; `early_stopping` ends a training that no longer improves.

`after_step` is what they share. None of them changes a weight, the order of the data, or a random number that
training draws.
"""
