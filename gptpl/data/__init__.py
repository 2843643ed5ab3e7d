"""From text to batches: corpora, tokenizers, encoded corpora, splits, and a datamodule for each task.

Nothing is imported here, so that a command which needs one tokenizer does not pay for the rest.
"""
