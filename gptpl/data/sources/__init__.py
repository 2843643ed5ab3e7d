"""Corpora: where text comes from. Each knows its files, reads them, and explains what is wrong with them."""

from gptpl.data.sources.base import Corpus
from gptpl.data.sources.downloaded import Downloaded
from gptpl.data.sources.instruction_file import InstructionFile
from gptpl.data.sources.python_stdlib import PythonStdlib
from gptpl.data.sources.tale import Tale
from gptpl.data.sources.text_files import TextFiles

__all__ = ["Corpus", "Downloaded", "InstructionFile", "PythonStdlib", "Tale", "TextFiles"]
