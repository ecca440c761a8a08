"""The house itself: which way imports go, what the README says of the files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.config import RunConfig
from tests import house
from tests.house import MAY_IMPORT

ROOT = house.ROOT
ONLY_IN = {"ray": {"cluster"}, "rasterio": {"sharding"}, "boto3": {"sharding", "cluster"}, "deepspeed": {"pipeline"}}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        for name in imported(path):
            assert name not in MAY_IMPORT or name == package or name in MAY_IMPORT[package], f"{path} imports {name}"
            assert package in ONLY_IN.get(name, {package}), f"{path} imports {name}"


def test_training_and_evaluation_run_without_ray_and_rasterio(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(make_config(tmp_path / "run", "train.max_steps=1").to_toml())
    script = """
import sys
sys.modules.update(dict.fromkeys(["ray", "rasterio", "webdataset", "cluster"]))
from pipeline.config import load_config
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.training.loop import run_training
config = load_config(sys.argv[1])
print("took step", run_training(config).step)
print("evaluated", evaluate_run(config.output.uri, "test", "last").checkpoint)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "config.toml")], cwd=ROOT, capture_output=True, text=True
    )
    assert "took step 1" in ended.stdout, ended.stderr
    assert "evaluated step-1" in ended.stdout, ended.stderr


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    assert house.circles(house.modules()) == []


def test_a_circle_is_found() -> None:
    known = {name: FakeModule(Path(f"{name}.py"), text) for name, text in CIRCLE.items()}
    assert house.circles(known) == [["a", "b", "c"]]


CIRCLE = {
    "a": "from b import x",
    "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import c",
    "c": "def f():\n    from a import y",
    "d": "import a",
}


class FakeModule(house.Module):
    """A module that stands in no file."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(path)
        self.__dict__["text"] = text


def test_files_and_folders_are_small_enough_to_read() -> None:
    known = house.modules().values()
    assert [str(module.path) for module in known if module.lines > house.MOST_LINES] == []
    folders = Counter(str(module.path.parent) for module in known)
    assert {folder: count for folder, count in folders.items() if count > house.MOST_FILES} == {}


def test_every_import_inside_a_function_has_a_reason() -> None:
    unexplained = {str(module.path): house.unexplained_imports(module) for module in house.modules().values()}
    assert {path: lines for path, lines in unexplained.items() if lines} == {}


def test_every_folder_says_what_it_is() -> None:
    for module in house.modules().values():
        assert len(ast.get_docstring(module.tree) or "") > 20, f"{module.path} has no docstring"


def test_the_architecture_page_lists_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert house.tree() in page, "run `python -m tests.house --tree` and put its lines into docs/architecture.md"


def test_pages_name_only_files_and_code_that_exist() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        if page.name == "CHANGELOG.md":  # it names what has been removed, too
            continue
        for path, name in re.findall(r"`((?:\w+/)+\w+\.py)(?:: (\w+))?`", page.read_text(encoding="utf-8")):
            if "mine" in path or "sharpen" in path:  # an example that the reader writes
                continue
            assert (ROOT / path).is_file(), f"{page.name} names {path}"
            assert name in (ROOT / path).read_text(encoding="utf-8"), f"{page.name} names {name} of {path}"


def test_pages_link_to_what_is_there() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_only_verbs_and_recipes_that_exist() -> None:
    from cluster.cli import build_parser
    from pipeline.config import recipe_names

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parser = build_parser()
    helped = parser.format_help()
    for verb in set(re.findall(r"satfusion ([a-z]+)\b(?! at scale)", readme)):
        assert re.search(rf"^    {verb}\b", helped, re.M), f"satfusion {verb}"
    table = readme.split("| Recipe |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", table.split("|---|---|")[1])) == set(recipe_names())


def test_everything_installed_has_an_exact_version() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    wanted: list[tuple[str, set[str]]] = [("satfusion", {"dev"})]
    seen: set[tuple[str, str]] = set()
    while wanted:
        name, extras = wanted.pop()
        for requirement in map(Requirement, metadata.requires(name) or []):
            chosen = {"", *extras}
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in chosen):
                continue
            found = (requirement.name.lower().replace("_", "-"), ",".join(sorted(requirement.extras)))
            if found not in seen:
                seen.add(found)
                wanted.append((found[0], set(requirement.extras)))
    assert {name for name, _ in seen} - {"satfusion"} <= pinned
