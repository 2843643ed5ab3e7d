"""Evaluation: losses and scores, answers, text statistics, memorisation, surprisal, loss curves in words."""
