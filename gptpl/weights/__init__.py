"""Formats other programs write: OpenAI TensorFlow, Hugging Face, the book, nanoGPT; in and out."""
