"""The commands: the only room that knows Hydra, prints, and sets exit codes."""
