"""The recipes as a newcomer runs them, in a fresh clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from marco_train.models import load_model
from tests.helpers.processes import REPOSITORY

RECIPES = sorted(
    p.relative_to(REPOSITORY)
    for p in REPOSITORY.glob("recipes/*/*.sh")
    if os.access(p, os.X_OK) and p.parent.name != "curation"  # which trains nothing
)
MISSIONS = {
    f"recipes/marco_{name}/run.sh": sizes
    for name, sizes in (("mini", ("256", "768")), ("nano", ("232", "384")))
}
"""Recipes that chain all parts, with the number of experts and their width."""
LAUNCH = "python -m marco_train.commands.launch"
ALONE = ("quickstart_base", "quickstart_teacher_first", "quickstart_teacher_second")
"""Stages of the quickstart on one process each."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of what is committed, with this environment in the place of a new one."""
    path = tmp_path_factory.mktemp("clone") / "marco_train"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, path], check=True)
    (path / ".venv").symlink_to(Path(sys.prefix))
    # With other requirements committed than installed, the clone's scripts/setup would install the
    # clone into this environment.
    wanted = subprocess.run(
        'eval "$(grep ^stamp= scripts/setup)"; echo "$stamp"',
        shell=True,
        cwd=path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert (path / wanted).exists(), (
        "commit pyproject.toml and scripts/, and run scripts/setup, before this test"
    )
    return path


def run(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    # The environment is this checkout's: the clone's own package has to come first.
    kept["PYTHONPATH"] = str(directory)
    return subprocess.run(
        command,
        cwd=directory,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def commands_of_the_readme() -> list[str]:
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line.split("#")[0].strip() for line in blocks[0].splitlines() if line.strip()]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert commands_of_the_readme() == ["recipes/quickstart/run.sh", "scripts/test"]


def test_the_readme_shows_the_loop_as_it_stands() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(for step in run\.steps.*?)```", readme, re.DOTALL)
    source = (REPOSITORY / "marco_train" / "stages" / "opd.py").read_text()
    assert textwrap.indent(shown, " " * 8) in source


def single_process_weights(clone: Path, out: Path) -> list[bytes]:
    """What one process learns, without torchrun and with it, where a run allows it."""
    single = ["experiment=quickstart_teacher_first", f"root={out}", "stage.max_steps=2"]
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    ways = {
        "plain": [sys.executable],
        "launched": [torchrun, "--standalone", "--nproc_per_node=1"],
    }
    weights = []
    for name, command in ways.items():
        target = f"output_dir={out / name}"
        done = run(
            clone,
            *(*command, "-m", "marco_train.train", *single, target),
            OMP_NUM_THREADS="1",  # with more threads, sums may be split in another way
        )
        assert "step 2/2 | loss" in done.stdout, done.stderr
        weights.append((out / name / "export" / "model.safetensors").read_bytes())
    return weights


@pytest.mark.slow
@pytest.mark.long
def test_the_main_job_runs_in_a_fresh_clone(clone: Path) -> None:
    out = clone / "outputs" / "trial"
    command, tests = commands_of_the_readme()
    tiny = [
        *(f"root={out}", "stage.max_steps=2"),
        *("evaluate.stage.num_prompts=20", "evaluate.stage.signatures=true"),
        *("opd.export.card=true", "seed=3"),
    ]
    done = run(clone, command, *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 3
    stages = "data base teacher_first teacher_second student sft opd evaluate total"
    assert list(summary["wall_seconds"]) == stages.split(" ")
    assert all(seconds > 0 for seconds in summary["wall_seconds"].values())
    assert list(summary["models"]) == ["sft", "opd_first", "opd_second"]
    categories = {
        *("all", "alignment", "instruction_following"),
        *("knowledge_reasoning", "math", "multilingual"),
    }
    for found in summary["models"].values():
        assert set(found["avg_at_8"]) == categories
        assert all(0 <= value <= 100 for value in found["avg_at_8"].values())
        assert set(found["reverse_kl"]) == {"first", "second"}
        assert all(value > 0 for value in found["reverse_kl"].values())
    signatures = json.loads((out / "evaluate" / "signatures.json").read_text())
    assert list(signatures) == list(summary["models"])
    for found in signatures.values():
        languages = len(found["languages"])
        assert languages > 1
        assert torch.tensor(found["expert_shares"]).shape == (languages, 2, 16)
        assert torch.tensor(found["distances"]).shape == (languages, languages)
    assert {set(t["avg_at_8"]) == categories for t in summary["teachers"].values()} == {True}
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "OPD, second teacher" in done.stdout
    assert done.stdout.count("expected  ") == 5

    export = clone / summary["export"]
    check_export(export)
    card = ModelCard.load(export / "README.md")
    assert card.data.get("tags") == [
        *("marco-train", "supervised-fine-tuning", "on-policy-distillation")
    ]
    assert "upcycled to 16 experts of width 48, top-4, 0.25 of each drawn anew" in card.text

    again = run(clone, command, *tiny)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("already finished in") == 6
    assert json.loads((out / "summary.json").read_text()) == summary
    other = run(clone, command, *tiny[:-1], "seed=4")
    assert other.returncode != 0
    assert (
        "holds a finished run of another config (then -> now): data: seed: 3 -> 4" in other.stderr
    )

    for stage in ("sft", "opd"):
        alone = run(clone, f"recipes/quickstart/{stage}.sh", *tiny)
        assert alone.returncode == 0, alone.stdout + alone.stderr
        assert f"quickstart_{stage}: already finished" in alone.stdout

    weights = single_process_weights(clone, out)
    assert weights[0] == weights[1]

    own = run(clone, tests, "tests/invariants/test_mixture.py")
    assert own.returncode == 0, own.stdout + own.stderr
    assert "passed" in own.stdout


# Behind the stages of the quickstart: what a stage does here, and a script shaped like `run.sh`.
STAND_IN = """
source recipes/quickstart/stages.sh
stage() {{ echo "$1 begins"; trap 'echo "$1 saves"; exit 143' TERM; {beside}; echo "$1 ends"; }}
beside one experiment "$@"
{follows}
joined
echo all done
"""


# What a test began with is ignored by bash for good, and a suite in the background ignores SIGINT.
HEARING_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("beside", "follows", "status", "says", "log"),
    [
        ("true", "true", 0, "all done", "one begins\none ends\n"),
        ("exit 2", "true", 2, "one begins", "one begins\n"),
        # Whatever ends the script, the stage beside it is told, and waited for.
        ("sleep 30 & wait $!", "sleep 1; exit 3", 3, "", "one begins\none saves\n"),
        ("sleep 30 & wait $!", "sleep 1; kill -INT $$", -2, "", "one begins\none saves\n"),
        ("sleep 30 & wait $!", "sleep 1; kill -TERM $$", -15, "", "one begins\none saves\n"),
    ],
    ids=["both end well", "it fails", "the script fails", "interrupted", "told to end"],
)
def test_a_stage_beside_others_ends_with_them(
    beside: str, follows: str, status: int, says: str, log: str, tmp_path: Path
) -> None:
    script = STAND_IN.format(beside=beside, follows=follows)
    words = ("bash", "-c", script, "quickstart", f"root={tmp_path}")
    done = run(REPOSITORY, sys.executable, "-c", HEARING_SIGINT, *words)
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert ("all done" in done.stdout) == (status == 0)
    assert (tmp_path / "one.log").read_text() == log


def check_export(path: Path) -> None:
    """The export is what transformers and we agree on."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Translate to Urdu: April"}], add_generation_prompt=True
    )
    ids = torch.tensor([rendered["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = load_model(path, torch.float32)
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        found = ours.logits(ours(ids, torch.arange(ids.shape[1])[None]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if str(r) not in MISSIONS], ids=str)
def test_every_recipe_prints_its_launches_without_a_gpu(recipe: Path) -> None:
    done = run(REPOSITORY, str(recipe), "seed=5", DRY_RUN="1", NPROC="2", MASTER_ADDR="10.0.0.1")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines
    for line in lines:
        ranks = 1 if any(name in line for name in ALONE) else 2
        assert line.startswith(
            f"{LAUNCH} --standalone --nproc_per_node {ranks} -m marco_train.train "
        )
        assert line.endswith("seed=5")


@pytest.mark.parametrize("recipe", MISSIONS)
def test_a_mission_prints_all_that_it_would_launch(recipe: str) -> None:
    words = ["dense=org/dense", "root=R", "seed=5", "opd.stage.max_steps=2", "sft.optim.eps=1e-7"]
    done = run(REPOSITORY, recipe, *words, DRY_RUN="1", NPROC="2")
    assert done.returncode == 0, done.stderr
    name, (experts, width) = Path(recipe).parent.name, MISSIONS[recipe]
    launched = f"{LAUNCH} --standalone --nproc_per_node 2 -m"
    assert [line.strip() for line in done.stdout.splitlines()] == [
        f"python scripts/upcycle.py --dense org/dense --out R/{name}_base --num-experts {experts} "
        f"--expert-width {width} --top-k 8",
        f"{launched} marco_train.train experiment={name}_sft model.path=R/{name}_base root=R "
        "seed=5 optim.eps=1e-7",
        f"{launched} marco_train.train experiment={name}_opd model.path=R/{name}_sft/export "
        "root=R seed=5 stage.max_steps=2",
        f"{launched} marco_train.commands.benchmark model.path=R/{name}_opd/export root=R "
        f"name={name}_benchmark suite=card rollout@stage.rollout=vllm seed=5",
        f"python -m marco_train.commands.verbs card R/{name}_opd --benchmark R/{name}_benchmark",
    ]
    given = run(REPOSITORY, recipe, "model.path=base", DRY_RUN="1", NODE_RANK="1")
    lines = given.stdout.splitlines()
    assert len(lines) == 3  # the other parts are the first node's
    assert f"experiment={name}_sft model.path=base root=outputs" in lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no base: give model.path=<base>, dense=<dense Qwen3>, or scale=tiny"),
        (["model.path=a", "dense=b"], "model.path=a and dense=b: give one of them"),
        (["scale=small"], "scale=small is unknown"),
        (["scale=tiny", "dense=b"], "scale=tiny makes its own base"),
        (["scale=tiny", "opd.stage.num_steps=2"], "each phase of the cascade has its own: give"),
        (["model.path=a", "benchmark.suite=mmmlu2"], "'mmmlu2', which is no suite and no task"),
        (["model.path=a", "output_dir=o"], "output_dir=o would be that of every part"),
    ],
)
def test_a_mission_that_is_not_clear_is_refused(words: list[str], says: str) -> None:
    done = run(REPOSITORY, "recipes/marco_mini/run.sh", *words)
    assert done.returncode == 2
    assert says in done.stderr and not done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_mission_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    command = ["recipes/marco_nano/run.sh", "scale=tiny", f"root={root}"]
    stopped = run(REPOSITORY, *command, "opd.stage.cascade.first.teacher.path=nowhere")
    assert stopped.returncode == 2, stopped.stderr
    assert "marco_tiny_sft: finished" in stopped.stdout
    assert "nowhere" in stopped.stderr.splitlines()[-1]

    done = run(REPOSITORY, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{root}/marco_tiny_base: already upcycled from" in done.stdout
    assert "marco_tiny_sft: already finished" in done.stdout
    assert "ranks      2, experts over 2" in done.stdout
    assert "step 12/12 | phase second" in done.stdout
    assert (
        len(json.loads((root / "marco_tiny_benchmark" / "benchmark.json").read_text())["rows"])
        == 28
    )
    assert list((root / "marco_tiny_opd" / "wandb").glob("offline-run-*"))
    export = root / "marco_tiny_opd" / "export"
    text = (export / "README.md").read_text()
    noted = json.loads((root / "marco_tiny_opd" / "finished.json").read_text())["content"]
    for phase, kind in (("first", "native"), ("second", "hf")):
        digest = noted[f"stage.cascade.{phase}.teacher.path"]["digest"][:12]
        assert f"| {phase} | all | `teacher_{phase}` | {kind} | sha256 `{digest}` |" in text
    (code,) = re.findall(r"```python\n(.*?)```", ModelCard(text).text, flags=re.DOTALL)
    loaded = run(export, sys.executable, "-c", code)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("<|im_start|>user")

    again = run(REPOSITORY, *command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") == 3
    assert (export / "README.md").read_text() == text


def test_two_nodes_meet_at_a_master() -> None:
    done = run(
        REPOSITORY,
        "recipes/marco_mini/opd.sh",
        DRY_RUN="1",
        NPROC="8",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
    )
    assert done.stdout.strip() == (
        f"{LAUNCH} --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "--nproc_per_node 8 -m marco_train.train experiment=marco_mini_opd"
    )


def test_the_recipe_of_benchmarks_launches_their_verb() -> None:
    words = ["model.path=m", "suite=mmlu,gsm8k", "plan=true"]
    done = run(REPOSITORY, "recipes/benchmark.sh", *words, DRY_RUN="1", NPROC="2")
    assert done.stdout.strip() == (
        f"{LAUNCH} --standalone --nproc_per_node 2 -m marco_train.commands.benchmark "
        "model.path=m suite=mmlu\\,gsm8k plan=true"
    )


def test_the_recipe_of_benchmarks_refuses_a_wrong_task_before_torch_is_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    paths = f"{tmp_path}:{REPOSITORY}"
    words = ["model.path=m", "suite=gsm8kk"]
    done = run(REPOSITORY, "recipes/benchmark.sh", *words, PYTHONPATH=paths)
    assert done.returncode == 2
    assert "did you mean gsm8k?" in done.stderr


@pytest.mark.parametrize(
    ("visible", "cores", "launched", "threads"),
    [
        (None, 64, 8, 8),
        ("0,1,4,5", 12, 4, 3),
        ("GPU-5a5a5a5a", 4, 1, 4),
        ("0,1,2,3,4,5,6,7", 4, 8, 1),
        ("", 64, 1, 1),
        ("-1", 64, 1, 1),
    ],
)
def test_a_launch_has_the_visible_gpus_and_shares_the_cores(
    tmp_path: Path, visible: str | None, cores: int, launched: int, threads: int
) -> None:
    """On a node of eight GPUs."""
    programs = {
        "nvidia-smi": "printf 'GPU %d: H100\\n' 0 1 2 3 4 5 6 7",
        "nproc": f"echo {cores}",
        "python": 'echo "$OMP_NUM_THREADS threads: $*"',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "there" / "recipes")  # away from .venv
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    path = f"{tmp_path}:/usr/bin:/bin"
    done = run(tmp_path, "there/recipes/marco_mini/sft.sh", PATH=path, **given)
    assert done.stdout.startswith(
        f"{threads} threads: -m marco_train.commands.launch --standalone --nproc_per_node "
        f"{launched} -m marco_train.train "
    )


def test_a_server_is_printed_without_being_started(tmp_path: Path) -> None:
    recipe, python = tmp_path / "recipes" / "serve_teacher.sh", tmp_path / "python"
    recipe.parent.mkdir()
    shutil.copy(REPOSITORY / "recipes" / recipe.name, recipe)  # away from this environment
    python.write_text(
        "#!/usr/bin/env bash\nprintf '%q ' python \"$@\" > started; echo >> started\n"
    )
    python.chmod(0o755)
    given = [str(recipe), "/models/the teacher", "--seed", "3"]
    path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
    done = run(tmp_path, *given, DRY_RUN="1", PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "python -m vllm.entrypoints.openai.api_server --model /models/the\\ teacher "
        "--served-model-name teacher --host 127.0.0.1 --port 8000 "
        "--max-model-len 10242 --max-num-batched-tokens 32768 "
    )
    assert " --generation-config vllm " in done.stdout  # a model's own settings do not count
    assert not (tmp_path / "started").exists()
    started = run(tmp_path, *given, PATH=path)
    assert started.returncode == 0, started.stderr
    assert (tmp_path / "started").read_text() == done.stdout
    several = run(tmp_path, *given, DRY_RUN="1", PATH=path, API_SERVERS="4")
    assert several.stdout.startswith(
        "vllm serve /models/the\\ teacher --api-server-count 4 --served"
    )
    assert done.stdout.endswith(" --seed 3 \n")


@pytest.mark.parametrize(("window", "longest"), [(256, 256), (262144, 10242)])
def test_a_server_reads_no_longer_sequences_than_are_scored(
    tmp_path: Path, window: int, longest: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": window}))
    command = ["recipes/serve_teacher.sh", str(tmp_path)]
    assert f"--max-model-len {longest} " in run(REPOSITORY, *command, DRY_RUN="1").stdout
    stated = run(REPOSITORY, *command, DRY_RUN="1", MAX_MODEL_LEN="99").stdout
    assert "--max-model-len 99 " in stated


SERVERS = ["recipes/serve_teacher.sh", "scripts/serve_sampler.sh"]


def server_command(script: str, *options: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Have a script print what it would start."""
    return subprocess.run(
        [str(REPOSITORY / script), "/model", *options],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "DRY_RUN": "1"} | given,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SERVERS)
@pytest.mark.parametrize(
    ("host", "options"), [("0.0.0.0", []), ("10.0.0.3", []), (None, ["--host", "0.0.0.0"])]
)
def test_a_server_that_others_reach_needs_a_key(
    script: str, host: str | None, options: list[str]
) -> None:
    given = {"HOST": host} if host else {}
    refused = server_command(script, *options, **given)
    assert refused.returncode == 2
    assert "is reached by others" in refused.stderr and "set VLLM_API_KEY" in refused.stderr
    taken = server_command(script, *options, **given, VLLM_API_KEY="the-key")
    assert taken.returncode == 0
    assert "--middleware marco_train.inference.key.RequireKey" in taken.stdout
    assert "the-key" not in taken.stdout  # which every user of the machine could read


@pytest.mark.parametrize("script", SERVERS)
def test_a_server_listens_to_this_machine_alone_unless_asked(script: str) -> None:
    done = server_command(script)
    assert "--host 127.0.0.1 " in done.stdout and "RequireKey" not in done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_for_own_data_are_those_of_its_readme(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    verb = tmp_path / "bin" / "marco-train"
    verb.parent.mkdir()
    verb.write_text(f'#!/bin/sh\nexec {sys.executable} -m marco_train.commands.verbs "$@"\n')
    verb.chmod(0o755)
    text = (tmp_path / "recipes" / "own_data" / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    path = f"{verb.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    for block in blocks:
        done = run(
            tmp_path,
            "bash",
            "-ec",
            block,
            PATH=path,
            PYTHONPATH=str(REPOSITORY),
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stdout + done.stderr
    outputs = tmp_path / "outputs" / "own_data"
    lines = (outputs / "sft" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss/cross_entropy"] < 0.1
    kl = [json.loads(line)["kl/reverse"] for line in (outputs / "opd" / "metrics.jsonl").open()]
    assert sum(kl[-5:]) < 0.9 * sum(kl[:5])
    assert "all is well" in done.stdout
    # Eighteen rows are one smaller batch.
    (line,) = (outputs / "words" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["data/num_sequences"] == 18
    assert json.loads(line)["eval/cross_entropy"] > 0
