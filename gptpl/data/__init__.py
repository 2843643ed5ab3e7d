"""From text to batches: tokenizers, corpora, encoded token arrays, windows, samplers, the datamodule.

Nothing is imported here, so that a command which needs one tokenizer does not pay for the rest.
"""
