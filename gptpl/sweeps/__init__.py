"""Trials: which settings they try, how they are run side by side, and what is kept of them."""
