"""The links of README.md, docs/ and the studies lead somewhere, and the pages are complete.

Only text is read here: `make docs` checks the pages that are made from the code.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "docs/guides/*.md", "docs/reference/*.md", "experiments/*/README.md")
    for file in ROOT.glob(pattern)
)
GLOSSARY = DOCS / "glossary.md"


def prose(file: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2`*$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def links(file: Path) -> Iterator[str]:
    """The targets of a page's links and pictures, those on the web left out."""
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(file)):
        if not urlsplit(target).scheme:
            yield target


@cache
def anchors(file: Path) -> set[str]:
    """The anchors that GitHub, and Sphinx like it, give the headings of a page."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2`*$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def symbols(file: Path) -> set[str]:
    """What a module defines: functions, classes, their methods, and names of the module."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{each.name}" for each in inner if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def wrong(page: Path, link: str) -> bool:
    """Whether a link leads nowhere. Pages of docs/generated are there only in a build, which checks them."""
    target, _, anchor = link.partition("#")
    file = (page.parent / unquote(target)).resolve() if target else page
    if file.is_relative_to(DOCS / "generated"):
        return False
    if not file.is_file():
        return True
    known = anchors(file) if file.suffix == ".md" else symbols(file) if file.suffix == ".py" else {anchor}
    return bool(anchor) and anchor not in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [link for link in links(page) if wrong(page, link)] == []


def test_wrong_links_are_found() -> None:
    page, code = DOCS / "index.md", "../gptpl/model/gpt.py"
    right = ["glossary.md", "glossary.md#kv-cache", code, f"{code}#GPTModel.forward", f"{code}#NORM_EPS"]
    assert [link for link in right if wrong(page, link)] == []
    lost = [
        "glossaries.md",
        "glossary.md#kv-cash",
        f"{code}#GPTModels",
        f"{code}#GPTModel.backward",
        "guides",
    ]
    assert [link for link in lost if not wrong(page, link)] == []


def test_each_term_of_the_glossary_names_its_code() -> None:
    entries = re.split(r"^### ", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert 40 <= len(entries) <= 80
    without = [
        entry.splitlines()[0] for entry in entries if not re.search(r"Code:\s\[[^]]+\]\(\S+\.py#\S+\)", entry)
    ]
    assert without == []


def test_every_guide_stands_in_the_index_and_every_study_in_their_list() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8").split()
    guides = {f"guides/{file.stem}" for file in DOCS.glob("guides/*.md")}
    assert guides - set(index) == set()
    listed = {(DOCS / link).resolve() for link in links(DOCS / "studies.md")}
    # The course's notebooks are listed by the build, in guides/course.md.
    studies = set(ROOT.glob("experiments/*/README.md")) - {ROOT / "experiments/course/README.md"}
    assert studies - listed == set()
