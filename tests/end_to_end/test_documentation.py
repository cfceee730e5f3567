"""Every command that README and recipes show is tried, as far as there is no GPU and no hub."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from marco_train.commands.benchmark import as_overrides
from marco_train.commands.plan import answer
from marco_train.config.compose import read_curation, read_run
from tests.helpers.configs import compose_config
from tests.helpers.processes import REPOSITORY
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import overrides, run
from tests.helpers.world import World

README = REPOSITORY / "README.md"
READMES = [README, *sorted(REPOSITORY.glob("recipes/**/README.md"))]
ROWS = "recipes/own_data/rows.jsonl"
LAUNCHED = re.compile(r"-m marco_train\.train (.*)")
ASKED = re.compile(r"-m marco_train\.commands\.benchmark (.*)")
CURATED = re.compile(r"-m marco_train\.commands\.curate (.*)")


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), re.DOTALL)


def commands(readme: Path) -> Iterator[str]:
    """Each in one line, without what is said behind it."""
    for block in blocks(readme, "bash"):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if command := re.sub(r" +# .*", "", line).strip():
                yield command


SHOWN = [(readme, command) for readme in READMES for command in commands(readme)]


def bash(
    script: str, directory: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it where `marco-train` and `python` are those of these tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
    given = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-ec", script],
        cwd=directory,
        env=kept | given | environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@cache
def own_configs() -> TemporaryDirectory[str]:
    """The experiment that README shows, which is there until these tests end."""
    directory = TemporaryDirectory()
    (experiment,) = (block for block in blocks(README, "yaml") if "name: chats" in block)
    file = Path(directory.name) / "experiment" / "chats.yaml"
    file.parent.mkdir()
    file.write_text(experiment)
    return directory


def named(command: str, **paths: str | Path) -> str:
    """With paths in the place of what stands in angle brackets; without one, made-up ones."""
    for name, path in paths.items():
        command = command.replace(f"<{name}>", str(path))
    if "--config-dir mine" in command:
        command = command.replace("--config-dir mine", f"--config-dir {own_configs().name}")
    return re.sub(r"<[^>]+>|(?<==)\.\.\.", "/models/any", command)


def check_launch(words: str) -> None:
    """Compose what would be launched, and plan it where its shape is known without weights."""
    given = shlex.split(words)
    read_run(given)
    if re.search(r"experiment=(marco|qwen3)_(?!\S+tiny)\w+", words) and "tiny" not in words:
        answer([word for word in given if not re.search(r"\b(model|teacher)\.path=/", word)])


def check_plan(command: str) -> None:
    """Of what is known without weights."""
    answer(shlex.split(command)[2:])


def check_words(command: str) -> None:
    check_launch(re.sub(r"^marco-train (doctor )?", "", named(command)))


def check_recipe(command: str) -> None:
    """Have it print its launches, and check each."""
    command = re.sub(r"^recipes/supervise\.sh ", "", named(command))
    printed = bash(command, DRY_RUN="1", NPROC="2")
    assert printed.returncode == 0, printed.stderr
    launches = LAUNCHED.findall(printed.stdout)
    assert launches, printed.stdout
    for words in launches:
        check_launch(words)


def check_job(command: str) -> None:
    """Of Slurm; the batch script itself is run by test_slurm.py."""
    found = re.fullmatch(r"(?:\w+=(?:\"[^\"]*\"|\S+) )*sbatch (?:--\S+ )+(\S+) (.*)", command)
    assert found and (REPOSITORY / found[1]).is_file()
    check_recipe(found[2])


def check_printed(command: str) -> None:
    """Of a server, which needs vLLM, or of what asks one; it only prints what it would start."""
    printed = bash(named(command), DRY_RUN="1")
    assert printed.returncode == 0 and "python" in printed.stdout, printed.stderr


def check_benchmark(command: str) -> None:
    """Of its items and plan; test_benchmark.py runs it."""
    printed = bash(named(command), DRY_RUN="1")
    assert printed.returncode == 0, printed.stderr
    (words,) = ASKED.findall(printed.stdout)
    read_run(["experiment=benchmark", *as_overrides(shlex.split(words))])


def check_curation(command: str) -> None:
    """Of its config; test_curation_*.py run it on inputs that are here."""
    printed = bash(named(command), DRY_RUN="1")
    assert printed.returncode == 0, printed.stderr
    launches = CURATED.findall(printed.stdout)
    assert launches
    for words in launches:
        kind, *given = shlex.split(words)
        read_curation(kind, given)


def check_example(command: str) -> None:
    """Have it write its files."""
    with TemporaryDirectory() as directory:
        done = bash(command.replace(" recipes/", f" {REPOSITORY}/recipes/"), Path(directory))
        assert done.returncode == 0 and any(Path(directory).iterdir()), done.stderr


def check_download(command: str) -> None:
    """That it is what a config names."""
    name = command.removeprefix("hf download ")
    assert any(name in file.read_text() for file in REPOSITORY.glob("configs/**/*.yaml"))


def check_extra(command: str) -> None:
    (names,) = re.findall(r"marco-train\[([\w,]+)\]", command)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(names.split(",")) <= set(project["optional-dependencies"])


def check_script(command: str) -> None:
    """Of the project's own set-up and tests, which run these tests."""
    script, *options = command.split()
    assert os.access(REPOSITORY / script, os.X_OK)
    assert all(option in (REPOSITORY / script).read_text() for option in options)


# What is run as it stands: by a test below, by test_plan.py, and the last by test_recipes.py.
RUN = re.compile(
    r"python scripts/(checkpoint|decontaminate|compare_benchmarks)\.py|python scripts/plan\.py"
    r"|marco-train (card|signatures) "
)


def is_run(readme: Path, command: str) -> bool:
    """Whether another test runs it."""
    own = readme == README and "rows.jsonl" in command
    return own or readme.parent.name == "own_data" or RUN.match(command) is not None


CHECKS: list[tuple[str, Callable[[str], None]]] = [
    (r"scripts/(test|check|setup\w*)\b", check_script),
    (r"marco-train plan ", check_plan),
    (r"marco-train (doctor )?(--config-dir \S+ )?experiment=", check_words),
    (r"recipes/benchmark\.sh ", check_benchmark),
    (r"recipes/curation/", check_curation),
    (r"python recipes/curation/example\.py ", check_example),
    (r"(\w+=\S+ )*recipes/(run\.sh chats|supervise\.sh |[\w.]+/\w+\.sh)", check_recipe),
    (r"(\w+=(\"[^\"]*\"|\S+) )*sbatch ", check_job),
    (r"(scripts/serve_sampler|recipes/serve_teacher)\.sh ", check_printed),
    (r"hf download ", check_download),
    (r"pip install ", check_extra),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readme", "command"),
    [each for each in SHOWN if not is_run(*each)],
    ids=lambda part: str(part.relative_to(REPOSITORY)) if isinstance(part, Path) else part,
)
def test_a_command_that_is_shown_can_be_given(readme: Path, command: str) -> None:
    checks = [check for pattern, check in CHECKS if re.match(pattern, command)]
    assert checks, f"say in CHECKS how {command!r} of {readme} is tried"
    checks[0](command)


def shown(pattern: str) -> list[str]:
    """The commands that are run here, so that none is left out unseen."""
    found = [command for _, command in SHOWN if re.match(pattern, command)]
    assert found
    return found


@pytest.mark.slow
@pytest.mark.long
def test_commands_on_checkpoints_do_what_is_said(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = overrides("sft", world, out, 1)
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", None)
    paths = {"output_dir": out, "checkpoint": out / "checkpoints" / "step_000003"}
    script = "\n".join(
        named(command, **paths, directory=tmp_path / "model", shards=tmp_path)
        for command in shown(r"python scripts/checkpoint\.py")
    )
    done = bash(script)
    assert done.returncode == 0, done.stderr
    assert "000003" in done.stdout and "is what was written" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "step_000003" / "rank_000.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_commands_on_rows_and_reports_do_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    shutil.copy(REPOSITORY / ROWS, tmp_path / "rows.jsonl")
    first = json.loads((REPOSITORY / ROWS).read_text().splitlines()[0])["messages"][0]["content"]
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "mine.jsonl").write_text(json.dumps({"question": first}) + "\n")
    for command in shown(r"python scripts/decontaminate\.py"):
        done = bash(named(command, directory="questions"), tmp_path)
        assert done.returncode in {0, 1}, done.stderr
        assert json.loads((tmp_path / "hits.json").read_text())["hits"][0]["row"] == 0
    for name, right in (("before", [1, 0]), ("after", [1, 1])):
        item = {"row": "MMLU", "id": "en/0", "language": "en", "right": right}
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "items.jsonl").write_text(json.dumps(item) + "\n")
    for command in shown(r"python scripts/compare_benchmarks\.py"):
        done = bash(command, tmp_path)
        assert done.returncode == 0 and "MMLU" in done.stdout, done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_own_data_is_trained_on_as_the_readme_says(tmp_path: Path) -> None:
    """Three rows and an experiment of README, from a model that is made on the spot."""
    (rows,) = (block for block in blocks(README, "json") if '"messages"' in block)
    (experiment,) = (block for block in blocks(README, "yaml") if "name: chats" in block)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "chats.yaml").write_text(experiment)
    (block,) = (block for block in blocks(README, "bash") if "data.path=rows.jsonl" in block)
    model = tmp_path / "model"
    script = [
        f"python {REPOSITORY}/recipes/own_data/make_model.py --out {model}",
        named(block, model=model, teacher=model),
        f"marco-train --config-dir mine experiment=chats model.path={model}",
    ]
    assert "`marco-train --config-dir mine experiment=chats`" in README.read_text()
    done = bash("\n".join(script), tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("sft", "opd", "chats"):
        assert (tmp_path / "outputs" / name / "export" / "model.safetensors").is_file()
