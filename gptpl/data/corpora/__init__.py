"""Corpora: where text comes from. Each knows its files, reads them, and explains what is wrong with them."""

from gptpl.data.corpora.base import Corpus
from gptpl.data.corpora.downloaded import Downloaded
from gptpl.data.corpora.instruction_file import InstructionFile
from gptpl.data.corpora.python_stdlib import PythonStdlib
from gptpl.data.corpora.tale import Tale
from gptpl.data.corpora.text_files import TextFiles

__all__ = ["Corpus", "Downloaded", "InstructionFile", "PythonStdlib", "Tale", "TextFiles"]
