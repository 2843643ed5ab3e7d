"""The commands: the only room that prints and sets exit codes."""
