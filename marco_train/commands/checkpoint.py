"""Look at the checkpoints of a run, and make a model of one, without a GPU or a launcher."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from marco_train.checkpoint import StoredState, convert_checkpoint, read_state
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.manifest import MANIFEST, STATE, fault_of, faults_of
from marco_train.config.model import ChatTemplate, ModelConfig
from marco_train.config.resumption import complete_checkpoints, read_note
from marco_train.data.chat import load_tokenizer
from marco_train.errors import InputError, require
from marco_train.models.hf_io import write_directory
from marco_train.models.weights import ALL_EXPERTS, meta_model, single_experts

MIB = 2**20


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says; ends with 1 where a checkpoint is damaged."""
    args = _parser().parse_args(words)
    do: Callable[[argparse.Namespace], bool] = args.do
    try:
        is_well = do(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_well = True
    sys.exit(0 if is_well else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("marco-train checkpoint", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="list|verify|show|export|convert")

    def verb(name: str, do: Callable[[argparse.Namespace], bool], path: str) -> Any:
        assert do.__doc__ is not None
        found = verbs.add_parser(name, help=do.__doc__, description=do.__doc__)
        found.add_argument("path", type=Path, help=path)
        found.set_defaults(do=do)
        return found

    verb("list", list_checkpoints, "a run's directory")
    verb("verify", verify, "a run's directory, or a checkpoint")
    verb("show", show, "a checkpoint")
    exports = verb("export", export, "a checkpoint")
    exports.add_argument("out", type=Path, help="the Hugging Face directory to write")
    exports.add_argument("--tokenizer", help="where its files lie now; the run's if absent")
    converts = verb("convert", convert, "a checkpoint")
    converts.add_argument("out", type=Path, help="where its step_* directory appears")
    converts.add_argument(
        "--ranks", type=int, default=1, help="as whose checkpoint it is written; 1: in one file"
    )
    return parser


def list_checkpoints(args: argparse.Namespace) -> bool:
    """List the checkpoints of a run, newest first; of their files only the sizes are looked at."""
    rows: list[tuple[str, ...]] = [("updates", "saved", "MiB", "ranks", "phase", "")]
    well = True
    for path in _checkpoints_of(args.path):
        size = sum(file.stat().st_size for file in path.iterdir())
        saved = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime)
        says = [path.name.removeprefix("step_"), f"{saved:%Y-%m-%d %H:%M:%S}", f"{size / MIB:.1f}"]
        ranks = len(list(path.glob("rank_*")))
        fault = fault_of(path, digested=())
        phase = "" if fault else read_note(path / STATE).get("cascade", {}).get("phase") or ""
        rows.append((*says, str(ranks), phase, fault or "complete"))
        well = well and fault is None
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    return well


def verify(args: argparse.Namespace) -> bool:
    """Digest every file of a checkpoint, or of all of a run, and say which are damaged."""
    well = True
    for path in _checkpoints_of(args.path):
        faults = list(faults_of(path))
        for fault in faults:
            print(fault)
        if not faults:
            print(f"{path} is what was written")
        well = well and not faults
    return well


def show(args: argparse.Namespace) -> bool:
    """Say what a checkpoint is of, and list its parameters with their types, shapes and files."""
    stored, state = StoredState(args.path), read_state(args.path)
    config = state["config"]
    shapes = stored.shapes
    print(f"{config['name']}: {config['stage']['kind']}, {state['num_updates']} updates")
    print(
        f"optimizer: {stored.optimizer_steps} steps, learning rate over {state['schedule_steps']}"
    )
    print(f"parameters: {sum(map(math.prod, shapes.values())):,}, each with master and two moments")
    width = max(map(len, shapes))
    for name, shape in shapes.items():
        dtype = str(stored.dtype(name)).removeprefix("torch.")
        print(f"{name:{width}}  {dtype}  {list(shape)}  {', '.join(stored.files(name))}")
    return True


def export(args: argparse.Namespace) -> bool:
    """Write the weights of a checkpoint as a Hugging Face directory."""
    for fault in faults_of(args.path):
        raise InputError(fault)
    stored, state = StoredState(args.path), read_state(args.path)
    model, architecture = state["config"]["model"], ArchitectureConfig(**state["architecture"])
    tokenizer = load_tokenizer(
        ModelConfig(
            path=model["path"],
            architecture=architecture,
            tokenizer=args.tokenizer or model["tokenizer"],
            chat_template=ChatTemplate(model["chat_template"]),
        )
    )
    names = [name for name, _ in meta_model(architecture).named_parameters()]
    weights = single_experts(((name, stored.weight(name)) for name in names), ALL_EXPERTS)
    dtype = stored.dtype(names[0])
    directory = Path(tokenizer.path)
    write_directory(args.out, architecture, dtype, weights, directory, tokenizer.chat_template)
    print(f"wrote {args.out}: {dtype}, after {state['num_updates']} updates")
    return True


def convert(args: argparse.Namespace) -> bool:
    """Write a checkpoint anew as another number of ranks would have saved it."""
    require(args.ranks > 0, f"--ranks is {args.ranks}: give 1 or more")
    for fault in faults_of(args.path):
        raise InputError(fault)
    try:
        made = convert_checkpoint(args.path, args.out, args.ranks)
    except OSError as error:
        raise InputError(f"{args.out} cannot be written: {error}") from error
    print(f"wrote {made}, as of {args.ranks} ranks")
    return True


def _checkpoints_of(path: Path) -> Iterator[Path]:
    """A checkpoint, or those of a run.

    Raises:
        InputError: There is none.
    """
    if (path / MANIFEST).is_file():
        yield path
        return
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    require(bool(found), f"{path} holds no complete checkpoint (checkpoints/step_*/{MANIFEST})")
    yield from found
