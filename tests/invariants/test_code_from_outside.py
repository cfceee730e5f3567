"""Nothing that comes from outside is run: no pickles, no code in files, configs or servers."""

import ast
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marco_train.config.compose import compose
from marco_train.errors import InputError
from marco_train.inference.protocol import read_array
from tests.helpers.processes import REPOSITORY, launch

# What runs what it is given, or loads what may.
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "instantiate",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "dist.all_gather_object",
    "dist.gather_object",
    "dist.broadcast_object_list",
    "dist.scatter_object_list",
    "dist.send_object_list",
    "dist.recv_object_list",
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy"}


def faults_of(code: str) -> Iterator[str]:
    """What in a file could run what comes from outside."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}"] if f"{node.module}".split(".")[0] in FORBIDDEN_MODULES else []
            )
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name in FORBIDDEN_CALLS or given.get("shell", "False") != "False":
                yield name
            if name == "torch.load" and given.get("weights_only") != "True":
                yield name
            if name in {"np.load", "numpy.load"} and given.get("allow_pickle") != "False":
                yield name
            if given.get("trust_remote_code", "False") != "False":
                yield f"{name} with trust_remote_code"


FILES = sorted(
    file
    for directory in ("marco_train", "scripts", "recipes")
    for file in (REPOSITORY / directory).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_no_file_runs_what_comes_from_outside(file: Path) -> None:
    assert list(faults_of(file.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "yaml.load(text)",
        "dist.all_gather_object(found, value)",
        "AutoModel.from_pretrained(path, trust_remote_code=cfg.trust)",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert len(list(faults_of(line))) == 1


@pytest.mark.parametrize(
    "given",
    [
        "+model._target_=os.getcwd",
        "+hydra.callbacks.mine._target_=os.getcwd",
        "hydra.launcher._target_=os.getcwd",
    ],
)
def test_no_config_names_code(given: str) -> None:
    done = launch("experiment=quickstart_sft", given)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == f"error: {given}: no config names code to run; leave _target_ out\n"


def test_no_file_of_own_configs_names_code(tmp_path: Path) -> None:
    own = tmp_path / "experiment" / "mine.yaml"
    own.parent.mkdir()
    own.write_text("hydra:\n  callbacks:\n    mine:\n      _target_: os.getcwd\n")
    with pytest.raises(InputError) as refused:
        compose(["experiment=mine", "--config-dir", str(tmp_path)])
    assert str(refused.value) == (
        "experiment/mine.yaml: no config names code to run; leave _target_ out"
    )


class Planted:
    """What makes a file where its pickle is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_an_array_of_a_server_that_would_run_something_runs_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    content = io.BytesIO()
    np.save(content, np.array([Planted(run)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array({"scores": base64.b64encode(content.getvalue()).decode()}, "scores")
    assert not run.exists()
    content.seek(0)
    np.load(content, allow_pickle=True)
    assert run.exists()
