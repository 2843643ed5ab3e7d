"""Checkpoints: their format, safe reading and writing, what exact resume needs, adapters, loading."""
