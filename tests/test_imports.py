"""Imports run one way: data/ <- convnext, llama <- convllava <- train, sample <- tests/."""
import ast
import fnmatch
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


def names_of_tests(module):
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_tests_that_hold_the_promises_are_there():
    table = (ROOT / "tests" / "README.md").read_text().partition("## Which test holds which promise")[2]
    missing, module = [], None
    for row in re.findall(r"^\|.*\|(.*)\|$", table, re.MULTILINE):
        for name in re.findall(r"`(\w+\*?)`", row):
            if name.startswith("test_"):
                module = name
            elif not fnmatch.filter(names_of_tests(module), f"test_{name}"):
                missing.append(f"{module}: {name}")
    assert not missing


def test_the_readme_says_about_how_long_the_files_are():
    rows = re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(lines), rel=0.05), name
