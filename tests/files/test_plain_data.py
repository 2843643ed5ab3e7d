"""Nothing in gptpl that reads files can run code from them: looked up in the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptpl

FILES = sorted(Path(gptpl.__file__).parent.rglob("*.py"))
assert len(FILES) > 100
RUN_CODE = {"eval", "exec", "compile", "__import__"}
"""As plain names; `re.compile` and a module's `.compile()` are something else."""
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_file_of_gptpl_runs_what_it_reads() -> None:
    for path in FILES:
        check(path)


def check(path: Path) -> None:
    for name, call in calls(path):
        place = f"{path.name}, line {call.lineno}: {ast.unparse(call)}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        module, _, function = name.rpartition(".")
        assert not (module in UNPICKLE and function in ("load", "loads", "Unpickler", "open")), place
        assert name not in RUN_CODE, place
        assert options.get("allow_pickle", "False") == "False", place
        assert options.get("trust_remote_code", "False") == "False", place
        if name in ("torch.load", "hub.load", "torch.jit.load", "torch.package.PackageImporter"):
            assert name == "torch.load", place
            assert options.get("weights_only") == "True", place
        if function in ("load", "load_all") and module == "yaml":
            for loader in re.split(" if .* else ", options.get("Loader", "")):
                assert "Safe" in loader, place
        assert name not in ("yaml.unsafe_load", "yaml.full_load", "torch.hub.load"), place


def test_the_search_finds_them(tmp_path: Path) -> None:
    for text in (
        "pickle.load(f)",
        "torch.load(p)",
        "numpy.load(p, allow_pickle=True)",
        "eval(x)",
        "yaml.load(f)",
        "yaml.load(f, Loader=SafeLoader if a else Loader)",
    ):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(AssertionError):
            check(tmp_path / "a.py")
