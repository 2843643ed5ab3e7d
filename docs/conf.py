"""How docs/ becomes a site: `make docs` writes it to build/docs, which a browser opens without a network."""

import ast
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import pages  # noqa: E402  (its folder is on the path only now)

import gptpl  # noqa: E402
from gptpl.training.lightning_internals import leave_tensorflow_alone  # noqa: E402  (loads torch, once for all processes)

project = "gptpl"
version = release = gptpl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["generated/course_notebooks.md"]  # a part of guides/course.md
html_theme = "furo"
html_title = f"gptpl {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_copyright = False

myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "site": {"url": "{{path}}#{{fragment}}"}}
suppress_warnings = ["myst.header"]  # a docstring's and a study's headings begin at their own level
highlight_language = "bash"  # of blocks that say none, which are commands

default_role = "name"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_use_type_comments = False  # there are none; looking for them takes a fifth of the build
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries = False  # thousands of names in the navigation of every page would double the build time
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Attributes", "params_style")
]  # the fields of a dataclass as a list, as arguments
viewcode_follow_imported_members = False  # each name has its source on the page of its own module


# --- names in docstrings ----------------------------------------------------------------------------------


def name_role(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any, **__: Any) -> Any:
    """What stands in single backticks: a link where it names something of gptpl's, otherwise code."""
    code = rawtext.strip("`")
    if re.fullmatch(r"[A-Za-z_][\w.]*", code):
        return PyXRefRole()("py:obj", rawtext, code, lineno, inliner)
    return [nodes.literal(rawtext, code)], []


_COLON = "\ue000"  # of no text


@cache
def _by_last_part(env: BuildEnvironment) -> dict[str, list[tuple[str, Any]]]:
    found: dict[str, list[tuple[str, Any]]] = {}
    for full, entry in env.domains.python_domain.objects.items():
        found.setdefault(full.rpartition(".")[2], []).append((full, entry))
    return found


def find_name(app: Sphinx, env: BuildEnvironment, node: Any, text: Any) -> Any:
    """A name that its own module does not have, such as a class of another one, if only one thing has it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or node.get("reftype") != "obj" or not re.search(r"[A-Z_.]", target):
        return None
    same = [
        (full, entry)
        for full, entry in _by_last_part(env).get(target.rpartition(".")[2], [])
        if f".{full}".endswith(f".{target}") and entry.objtype not in ("attribute", "property")
    ]
    if len(same) != 1:
        return None
    [(full, entry)] = same
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, [text], full)


def use_markdown(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Two habits of Markdown in docstrings: indented paragraphs are code, and "`Batch`es" is a word."""

    def block(match: re.Match[str]) -> str:
        code = textwrap.dedent(match[2])
        return f"{match[1]}.. code-block:: {'python' if _is_python(code) else 'text'}\n\n{match[2]}"

    text = re.sub(r"(?m)(^\S.*\n\n)(?=    \S)((?:    .*\n|\n)+)", block, "\n".join(lines) + "\n")
    text = re.sub(r"(`+[^`]+`+)(\w?)", lambda m: m[1] + (f"\\ {m[2]}" if m[2] else ""), text)
    lines[:] = text.split("\n")
    if what in ("attribute", "data", "property"):  # napoleon would read "the type: the text"
        lines[0] = lines[0].replace(":", _COLON)


def put_colons_back(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Undo what `use_markdown` has hidden from napoleon."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def without_limits(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """`Annotated[int, Limit(...)]` as `int`."""
    return pages.without_annotated(signature or "") or None, pages.without_annotated(returned or "") or None


# --- the pages --------------------------------------------------------------------------------------------


def use_repository_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to the repository's files, which work on GitHub, into links that work in the site."""
    page = DOCS / f"{docname}.md"
    if docname == "index":  # README.md is the first page
        app.env.note_dependency(str(ROOT / "README.md"))
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        source[0] = pages.with_site_links(readme, ROOT / "README.md", page) + "\n" + source[0]
    elif not docname.startswith("generated/"):
        source[0] = pages.with_site_links(source[0], page, page)


_navigation: dict[int, str] = {}


def share_navigation(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
    """Make one navigation for all pages of source code of a folder's depth: none of them stands in it."""
    if not pagename.startswith("_modules/"):
        return
    depth, made = pagename.count("/"), context["toctree"]

    def toctree(**options: Any) -> str:
        if depth not in _navigation:
            _navigation[depth] = made(**options)
        return _navigation[depth]

    context["toctree"] = toctree


def check_site(app: Sphinx, error: Exception | None) -> None:
    """Fail for a link into the site that leads nowhere, and for a page that loads anything from elsewhere."""
    if error is None and app.builder.name == "html" and (wrong := pages.broken_links(Path(app.outdir))):
        raise RuntimeError("\n".join(["links that lead nowhere:", *wrong]))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    leave_tensorflow_alone()
    pages.write()
    app.add_role("name", name_role)
    app.connect("missing-reference", find_name)
    app.connect("autodoc-process-docstring", use_markdown, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", put_colons_back, priority=600)  # after it
    app.connect("autodoc-process-signature", without_limits)
    app.connect("source-read", use_repository_links)
    app.connect("html-page-context", share_navigation, priority=400)  # before the theme's
    app.connect("build-finished", check_site)
