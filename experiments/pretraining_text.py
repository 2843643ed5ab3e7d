"""English text for pretraining a small model, from local sources and given files.

    python experiments/pretraining_text.py OUTPUT [--sms SMSSpamCollection] [--text FILE ...]

Writes text files into the folder OUTPUT, for `gptpl train data=text_file data.path=OUTPUT`: the files given,
the tale that comes with gptpl, of the SMS Spam Collection those messages that undersampling leaves out (so
that no message of the classifier's three splits is among them, nor one with the same words), and the
docstrings and comments of Python's standard library.
"""

import argparse
import ast
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np

SEED = 123
NOT_PROSE = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


def main() -> None:
    arguments = _arguments()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    texts = {file.name: file.read_text(encoding="utf-8") for file in arguments.text}
    texts["tale.txt"] = (resources.files("gptpl.data.texts") / "tale.txt").read_text(encoding="utf-8")
    if arguments.sms:
        texts["messages.txt"] = "\n".join(left_out_messages(arguments.sms))
    texts["library.txt"] = "\n\n".join(library_prose())  # the last: its end is what gptpl validates on
    for number, (name, text) in enumerate(texts.items(), start=1):
        (output / f"{number}_{name}").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} characters, {len(text.split()):,} words")


def library_prose() -> Iterator[str]:
    """Docstrings, and comments of two lines or more, of the library's modules in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if NOT_PROSE & set(path.relative_to(root).parts):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules have escapes that Python warns of
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and (text := ast.get_docstring(node)):
                yield text
        yield from _comments(source)


def _comments(source: str) -> Iterator[str]:
    block: list[str] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1:
            if len(block) > 1:
                yield "\n".join(block)
            block = []
        last = token.start[0]
        if words := token.string.lstrip("#! ").strip("-=# "):
            block.append(words)
    if len(block) > 1:
        yield "\n".join(block)


def left_out_messages(path: Path) -> list[str]:
    """Ham that `balance=undersample` with seed 123 does not draw, without doubles of what it does draw."""
    lines = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line]
    ham = [text for label, text in lines if label == "ham"]
    spam = [text for label, text in lines if label == "spam"]
    drawn = set(np.random.RandomState(SEED).choice(len(ham), size=len(spam), replace=False).tolist())
    used = {_words(text) for text in spam} | {_words(ham[number]) for number in drawn}
    return [text for number, text in enumerate(ham) if number not in drawn and _words(text) not in used]


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--sms", type=Path, help="the file of the SMS Spam Collection")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more texts, in UTF-8")
    return parser.parse_args()


if __name__ == "__main__":
    main()
