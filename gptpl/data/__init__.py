"""From text to batches: sources, splits, and a datamodule for each task.

Nothing is imported here, so that a command that needs one part does not load the rest.
"""
