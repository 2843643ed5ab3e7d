"""The pages of the site that are made from the repository: its API, configuration, commands and studies.

`docs/conf.py` writes them to docs/generated before Sphinx reads anything.
"""

import ast
import base64
import html
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptpl.cli.help import command_help, commands
from gptpl.config.groups import choices, command_of, default_choices, when_to_choose

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = DOCS / "generated"
WITHOUT_API = ("gptpl.cli",)  # the page of the commands says what it does
LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))")
FENCE = re.compile(r"^([ ]*)(`{3,}).*?^\1\2`*$\n?", re.MULTILINE | re.DOTALL)


def write() -> None:
    """Write all pages; what has not changed keeps its time, so that Sphinx does not read it again."""
    made = api() | configuration() | {"commands.md": command_page()} | studies()
    for file in [file for file in GENERATED.rglob("*") if file.is_file()]:
        if file.relative_to(GENERATED).as_posix() not in made:
            file.unlink()
    for name, content in made.items():
        file, data = GENERATED / name, content.encode() if isinstance(content, str) else content
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


# --- the API ----------------------------------------------------------------------------------------------


def api() -> dict[str, str | bytes]:
    """One page for each package: its docstring, what it exports, and its modules."""
    found: dict[str, str | bytes] = {}
    for init in sorted(ROOT.glob("gptpl/**/__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        if package.startswith(WITHOUT_API):
            continue
        lines = [f"# {package}", "", *_automodule(package)]
        if exported := list(_exported(init)):
            lines += ["| exported | |", "|---|---|"]
            lines += [f"| {{py:obj}}`{name} <{full}>` | {text} |" for name, full, text in exported]
        for file in sorted(init.parent.glob("[!_]*.py")):
            module = f"{package}.{file.stem}"
            names = [
                f"{{py:obj}}`{name} <{module}.{name}>`" for name, text in _docstrings(module).items() if text
            ]
            lines += [
                "",
                f"## {file.stem}",
                "",
                *([f"{', '.join(names)}.", ""] if names else []),
                *_automodule(module),
            ]
        found[f"reference/{package}.md"] = "\n".join([*lines, ""])
    return found


def _automodule(module: str) -> list[str]:
    """All that a module defines, and nothing that it only passes on."""
    return ["```{eval-rst}", f".. automodule:: {module}", "   :ignore-module-all:", "```", ""]


def _exported(init: Path) -> Iterator[tuple[str, str, str]]:
    """The names that a package imports from its modules, each with its full name and its summary."""
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptpl."):
            for each in node.names:
                name = each.asname or each.name
                if init.parent.name == "gptpl" or f".{init.parent.name}." in f"{node.module}.":
                    module = _home(f"{node.module}", each.name)
                    yield name, f"{module}.{each.name}", _summary(module, each.name)


def _home(module: str, name: str) -> str:
    """The module that defines what another imports, such as a package its members."""
    init = ROOT / module.replace(".", "/") / "__init__.py"
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))) if init.is_file() else ():
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            return _home(f"{node.module}", name)
    return module


@cache
def _docstrings(module: str) -> dict[str, str]:
    file = ROOT / f"{module.replace('.', '/')}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    kinds = (ast.ClassDef, ast.FunctionDef)
    public = [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    return {node.name: ast.get_docstring(node) or "" for node in public}


def _summary(module: str, name: str) -> str:
    return _docstrings(module).get(name, "").partition("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def without_annotated(text: str) -> str:
    """A signature in which `Annotated[int, Limit(...)]` is `int`."""
    while (start := text.find("Annotated[")) >= 0:
        first = start + len("Annotated[")
        depth, comma, end = 1, 0, first
        while depth:
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(text[end], 0)
            comma = comma or (end if text[end] == "," and depth == 1 else 0)
            end += 1
        text = text[:start] + text[first : comma or end - 1] + text[end:]
    return text


# --- configuration and commands ---------------------------------------------------------------------------


def configuration() -> dict[str, str | bytes]:
    """One page for each config group, with its YAML files, one for the roots, and a list of all of them."""
    roots = sorted(file.stem for file in ROOT.glob("conf/*.yaml"))
    defaults = {root: default_choices(root) for root in roots}
    groups = sorted(
        {file.parent.relative_to(ROOT / "conf").as_posix() for file in ROOT.glob("conf/*/**/*.yaml")}
    )
    found: dict[str, str | bytes] = {}
    listed = ["# Configuration", "", "| group | choices |", "|---|---|"]
    for group in groups:
        own = {default.get(group) for default in defaults.values()}
        names = choices(group)
        page = f"{group.replace('/', '_')}.md"
        listed.append(f"| [{group}]({page}) | {', '.join(f'[{name}]({page}#{name})' for name in names)} |")
        lines = [f"# {group}", "", "| | when to choose it |", "|---|---|"]
        for name in names:
            mark = " (default)" if name in own else ""
            when = _plain(when_to_choose(ROOT / f"conf/{group}/{name}.yaml"))
            lines.append(f"| [{name}](#{name}){mark} | {when} |")
        shared = sorted(file.stem for file in ROOT.glob(f"conf/{group}/_*.yaml"))
        for name in [*names, *shared]:
            lines += ["", f"## {name}", "", *_yaml(f"{group}/{name}")]
        found[f"configuration/{page}"] = "\n".join([*lines, ""])
    lines = ["# Roots: one for each command", ""]
    for root in roots:
        lines += ["", f"## {command_of(root)}", "", *_yaml(root)]
    found["configuration/roots.md"] = "\n".join([*lines, ""])
    listed += ["", "The settings of each command that belong to no group: [roots](roots.md).", ""]
    listed += ["```{toctree}", ":hidden:", "", "roots", *(g.replace("/", "_") for g in groups), "```", ""]
    found["configuration/index.md"] = "\n".join(listed)
    return found


def _yaml(name: str) -> list[str]:
    return ["```yaml", (ROOT / f"conf/{name}.yaml").read_text(encoding="utf-8").rstrip(), "```"]


def _plain(text: str) -> str:
    return re.sub(r"([\\*_\[\]<>|`~{}])", r"\\\1", text)


def command_page() -> str:
    """What `gptpl COMMAND --help` prints, for each command."""
    lines = ["# Commands", "", "What `gptpl COMMAND --help` prints.", ""]
    for name in commands():
        lines += [f"## gptpl {name}", "", "```text", command_help(name), "```", ""]
    return "\n".join(lines)


# --- studies and notebooks --------------------------------------------------------------------------------


def study_pages() -> dict[Path, str]:
    """The page in docs/generated of each text and notebook in experiments/, and of the changelog."""
    found = {ROOT / "CHANGELOG.md": "changelog.md"}
    for file in sorted(ROOT.glob("experiments/**/*")):
        inside = file.relative_to(ROOT / "experiments")
        if {"runs", "sweeps", "search"} & set(inside.parts):  # what studies write
            continue
        if file.name == "README.md":
            found[file] = f"studies/{inside.parent.as_posix()}.md"
        elif file.suffix in (".md", ".ipynb"):
            found[file] = f"studies/{inside.with_suffix('').as_posix()}.md"
    return found


def studies() -> dict[str, str | bytes]:
    """The pages of `study_pages`, those of a folder below its README.md, and the list of notebooks."""
    files = study_pages()
    found: dict[str, str | bytes] = {}
    for file, page in files.items():
        if file.suffix == ".ipynb":
            text, pictures = notebook(file)
            stem = page.removesuffix(".md")
            for number, picture in enumerate(pictures):
                text = text.replace(
                    f"](picture:{number})", f"](picture:{stem.rpartition('/')[2]}-{number}.png)"
                )
                found[f"{stem}-{number}.png"] = picture
        else:
            text = file.read_text(encoding="utf-8")
            if not text.startswith("# "):
                text = f"# {file.parent.name}\n\n{text}"
        text = with_site_links(text, file, GENERATED / page).replace("](picture:", "](")
        found[page] = text
    folders = {"/".join(page.split("/")[:2]).removesuffix(".md") for page in files.values() if "/" in page}
    for folder in sorted(folders):
        below = [
            page.removeprefix("studies/").removesuffix(".md")
            for page in files.values()
            if f"{folder}/" in page
        ]
        hidden = (
            [":hidden:"] if f"{folder}.md" in found else []
        )  # without a README.md its notebooks are its page
        toctree = ["", "```{toctree}", *hidden, "", *below, "```", ""] if below else [""]
        text = found.get(f"{folder}.md", f"# {folder.removeprefix('studies/')}\n")
        found[f"{folder}.md"] = str(text) + "\n".join(toctree)
    found["course_notebooks.md"] = _notebooks(files)
    return found


def _notebooks(files: dict[Path, str]) -> str:
    """The list of notebooks for docs/guides/course.md."""
    lines = ["## Notebooks", ""]
    for file, page in files.items():
        if file.suffix == ".ipynb":
            title = notebook(file)[0].partition("\n")[0].lstrip("# ")
            lines.append(f"- [{title}](../generated/{page})")
    return "\n".join([*lines, ""])


def notebook(file: Path) -> tuple[str, list[bytes]]:
    """A notebook as Markdown, with its outputs, and its pictures, which stand in it as `picture:0`, ....

    Cells whose source Jupyter hides, such as the checks of exercises, are left out.
    """
    parts: list[str] = []
    pictures: list[bytes] = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if not source or cell["metadata"].get("jupyter", {}).get("source_hidden"):
            continue
        parts.append(source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](picture:{len(pictures)})")
                pictures.append(base64.b64decode("".join(data["image/png"])))
                continue
            printed = "".join(output.get("text", data.get("text/plain", "")))
            if printed.strip():
                parts.append(f"````text\n{printed.rstrip()}\n````")
    if not parts or not parts[0].startswith("# "):
        parts.insert(0, f"# {file.stem}")
    return "\n\n".join([*parts, ""]), pictures


# --- links ------------------------------------------------------------------------------------------------


def with_site_links(text: str, source: Path, page: Path) -> str:
    """Markdown of the file `source` for the page at `page`: its links, which suit GitHub, as the site's."""
    outside = FENCE.split(text)  # text, indentation, backticks, text, ...
    kept = [match[0] for match in FENCE.finditer(text)]
    changed = [LINK.sub(lambda match: _site_link(match[0], source, page), part) for part in outside[::3]]
    return "".join(part + fence for part, fence in zip(changed, [*kept, ""], strict=True))


def _site_link(link: str, source: Path, page: Path) -> str:
    target, _, anchor = link.partition("#")
    if not target or urlsplit(link).scheme:
        return link
    file = (source.parent / unquote(target)).resolve()
    inside = file.relative_to(ROOT)
    known = study_pages()
    anchor = f"#{anchor}" if anchor else ""
    if inside.parts[0] == "gptpl" and file.suffix == ".py" and not str(inside).startswith("gptpl/cli/"):
        module = f"_modules/{inside.with_suffix('').as_posix().removesuffix('/__init__')}.html"
        return f"site:{'../' * (len(page.relative_to(DOCS).parts) - 1)}{module}{anchor}"
    if inside.parts[0] == "conf" and file.suffix == ".yaml":
        group = "_".join(inside.parts[1:-1])
        anchor = f"#{file.stem}" if group else f"#{command_of(file.stem).replace(' ', '-')}"
        file = GENERATED / f"configuration/{group or 'roots'}.md"
    elif file == ROOT / "README.md":
        file = DOCS / "index.md"
    elif file in known:
        file = GENERATED / known[file]
    return Path(os.path.relpath(file, page.parent)).as_posix() + anchor


def broken_links(site: Path) -> list[str]:
    """The links of a built site that lead nowhere, and the files that it loads from elsewhere."""
    files = {str(file): file for file in [site.resolve(), *site.resolve().rglob("*")]}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.suffix == ".html"}
    anchors = {name: set(re.findall(r'<[^>]*? id="([^"]+)"', text)) for name, text in texts.items()}
    found = []
    for name, text in texts.items():
        for tag, link in sorted(set(re.findall(r'<(\w+)\b[^>]*? (?:href|src)="([^"]*)"', text))):
            parts = urlsplit(html.unescape(link))
            if parts.scheme or parts.netloc:
                lost = tag != "a" and parts.scheme != "data"
            else:
                place = os.path.join(os.path.dirname(name), unquote(parts.path))  # noqa: PTH118, PTH120
                target = os.path.normpath(place) if parts.path else name
                known = anchors.get(target, {parts.fragment})
                lost = target not in files or (bool(parts.fragment) and unquote(parts.fragment) not in known)
            if lost:
                found.append(f"{files[name].relative_to(site.resolve())}: {link}")
    return found
