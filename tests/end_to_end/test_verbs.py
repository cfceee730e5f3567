"""One command with verbs, each of which a script calls too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from marco_train.commands.benchmark import as_overrides
from marco_train.commands.env import VARIABLES, facts
from marco_train.commands.verbs import VERBS, main
from tests.helpers.processes import REPOSITORY
from tests.helpers.world import World

SCRIPTS = {
    "doctor": "doctor.py",
    "plan": "plan.py",
    "inspect": "inspect_data.py",
    "decontaminate": "decontaminate.py",
    "upcycle": "upcycle.py",
}


def said(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit status of a command line, or what it ends with, and what it prints."""
    try:
        main(words)
    except SystemExit as end:
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from marco_train.commands.verbs import main\n"
        "main(['--help'])\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(verb, "--help", capsys=capsys)
    assert code in {0, None}
    assert f"marco-train {verb}" in " ".join(out.replace("[", "").replace("]", "").split())


@pytest.mark.parametrize(("verb", "file"), SCRIPTS.items())
def test_a_script_is_its_verb(verb: str, file: str) -> None:
    module = VERBS[verb][0]
    text = (REPOSITORY / "scripts" / file).read_text()
    assert f"from {module} import main" in text
    assert len(text.splitlines()) == 6


def test_training_needs_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=quickstart_sft", "--cfg", "job"]
    assert said(*words, capsys=capsys) == said("train", *words, capsys=capsys)
    code, _ = said("optim.clip_norm=0", "experiment=quickstart_sft", capsys=capsys)
    assert code == "error: optim.clip_norm is 0.0, and must be greater than 0"


def test_a_check_compares_the_values_and_looks_for_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["experiment=marco_mini_opd", "model.path=nowhere", f"root={tmp_path}", "--check"]
    assert said(*words, capsys=capsys) == (None, "")
    code, _ = said(*words, "optim.clip_norm=0", capsys=capsys)
    assert code == "error: optim.clip_norm is 0.0, and must be greater than 0"
    assert not list(tmp_path.iterdir())


def test_the_keys_of_a_benchmark_need_no_prefix() -> None:
    words = ["model.path=m", "suite=mmlu,gsm8k", "languages=[de,fr]", "data_dirs.cmmlu=d"]
    assert list(as_overrides([*words, "stage.plan=true", "seed=5", "--cfg", "job"])) == [
        "model.path=m",
        "stage.suite='mmlu,gsm8k'",
        "stage.languages=[de,fr]",
        "stage.data_dirs.cmmlu=d",
        *("stage.plan=true", "seed=5", "--cfg", "job"),
    ]


def test_an_unknown_verb_is_named_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _ = said("docter", "experiment=quickstart_sft", capsys=capsys)
    assert str(code).startswith("error: there is no verb 'docter'; did you mean doctor? known are ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said("--version", capsys=capsys)
    assert code == 0
    assert out.startswith("marco-train 0.")


def test_env_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = dict(facts())
    assert {"marco-train", "torch", "vllm", "python", "driver", "commit"} <= found.keys()
    assert "HF_HUB_OFFLINE=1" in found["set"]
    text = str(found)
    assert "a-secret" not in text and str(Path.home()) not in text
    assert not [name for name in VARIABLES if "KEY" in name or "TOKEN" in name]


def test_upcycle_does_not_overwrite_unasked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = ["upcycle", "--dense", str(tmp_path / "dense"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="holds something already: choose another directory, or"):
        main([*words, "--num-experts", "8", "--expert-width", "16", "--top-k", "2"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_upcycling_again_finds_what_was_made_of_the_same_model(
    own_world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = own_world.path("teacher_first", "export"), Path(own_world.path("moe"))
    words = ["upcycle", "--dense", dense, "--out", str(out)]
    sizes = ["--num-experts", "8", "--expert-width", "16", "--top-k", "2"]
    assert said(*words, *sizes, capsys=capsys)[0] in {0, None}
    note = json.loads((out / "upcycling.json").read_text())
    assert (note["dense"], note["num_experts"], note["scaling"]) == (dense, 8, "paper")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert said(*words, *sizes, capsys=capsys) == (None, f"{out}: already upcycled from {dense}\n")
    other, _ = said(*words, *sizes, "--seed", "1", capsys=capsys)
    assert f"{out} was upcycled from another model or otherwise" in str(other)
    config = Path(dense) / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    other, _ = said(*words, *sizes, capsys=capsys)
    assert "was upcycled from another model" in str(other)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """A recipe's launch of two ranks."""
    script = 'source recipes/launch.sh; launch "$@"'
    return subprocess.run(
        ["bash", "-c", script, "_", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=os.environ | {"NPROC": "2", "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.clip_norm=0"], "error: optim.clip_norm is 0.0, and must be greater than 0\n"),
        (["model.path=nowhere"], "error: model.tokenizer: no tokenizer.json in"),
    ],
)
def test_a_refusal_of_several_ranks_is_printed_once_and_last(
    words: list[str], says: str, tmp_path: Path
) -> None:
    done = launched("quickstart_sft", *words, f"root={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert done.stderr.splitlines()[-1].startswith(says.rstrip("\n"))
    assert "Traceback" not in done.stderr and "torch.distributed" not in done.stderr


@pytest.mark.slow
def test_the_report_of_ranks_that_were_killed_is_printed(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run(
        [sys.executable, "-m", "marco_train.commands.launch", "--standalone", tmp_path / "dies.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stderr


@pytest.mark.slow
def test_a_port_that_something_else_has_is_said_in_a_sentence() -> None:
    nodes = ["--nnodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "marco_train.commands.launch", *nodes, str(port), "train.py"],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the port that nodes meet at is in use on this one (MASTER_PORT)")
    assert f"port: {port}" in last


@pytest.mark.slow
def test_a_launch_of_several_ranks_ends_with_their_status(tmp_path: Path) -> None:
    words = ["experiment=quickstart_sft", f"root={tmp_path}", "parallel.expert_parallel_size=1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "marco_train.commands.launch", "--standalone"),
            *("--nproc_per_node", "2", "-m", "marco_train.train", *words),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "MARCO_TRAIN_EXIT_STATUS"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_experiment_of_ones_own_is_launched_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [sft, override /data: own, _self_]\nname: chats\n"
    (tmp_path / "mine" / "experiment" / "chats.yaml").write_text(text)
    done = subprocess.run(
        [REPOSITORY / "recipes" / "run.sh", "chats", "--config-dir", "mine", "data.path=no.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"NPROC": "2", "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 2, done.stderr
    assert "model.path" in done.stderr and "Traceback" not in done.stderr
