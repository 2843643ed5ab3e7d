"""Texts with labels: tables of them, their splits, and the batches that a classifier is trained on."""
