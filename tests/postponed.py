"""Imports as commands do: much of what Lightning imports comes when something of it is asked for."""

import sys

from gptpl.cli.postponed_imports import Postponing

sys.meta_path.insert(0, Postponing())
