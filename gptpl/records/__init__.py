"""What runs leave on disk, read back without torch or Hydra."""
