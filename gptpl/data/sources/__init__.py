"""Where text comes from: corpora that find their files, read them, and say what is wrong with them."""

from gptpl.data.sources.base import Corpus
from gptpl.data.sources.hugging_face import HuggingFaceDataset
from gptpl.data.sources.records import LabelledCorpus, LabelledFiles, SmsSpam
from gptpl.data.sources.text import Canaries, Downloaded, InstructionFile, PythonStdlib, Tale, TextFiles

__all__ = [
    "Canaries",
    "Corpus",
    "Downloaded",
    "HuggingFaceDataset",
    "InstructionFile",
    "LabelledCorpus",
    "LabelledFiles",
    "PythonStdlib",
    "SmsSpam",
    "Tale",
    "TextFiles",
]
