"""What happens beside training: text samples, the progress bar, the loss curve. One file a callback.

- `sample_text.SampleText`: text from the model while it learns, to the log, TensorBoard and `samples.jsonl`.
- `progress.ProgressBar`: one bar for the whole training, or plain log lines where there is no terminal.
- `loss_curve.LossCurve`: `loss.png`, the same picture in TensorBoard, and one line that says what it shows.

None of them changes a weight, the order of the data, or a random number that training draws.
"""
