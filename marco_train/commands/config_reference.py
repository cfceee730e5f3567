"""Write every key of a run's config, with its type, default and meaning, as Markdown.

    python scripts/config_reference.py [--check]

What stands in configs/README.md is made from the dataclasses in marco_train/config/ and their
docstrings; --check ends with 1 where the file is another.
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.curation import CURATIONS
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.optim import OptimConfig
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.run import ROLLOUTS, TEACHERS, TrainConfig
from marco_train.config.sft import SFTConfig

STAGES = {
    "sft": SFTConfig,
    "opd": OPDConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
}
# Chosen by a group, each with sections of their own.
CHOSEN = ("RolloutConfig", "TeacherConfig")
HEAD = """# Every key of a run

Made by `python scripts/config_reference.py` from the dataclasses in `marco_train/config/`; a test
holds it to them. A key is set as `key=value` on the command line, or in a file of `experiment/`.
`???` has to be given; `<name>` is a name of your own. Of a sampler (`rollout@stage.rollout=<kind>`)
and a teacher (`teacher@stage.cascade.<name>.teacher=<kind>`, or `teacher=<kind>` of
`experiment=opd`) the kind says which keys there are.
"""


def main(words: Sequence[str] | None = None) -> None:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    args = parser.parse_args(words)
    file = CONFIG_DIR / "README.md"
    text = reference()
    if not args.check:
        file.write_text(text)
    elif not file.is_file() or file.read_text() != text:
        sys.exit(f"error: {file} is not current: run python scripts/config_reference.py")


def reference() -> str:
    """The whole file."""
    sections = [HEAD, *section("A run", "", TrainConfig, leave_out=("stage", "optim", "teacher"))]
    for kind, stage in STAGES.items():
        sections += section(f"stage={kind}", "stage.", stage)
    sections += section("The optimizer of stage=sft and stage=opd", "optim.", OptimConfig)
    for sampler in ROLLOUTS:
        place = "stage.rollout"
        sections += section(f"rollout@{place}={sampler.backend.value}", f"{place}.", sampler)
    for teacher in TEACHERS:
        place = "stage.cascade.<name>.teacher"
        sections += section(f"teacher@{place}={teacher.backend.value}", f"{place}.", teacher)
    for name, curation in CURATIONS.items():
        sections += section(f"marco-train curate {name}", "", curation)
    return "\n".join(sections)


def section(title: str, above: str, owner: type, leave_out: Sequence[str] = ()) -> Iterator[str]:
    """A heading and a table of the keys of a dataclass, with those below them."""
    yield f"## {title}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, kind, default, meaning in keys(owner, above, leave_out):
        yield f"| `{key}` | {kind} | {default} | {meaning} |"
    yield ""


def keys(
    owner: type,
    above: str,
    leave_out: Sequence[str] = (),
    seen: dict[type, str] | None = None,
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each field, in their order.

    Args:
        owner: A dataclass.
        above: What stands before its keys.
        leave_out: Fields that are told of elsewhere.
        seen: Dataclasses that have been told of, with their keys.
    """
    seen = {} if seen is None else seen
    hints, meanings = get_type_hints(owner), documented(owner)
    for field in fields(owner):
        if field.name in leave_out:
            continue
        meaning = " ".join((meanings.get(field.name) or _of_type(hints[field.name])).split())
        inner, many = _below(hints[field.name])
        if inner is None:
            kind = _name(hints[field.name])
            yield f"{above}{field.name}", kind, _default(field, owner), _cell(meaning)
            continue
        if meaning:
            yield f"{above}{field.name}", _name(hints[field.name]), "", _cell(meaning)
        if inner in seen:
            yield f"{above}{field.name}.<name>.*", "", "", f"As `{seen[inner]}`."
        elif inner is ArchitectureConfig:
            names = ", ".join(f"`{each.name}`" for each in fields(inner))
            yield f"{above}{field.name}.*", "", "", f"As in transformers' config.json: {names}."
        elif inner.__name__ not in CHOSEN:
            seen[inner] = f"{above}{field.name}.{'<name>.' if many else ''}*"
            place = f"{above}{field.name}.{'<name>.' if many else ''}"
            yield from keys(inner, place, seen=seen)


def _below(hint: Any) -> tuple[Any, bool]:
    """The dataclass that a field is of, and whether it holds several of them by name."""
    kinds = [kind for kind in _parts(hint) if kind is not NoneType]
    if get_origin(kinds[0]) is dict:
        value: type = get_args(kinds[0])[1]
        return (value, True) if is_dataclass(value) else (None, True)
    found = kinds[0]
    return (found, False) if isinstance(found, type) and is_dataclass(found) else (None, False)


def _of_type(hint: Any) -> str:
    """What the Enum of a field says of itself, where nothing is said of the field."""
    kind = _parts(hint)[0]
    is_enum = isinstance(kind, type) and issubclass(kind, Enum)
    return (kind.__doc__ or "") if is_enum else ""


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)


def _name(hint: Any) -> str:
    """Of a type, for a reader."""
    names = []
    for kind in _parts(hint):
        if get_origin(kind) is list:
            names.append(f"list of {_name(get_args(kind)[0])}")
        elif get_origin(kind) is dict:
            names.append("by name")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            names.append(", ".join(f"`{each.value}`" for each in _members(kind)))
        elif kind is not NoneType:
            plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}
            names.append(plain.get(kind, "group" if is_dataclass(kind) else "any"))
        else:
            names.append("null")
    return " or ".join(names)


def _members(kind: type[Enum]) -> list[Any]:
    """Of an Enum; one without values of its own is written by its names."""
    named = [each for each in kind if isinstance(each.value, str)]
    return named or [type("Member", (), {"value": each.name}) for each in kind]


def _default(field: Field[Any], owner: type) -> str:
    value: Any = field.default
    if field.default_factory is not NO_DEFAULT:
        value = field.default_factory()
    if value is NO_DEFAULT or (isinstance(value, str) and value == MISSING):
        return "`???`"
    if isinstance(value, Enum):
        value = value.value if isinstance(value.value, str) else value.name
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list | dict) or type(value).__name__ == "DictConfig":
        return "empty"
    return "`null`" if value is None else f"`{value}`" if value != "" else "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def documented(owner: type) -> dict[str, str]:
    """What stands under each field of a dataclass, and of those that it is made from."""
    found: dict[str, str] = {}
    for kind in reversed(owner.__mro__):
        if not is_dataclass(kind):
            continue
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(parsed, ast.ClassDef)
        for field, text in zip(parsed.body, parsed.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if is_text and isinstance(text.value.value, str):  # type: ignore[attr-defined]
                    found[field.target.id] = text.value.value  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    main()
