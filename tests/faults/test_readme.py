"""The list of faults names tests that there are."""

import ast
import re
from functools import cache

from tests.helpers.processes import REPOSITORY

TESTS = REPOSITORY / "tests"
README = TESTS / "faults" / "README.md"


@cache
def names_in(file: str) -> set[str]:
    """The functions of a module of tests."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_of_80_faults_has_tests_that_there_are() -> None:
    lines = [line for line in README.read_text().splitlines() if re.match(r"\| \d", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [int(number) for number, *_ in rows] == list(range(1, 81))
    assert len({fault for _, fault, *_ in rows}) == 80
    for _, fault, names, _ in rows:
        found = re.findall(r"`([^`]*)::(test_[^`]*)`", names)
        assert found and len(found) == names.count("::"), fault
        assert not [name for file, name in found if name not in names_in(file)], fault
