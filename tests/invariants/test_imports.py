"""What may import what, in the package and in its tests."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY

TESTS = REPOSITORY / "tests"
# By library: a module that may not know it, and the contract that says so.
PLANTED = {
    "vllm": ("data/chat.py", "vllm is known to marco_train.inference"),
    "deepspeed": ("models/moe.py", "deepspeed is known to marco_train.engine"),
    "wandb": ("stages/opd.py", "wandb is known to marco_train.tracking"),
    "lm_eval": (
        "evaluation/benchmark/grading.py",
        "lm_eval is known to marco_train.evaluation.benchmark.harness",
    ),
    "datasets": ("data/loader.py", "datasets is known to marco_train.data.sources"),
    "hydra": (
        "run.py",
        "hydra is known to marco_train.config",
    ),
    "torch": ("config/run.py", "A config is read without a tensor library"),
}
# What no plain installation brings: the extras, and what tests and checks use.
EXTRAS = [
    "vllm",
    "babel",
    "fasttext",
    "jsonschema",
    "lingua",
    "lm_eval",
    "math_verify",
    "openai",
    "matplotlib",
    "reasoning_gym",
    "rensa",
    "sacrebleu",
    "sentence_transformers",
    "pytest",
    "ruff",
    "mypy",
]
IMPORT_ALL = f"""
import pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import marco_train
for module in pkgutil.walk_packages(marco_train.__path__, "marco_train."):
    __import__(module.name)
    print(module.name)
"""


def test_each_contract_sees_an_import_that_it_forbids(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "marco_train", tmp_path / "marco_train")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for library, (module, _) in PLANTED.items():
        file = tmp_path / "marco_train" / module
        file.write_text(file.read_text() + f"\nimport {library}\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for library, (module, contract) in PLANTED.items():
        assert re.search(rf"^{re.escape(contract)} *BROKEN", done.stdout, re.MULTILINE)
        planted = "marco_train." + module.removesuffix(".py").replace("/", ".")
        assert f" {planted} -> {library} (l." in done.stdout


def test_every_module_is_imported_without_the_extras() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    package = REPOSITORY / "marco_train"
    modules = {
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for file in package.rglob("*.py")
    }
    assert set(done.stdout.split()) == modules - {"marco_train"}


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.name)
def test_only_helpers_are_imported_from_the_tests(file: Path) -> None:
    imported = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
    of_tests = [name for name in imported if name.partition(".")[0] in {"tests", "conftest"}]
    assert [name for name in of_tests if not name.startswith("tests.helpers.")] == []


@pytest.mark.parametrize("file", sorted((TESTS / "unit").glob("test_*.py")), ids=lambda f: f.stem)
def test_a_unit_test_is_one_process(file: Path) -> None:
    names = re.findall(r"^(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE)
    others = {"subprocess", "multiprocessing", "tests.helpers.ranks", "tests.helpers.processes"}
    assert not others & set(names)
