"""Trials: the settings they try, how they run side by side, and their results."""
