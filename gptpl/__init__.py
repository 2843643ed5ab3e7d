"""gptpl: a PyTorch Lightning experiment framework for GPT-2-style language models."""

__version__ = "0.1.0"
