"""Composing a run from the words of a command line, and saying what is wrong with them.

words -> overrides and --config-dir -> Hydra -> a config -> `to_run`
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marco_train.config.curation import CURATIONS, CurationConfig, to_curation
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.run import TrainConfig, register_schemas, to_run
from marco_train.errors import InputError, require

register_schemas()

OPTIONS = ("--config-dir", "-cd")
SELF = "_self_"
# What somebody types of another stage, or of another program, and what it is here.
MEANT = {
    ("OPDConfig", "num_steps"): "each phase of the cascade has its own: give "
    "stage.cascade.<phase>.num_steps, or stage.max_steps to cap each",
    ("OPDConfig", "num_epochs"): "each phase of the cascade has its own: give "
    "stage.cascade.<phase>.num_epochs",
    ("OPDConfig", "max_length"): "prompts and responses have their own: give "
    "stage.max_prompt_length and stage.max_response_length",
    ("SFTConfig", "max_prompt_length"): "SFT bounds whole conversations: give stage.max_length",
    ("SFTConfig", "cascade"): "SFT has no teachers: choose stage=opd",
    ("PhaseConfig", "path"): "it is its teacher's: give stage.cascade.<phase>.teacher.path",
}
OTHERS_SAY = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "epochs": "num_epochs",
    "steps": "num_steps",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_share",
    "lr_scheduler_type": "schedule",
    "gradient_clipping": "clip_norm",
}
# A word that is no key=value as there are spaces in it, or as the shell parted it there.
SPACED = re.compile(r"^[^=~]*$|^=|^[^={\['\"]*\s=|^[^=]*=\s")
KEY = re.compile(r"[+~]{0,2}[\w.@/-]+")
# What a value that OmegaConf cannot convert has to be.
TAKES = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}
SHAPE = "model.architecture"
MERGING = re.compile(r"Error merging override (.+)")
HELD_OUT = (
    "data.held_out takes data.held_out.share=0.02 (of the rows of data.sources), or rows of their "
    "own as data.held_out.sources.<name>.path=<file>"
)


def read_run(words: Sequence[str]) -> TrainConfig:
    """Compose and check a run.

    Raises:
        InputError: A word is of no use, or the run is refused.
    """
    return to_run(compose(words))


def read_curation(kind: str, words: Sequence[str]) -> CurationConfig:
    """Compose and check a curation, of the configs in `configs/curation`.

    Raises:
        InputError: There is no such kind, a word is of no use, or the curation is refused.
    """
    require(kind in CURATIONS, f"there is no curation {kind!r}; known are {', '.join(CURATIONS)}")
    overrides, directory = read_words(words)
    require(directory is None, "--config-dir: a curation takes no configs of your own")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            return to_curation(hydra_compose(f"curation/{kind}", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_wrong_word(error, kind)) from error


def _wrong_word(error: Exception, kind: str) -> str:
    """Say which word of a curation does not fit, with the nearest key."""
    said, cause = str(error), error.__cause__
    merging = MERGING.match(said)
    if cause is not None and merging:
        return _misfit(merging[1], cause)
    if several := re.match(r"Ambiguous value for argument '(.+?)'", said):
        key, _, values = several[1].partition("=")
        return f"{several[1]} gives several values: write a list in brackets, as {key}=[{values}]"
    said = f"{_in_one_line(error)}: {cause}" if cause else _in_one_line(error)
    named = re.match(r"Could not override '(.+?)'", said)
    if named is None:
        return said
    there = list(_paths(OmegaConf.structured(CURATIONS[kind])))
    near = get_close_matches(named[1], there, 1, 0.6)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(there)}"
    return f"there is no {named[1]}; {hint}"


def compose(words: Sequence[str]) -> DictConfig:
    """Compose what the words of a command line say, without the checks between fields.

    Args:
        words: Overrides as `key=value`, and `--config-dir DIR`, under which more groups lie.

    Raises:
        InputError: Says what is wrong with which word or file.
    """
    overrides, directory = read_words(words)
    try:
        found = _compose(overrides, directory)
        if directory is not None:
            _refuse_undone(found, overrides, directory)
        return found
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"this is not YAML: {_in_one_line(error)}") from error
    except MissingConfigException as error:
        raise InputError(_no_such_choice(error, directory)) from error
    except (AssertionError, AttributeError) as error:  # of OmegaConf: a field of nothing is set
        raise InputError(_nothing_there(overrides, directory)) from error
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        raise InputError(_explained(error, overrides, directory)) from error


def read_words(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Part the overrides of a command line from the directory of own configs.

    Raises:
        InputError: An option is unknown, or the directory cannot be used.
    """
    overrides, directory = list[str](), None
    rest = iter(words)
    for word in rest:
        _refuse_code(word, word)
        name, _, value = word.partition("=")
        if name in OPTIONS:
            value = value or next(rest, "")
            require(bool(value), f"{name} names no directory: give one behind it")
            directory = _own_directory(Path(value))
        else:
            require(
                not word.startswith("-"),
                f"there is no option {word!r} here; a run is told by key=value, and by "
                "--config-dir DIR",
            )
            overrides.append(_quoted(word))
    return overrides, directory


def _quoted(word: str) -> str:
    """Quote a value that Hydra cannot read bare, as a path with spaces or letters of other scripts.

    Values that are quoted, or lists or objects, are left as they are.
    """
    key, _, value = word.partition("=")
    if not KEY.fullmatch(key) or not value or value != value.strip() or value[0] in "'\"[{":
        return word
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), value)
    quoted = f"{key}='{escaped}'"
    return quoted if not _can_be_read(word) and _can_be_read(quoted) else word


def _can_be_read(word: str) -> bool:
    """Whether Hydra can read an override."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _own_directory(path: Path) -> Path | None:
    """Check a directory of own configs."""
    require(path.is_dir(), f"--config-dir: there is no directory {str(path)!r}")
    path = path.resolve()
    if path == CONFIG_DIR:
        return None
    own = {file.relative_to(path) for file in path.glob("*/**/*.yaml")}
    for file in sorted(own):
        _refuse_code(str(file), (path / file).read_text(errors="replace"))
    hidden = sorted(str(file) for file in own if (CONFIG_DIR / file).is_file())
    require(
        not hidden,
        f"--config-dir: {', '.join(hidden)} under {path} would be hidden by the one of the same "
        "name that comes with marco_train: give it another name",
    )
    return path


def _refuse_code(where: str, text: str) -> None:
    """Refuse what Hydra's own nodes would name so, to be imported and called."""
    require("_target_" not in text, f"{where}: no config names code to run; leave _target_ out")


def _compose(overrides: Sequence[str], *directories: Path | None) -> DictConfig:
    """Compose a run; of two directories that have one file, the first one's is taken."""
    paths = [str(path).replace("\\", "\\\\").replace("'", "\\'") for path in directories if path]
    urls = ",".join(f"'file://{path}'" for path in paths)
    places = [f"hydra.searchpath=[{urls}]"] if paths else []
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        new = {place for place in map(_source_of, overrides) if place}
        if new:
            told = [word for word in overrides if _source_of(word) is None]
            known = hydra_compose("train", overrides=[*places, *told])
            new = {place for place in new if OmegaConf.select(known, place) is None}
        added = [f"+source@{place}=files" for place in sorted(new)]
        return hydra_compose("train", overrides=[*places, *added, *overrides])


def _refuse_undone(whole: DictConfig, overrides: Sequence[str], directory: Path) -> None:
    """Refuse an experiment of one's own that says what the one that it builds on says otherwise.

    It does where `_self_` stands before that one in its defaults.
    """
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    name = Path("experiment") / f"{chosen[-1] if chosen else None}.yaml"
    if not (directory / name).is_file():
        return
    own = OmegaConf.load(directory / name)
    order = list(own.get("defaults") or []) if isinstance(own, DictConfig) else []
    behind = order[order.index(SELF) + 1 :] if SELF in order else []
    others = [each for each in behind if isinstance(each, str)]
    if not others:
        return
    own.defaults = [*(each for each in order if each != SELF), SELF]
    with TemporaryDirectory() as mended:
        file = Path(mended) / name
        file.parent.mkdir(parents=True)
        file.write_text(f"# @package _global_\n{OmegaConf.to_yaml(own)}")
        says, runs = _values(_compose(overrides, Path(mended), directory)), _values(whole)
    undone = [f"{key}={value}" for key, value in says.items() if runs.get(key) != value]
    require(
        not undone,
        f"{name}: {', '.join(others)} stands behind {SELF} in its defaults, and undoes "
        f"{', '.join(undone)}: put the line `- {SELF}` last",
    )


def _values(node: Any, key: str = "") -> dict[str, Any]:
    """The values of a config by their keys, as they are written."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
    if not isinstance(node, dict):
        return {key: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _values(value, f"{key}.{name}".lstrip("."))
    return found


def _source_of(word: str) -> str | None:
    """The source that a word tells a field of; there may be none of that name yet."""
    found = re.match(r"(data\.(?:held_out\.)?sources\.[^.=]+)\.", word)
    return found[1] if found else None


def _explained(error: Exception, overrides: Sequence[str], directory: Path | None) -> str:
    """Say what is wrong with a composition, without the advice that Hydra gives."""
    said = str(error)
    cause = error.__cause__ or error.__context__
    if "requires --multirun" in said or said.startswith("Ambiguous value for argument"):
        return sweep_refusal(overrides)
    if said.startswith("Could not delete from config"):
        key = said.split("'")[1]
        return f"there is no {key} to delete{_known(key, overrides, directory)}"
    if isinstance(error, OverrideParseException):
        is_parted = SPACED.search(str(error.override))
        why = "it takes no spaces around =" if is_parted else _in_one_line(error)
        return f"{error.override!r} is no key=value that can be read: {why}"
    named = re.match(r"Could not override '(.+?)'", said)
    if named and "efault" in said:  # the defaults list
        near = re.search(r"Did you mean to override (\S+)\?", said)
        hint = f"did you mean {near[1]}?" if near else "see the run with --cfg job"
        return f"this run has no part that {named[1]} could choose; {hint}"
    if isinstance(cause, OmegaConfBaseException):
        return _wrong_field(error, cause, named[1] if named else None, overrides, directory)
    return _in_one_line(error)


def _wrong_field(
    error: Exception,
    cause: OmegaConfBaseException,
    override: str | None,
    overrides: Sequence[str],
    directory: Path | None,
) -> str:
    """Say which key is unknown, or which value does not fit."""
    of_file = re.match(r"In '(.+?)': ", str(error))
    where = f"{of_file[1]}.yaml: " if of_file else ""
    if of_file and str(cause.full_key) in {"experiment", of_file[1].replace("/", ".")}:
        return f"{where}an experiment begins with the line `# @package _global_`: add it"
    unknown = re.match(r"Key '(.+?)' (not in '|is not in struct)", str(cause))
    if unknown is None:
        text = MERGING.match(str(error))
        told = text[1] if text else str(cause.full_key or "")
        forms = f"; {HELD_OUT}" if told.lstrip("+~").startswith("data.held_out") else ""
        return f"{where}{_misfit(told, cause)}{forms}"
    key = str(cause.full_key or unknown[1])
    if override is not None and cause.object_type is dict and not cause.parent_node:
        return _nothing_there(overrides, directory)
    if key.startswith("data.held_out"):
        return f"{where}there is no {override or key}; {HELD_OUT}"
    owner = getattr(cause.object_type, "__name__", "")
    if (owner, unknown[1]) in MEANT:
        return f"{where}there is no {key}: {MEANT[owner, unknown[1]]}"
    named = override if override and override.startswith(key) else key
    return f"{where}there is no {named}{_known(key, overrides, directory, cause)}"


def _misfit(told: str, cause: BaseException) -> str:
    """Say that a value is none of its field, of `key=value`, or of a file's key alone."""
    said = str(cause).splitlines()[0]
    if "is not a ListConfig" in said:
        return _as_list(told)
    kind = re.search(r"(?:could not be converted to|is not a valid) (\w+)", said)
    return f"{told}: takes {TAKES[kind[1]]}" if kind and kind[1] in TAKES else f"{told}: {said}"


def _as_list(told: str) -> str:
    """Say how a list is written instead of a single value."""
    key, _, value = told.lstrip("+").partition("=")
    return f"{told}: {key} takes a list: write {key}=[{value or '...'}]"


def _known(
    key: str,
    overrides: Sequence[str],
    directory: Path | None,
    cause: OmegaConfBaseException | None = None,
) -> str:
    """Name the nearest keys, and those that stand where this one was looked for."""
    try:
        whole = _compose([word for word in overrides if not _is_of(word, key)], directory)
    except Exception:  # another word is wrong too, and is said by the next try
        whole = OmegaConf.create()
    there = sorted(_siblings(whole, key)) or _fields_of(cause)
    place, _, name = key.rpartition(".")
    meant = OTHERS_SAY.get(name, name)
    found = [meant] if meant in there else get_close_matches(name, there, 2, 0.6)
    near = [f"{place}.{each}".lstrip(".") for each in found]
    if not near:
        everywhere = list(_paths(whole))
        ends = [path for path in everywhere if path.rpartition(".")[2] == meant]
        near = ends[:3] or get_close_matches(key, everywhere, 1, 0.8)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    owner = place or "a run"
    return f"{hint} {owner} has {', '.join(there)}" if there else hint.rstrip(";")


def _is_of(word: str, key: str) -> bool:
    """Whether a word is about a key, or about what lies below it."""
    name = word.lstrip("+~").partition("=")[0]
    return name == key or name.startswith(f"{key}.")


def _siblings(whole: DictConfig, key: str) -> list[str]:
    """The keys that stand beside a key."""
    node: Any = whole
    for part in key.split(".")[:-1]:
        node = node._get_node(part) if isinstance(node, DictConfig) and part in node else None
        if not isinstance(node, DictConfig) or _is_empty(node):
            return []
    return [str(name) for name in node]


def _fields_of(cause: OmegaConfBaseException | None) -> list[str]:
    kind = None if cause is None else cause.object_type
    return [each.name for each in fields(kind)] if is_dataclass(kind) else []


def _paths(node: Any, above: str = "") -> Iterator[str]:
    """All keys of a config, with the keys above them."""
    if not isinstance(node, DictConfig) or _is_empty(node) or node._is_interpolation():
        return
    for name in map(str, node):
        yield f"{above}{name}"
        yield from _paths(node._get_node(name), f"{above}{name}.")


def _nothing_there(overrides: Sequence[str], directory: Path | None) -> str:
    """Say which word sets a field of a part that the run does not have."""
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        part = key.partition(".")[0]
        others = [each for each in overrides if "." not in each.partition("=")[0]]
        try:
            whole = _compose(others, directory)
        except Exception:
            break  # one of these is wrong, and is said once it is tried alone
        if "." in key and _is_empty(whole._get_node(part)):
            how = "experiment=<name>, or stage=sft|opd|evaluate"
            chosen = how if part in {"stage", "optim"} else f"an experiment that has a {part}"
            return f"{word} sets a field of {part}, and this run has no {part}: choose {chosen}"
        if _is_of(word, SHAPE) and _is_empty(whole.model._get_node("architecture")):
            return (
                f"{word}: {SHAPE} is null, as the model's files tell its shape; for a new model "
                "choose model=<group>, or give its shape in a file of --config-dir"
            )
    return f"one of {' '.join(overrides)} sets a field of a part that this run does not have"


def _is_empty(node: Any) -> bool:
    return node is not None and (node._is_none() or node._is_missing())


def _no_such_choice(error: MissingConfigException, directory: Path | None) -> str:
    """Say which choice of a group is unknown, with the nearest."""
    where = re.match(r"In '(.+?)': ", str(error))
    file = f"{where[1]}.yaml: " if where and where[1] != "train" else ""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = sorted(map(str, error.options or []))
    near = get_close_matches(name, options, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ";"
    top = directory is not None and (directory / f"{name}.yaml").is_file()
    lies = f" ({directory}/{name}.yaml has to lie in {directory}/{group}/)" if top else ""
    listed = f" known are {', '.join(options)}" if options else " there is no such group"
    return f"{file}there is no {group or 'config'} {name!r}{lies}{hint}{listed}"


def sweep_refusal(words: Sequence[str]) -> str:
    """Refuse several values of one key, with the loop that makes a run of each."""
    swept: dict[str, list[Any]] = {}
    kept: list[str] = []
    for word in words:
        try:
            (found,) = OverridesParser.create().parse_overrides([word])
        except (HydraException, ValueError):
            found = None
        if found is not None and found.is_sweep_override():
            swept[found.key_or_group] = [*found.sweep_string_iterator()]
        elif word not in {"--multirun", "-m"}:
            kept.append(word)
    jobs = [
        " ".join(f"{key}={value}" for key, value in zip(swept, values, strict=True))
        for values in product(*swept.values())
    ]
    named = " ".join(f"'{job}'" for job in jobs) if swept else "'seed=0' 'seed=1'"
    return (
        "several values of a key are several runs, and a launch is one (a list is written in "
        "brackets, as key=[a,b]). Make a run of each: "
        f"for job in {named}; do marco-train {' '.join(kept)} $job "
        '"output_dir=outputs/${job//[^a-zA-Z0-9.]/_}"; done'
    )


def _in_one_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if not line.startswith("See https://hydra")]
    return " ".join(" ".join(lines).split())
