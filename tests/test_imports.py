"""Imports run one way: data/ <- convnext, llama <- convllava <- train, sample <- tests/."""
import ast
import re

import pytest

from conftest import ROOT

MAY_IMPORT = {  # of the project's modules
    "data": {"data"},
    "convnext": {"data"},
    "llama": {"data"},
    "convllava": {"data", "convnext", "llama"},
    "train": {"data", "convnext", "llama", "convllava"},
    "sample": {"data", "convnext", "llama", "convllava"},
}
EXCEPTION = ROOT / "data" / "nano" / "pretrain.py"  # a program, which trains the models


def test_only_pretraining_imports_against_the_direction():
    project = {*MAY_IMPORT, "tests", *(file.stem for file in ROOT.glob("tests/*.py"))}
    offenders = set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/nano/*.py")]:
        module = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if imported_modules(file) & project - MAY_IMPORT[module]:
            offenders.add(file)
    assert offenders == {EXCEPTION}


def imported_modules(file):
    """The first part of each name that a file imports: "data" of "data.images"."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_readme_says_about_how_long_the_files_are():
    rows = re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(lines), rel=0.05), name
