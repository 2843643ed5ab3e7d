"""Files that must be whole: downloads, and moves that last."""
