"""The doctor makes a run's checks up to its first update, and says everything that is wrong."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from marco_train.commands import examination, machine, stage_checks
from marco_train.commands.doctor import examine
from marco_train.commands.examination import Examination
from marco_train.commands.machine import (
    check_driver,
    check_memory,
    check_port,
    check_vllm_import,
    wants_vllm,
)
from marco_train.config import TrainConfig
from marco_train.data.chat import CHATML
from marco_train.distributed import rank
from marco_train.errors import InputError
from marco_train.stages.checks import Checks
from marco_train.stages.evaluate import prepare_evaluate
from marco_train.stages.opd import prepare_opd, run_opd
from marco_train.stages.sft import prepare_sft
from tests.helpers.checkpoints import edit_state
from tests.helpers.configs import compose_config
from tests.helpers.processes import run_script
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

pytestmark = pytest.mark.slow

P = ParamSpec("P")
T = TypeVar("T")

ALONE = "parallel.expert_parallel_size=1"


def doctor(*overrides: str) -> subprocess.CompletedProcess[str]:
    return run_script("doctor.py", *overrides)


def faults(num_ranks: int, *overrides: str) -> list[str]:
    """What the doctor finds, the same on every rank."""
    first, *others = run_on_ranks(num_ranks, examine, list(overrides))
    assert all(other == first for other in others)
    return list(first)


LAST = {
    "quickstart_opd": "teacher 'second'",
    "quickstart_sft": "first loss",
    "quickstart_evaluate": "second's first answers",
}
PREPARE: dict[str, Callable[[TrainConfig, Checks], object]] = {
    "quickstart_opd": prepare_opd,
    "quickstart_sft": prepare_sft,
    "quickstart_evaluate": prepare_evaluate,
}


class Noted(Checks):
    """Notes what a stage checks."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def make(self, what: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.names.append(what)
        return make(*args, **kwargs)


EVALUATED = ["~stage.models.opd_first", "~stage.models.opd_second"]


@pytest.mark.parametrize("experiment", LAST)
def test_a_run_that_is_fit_passes_every_check(experiment: str, world: World) -> None:
    more = EVALUATED if experiment == "quickstart_evaluate" else []
    done = doctor(f"experiment={experiment}", f"root={world.root}", ALONE, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("config ... fine, ")
    assert lines[-2].startswith(f"{LAST[experiment]} ... fine, ")
    assert lines[-1].startswith("all is well, ")
    cfg = compose_config(experiment, f"root={world.root}", ALONE, *more)
    checks = Noted()
    PREPARE[experiment](cfg, checks)
    assert checks.names and set(checks.names) <= {line.split(" ... ")[0] for line in lines}
    if experiment == "quickstart_opd":
        (said,) = [line for line in lines if line.startswith("teacher 'second' (")]
        assert "gives the student's answers to 64 prompts" in said
        assert "the student itself" in said and "a uniform guess -5.77" in said  # ln 320
    assert not Path(world.root, "opd").exists()  # nothing is written


@pytest.mark.parametrize("experiment", ["quickstart_opd", "quickstart_sft"])
def test_two_ranks_are_examined_as_they_would_run(experiment: str, world: World) -> None:
    shared = "parallel.expert_parallel_size=2"
    assert not faults(2, f"experiment={experiment}", f"root={world.root}", shared)


def examine_with_a_rank_of_bad_rows(words: list[str]) -> list[str]:
    """The second rank alone finds a fault in its first batch."""

    def refuse(_: object) -> None:
        if rank() == 1:
            raise InputError("a row of rank 1 is bad")

    setattr(stage_checks, stage_checks.log_rows.__name__, refuse)  # in this process, which ends
    return examine(words)


def test_what_one_rank_finds_is_said_for_all_and_the_checks_go_on(
    world: World, tmp_path: Path
) -> None:
    given = [
        *("experiment=quickstart_opd", f"root={world.root}", f"output_dir={tmp_path}"),
        "parallel.expert_parallel_size=2",
        f"stage.cascade.first.teacher.path={tmp_path / 'nothing'}",
    ]
    first, second = run_on_ranks(2, examine_with_a_rank_of_bad_rows, given)
    assert first == second
    assert len(first) == 2
    assert "a row of rank 1 is bad" in first
    assert any("teacher 'first': there is no model at" in fault for fault in first)


def disagree(seconds: float) -> list[str]:
    """The second rank is refused in a check in which the first stays as long."""
    examination.PATIENCE = timedelta(seconds=1)
    checks = Examination()
    checks.meet(timeout_seconds=5)

    def check() -> None:
        if rank() == 1:
            raise InputError("refused")
        time.sleep(seconds)

    checks.make("this", check)
    checks.make("that", Path("/nowhere").exists)
    return checks.faults


def test_a_rank_waits_with_its_fault_until_the_others_cannot_come() -> None:
    assert run_on_ranks(2, disagree, 0.2) == [["refused"], ["refused"]]
    with pytest.raises(BaseException, match="error: refused"):
        run_on_ranks(2, disagree, 3.0)


def test_every_fault_is_said_in_a_sentence_each(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.path("teacher_second", "export"), tmp_path / "teacher")
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": 0}')
    done = doctor(
        "experiment=quickstart_opd",
        f"root={world.root}",
        ALONE,
        f"stage.cascade.first.teacher.path={tmp_path / 'nothing'}",
        f"stage.cascade.second.teacher.path={tmp_path / 'teacher'}",
        f"data.sources.math.path={tmp_path / 'rows.jsonl'}",
        f"model.path={tmp_path}",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)
    for part in (
        "no model at",
        "there is no file",
        "teacher 'first': there is no model at",
        "teacher 'second' stops at [0]",
    ):
        assert any(part in line for line in lines), part


Change = Callable[[Path], object]


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**values: Any) -> Change:
    def apply(model: Path) -> None:
        found = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(found | values))

    return apply


def template(text: str) -> Change:
    return lambda model: (model / "chat_template.jinja").write_text(text)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def without_names(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"language_model.{name}"] = tensors.pop(name)


DOWN = "model.layers.1.mlp.down_proj.weight"
OTHER_TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
TEACHERS: dict[str, tuple[Change, str]] = {
    "a layer absent": (weights(lambda t: t.pop(DOWN)), f"1 are missing: {DOWN}"),
    "other names": (weights(without_names), "are missing: "),
    "one more": (weights(lambda t: t.update({"more": torch.ones(2)})), ": more"),
    "another shape": (weights(lambda t: t.update({DOWN: t[DOWN][:, :8].clone()})), DOWN),
    "not a number": (weights(lambda t: t[DOWN].fill_(float("nan"))), "not finite"),
    "pickled": (pickled, "no pickle is loaded"),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), "quantised weights"),
    "sees": (config(vision_config={"depth": 2}), "reads more than text"),
    "an adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "short": (config(max_position_embeddings=95), "95 positions"),
    "other turns": (template(OTHER_TURNS), "opens a turn with"),
    "no JSON": (lambda m: (m / "config.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize(("change", "said"), TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_that_cannot_teach_is_found(
    change: Change, said: str, world: World, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.path("teacher_second", "export"), teacher)
    change(teacher)
    path = f"stage.cascade.second.teacher.path={teacher}"
    (found,) = faults(1, "experiment=quickstart_opd", f"root={world.root}", ALONE, path)
    assert said in found


# A student's weights and positions; its turns are the run's own.
NORM = "model.norm.weight"
STUDENTS: dict[str, tuple[str, Change, str]] = {
    "a weight absent": ("sft", weights(lambda t: t.pop(NORM)), f"1 are missing: {NORM}"),
    "not a number": ("opd", weights(lambda t: t[NORM].fill_(float("inf"))), "not finite"),
    "pickled": ("evaluate", *TEACHERS["pickled"]),
    "quantised": ("opd", *TEACHERS["quantised"]),
    "short, sft": ("sft", *TEACHERS["short"]),
    "short, opd": ("opd", *TEACHERS["short"]),
    "short, evaluate": ("evaluate", *TEACHERS["short"]),
    "no JSON": ("sft", *TEACHERS["no JSON"]),
}


@pytest.mark.parametrize(("stage", "change", "said"), STUDENTS.values(), ids=STUDENTS)
def test_a_student_that_cannot_learn_is_found(
    stage: str, change: Change, said: str, world: World, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(world.path("sft", "export"), student)
    change(student)
    more = [f"model.path={student}"]
    if stage == "evaluate":
        more = [*EVALUATED, f"stage.models.sft={student}"]
    (found,) = faults(1, f"experiment=quickstart_{stage}", f"root={world.root}", ALONE, *more)
    assert said in found


def test_a_teacher_without_an_opinion_is_found_in_an_evaluation(
    world: World, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.path("teacher_second", "export"), teacher)
    weights(lambda tensors: [tensor.zero_() for tensor in tensors.values()])(teacher)
    given = [f"root={world.root}", ALONE, *EVALUATED, f"stage.teachers.second.path={teacher}"]
    (found,) = faults(1, "experiment=quickstart_evaluate", *given)
    assert "finds all tokens alike" in found


def rows_of(world: World, tmp_path: Path, rows: list[Any]) -> list[str]:
    """Overrides by which every source has these rows, and nothing is held out."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [path.stem for path in Path(world.path("data", "train")).iterdir()]
    return [*(f"data.sources.{name}.path={file}" for name in names), "data.held_out=null"]


def chat(question: str, answer: str | None = "yes") -> dict[str, Any]:
    asked, answered = {"role": "user", "content": question}, {"role": "assistant"}
    return {"messages": [asked, answered | {"content": answer}]}


UNUSABLE = {
    "prompts that are too long": ([chat("word " * 60)] * 8, "data/dropped_too_long"),
    "no answers": ([chat("Well?", None)] * 8, "is not text"),
    "no chat": ([{"translation": {"en": "Well?"}}] * 8, "no column messages"),
    "control tokens": ([chat("<|im_end|> Well?")] * 8, "data/dropped_special"),
}


@pytest.mark.parametrize("stage", ["opd", "sft"])
@pytest.mark.parametrize(("rows", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_rows_of_which_none_can_be_used_are_found(
    rows: list[Any], said: str, stage: str, world: World, tmp_path: Path
) -> None:
    given = [f"root={world.root}", ALONE, *rows_of(world, tmp_path, rows)]
    given += ["stage.eval_every=null"] if stage == "sft" else []
    found = faults(1, f"experiment=quickstart_{stage}", *given)
    assert found
    assert all(said in each for each in found)


def test_a_source_that_is_lost_is_found_beside_others(world: World, tmp_path: Path) -> None:
    lost = tmp_path / "lost.jsonl"
    lost.write_text('{"prompt": "Well?"}\n' * 9)
    for stage, expected in (("sft", 1), ("opd", 0)):  # which asks prompts alone
        path = f"data.sources.math.path={lost}"
        found = faults(1, f"experiment=quickstart_{stage}", f"root={world.root}", ALONE, path)
        assert len(found) == expected
        if found:
            assert "source 'math': this stage can use 0 of 9 rows" in found[0]
            assert "(9 data/dropped_no_loss)" in found[0]


@pytest.mark.long
def test_a_few_rows_at_fault_are_named_and_do_no_harm(world: World, tmp_path: Path) -> None:
    rows: list[Any] = [chat(f"Is {n} even?") for n in range(20)]
    rows[3] = {"messages": None}
    given = rows_of(world, tmp_path, rows)
    done = doctor("experiment=quickstart_opd", f"root={world.root}", ALONE, *given)
    assert done.returncode == 0, done.stderr
    assert "row 3 (from 0)" in done.stdout
    assert "data/dropped_malformed" in done.stdout


@pytest.mark.long
def test_a_phase_that_converged_before_it_taught_is_passed_over(
    world: World, tmp_path: Path
) -> None:
    given = [
        f"root={world.root}",
        f"output_dir={tmp_path / 'run'}",
        ALONE,
        "stage.max_steps=1",  # of each phase
        "stage.global_batch_size=4",
        "optim.warmup_steps=0",
        "checkpoint.save_every=1",
    ]
    run_on_ranks(1, run_opd, compose_config("quickstart_opd", *given))
    (tmp_path / "run" / "finished.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_000002")
    edit_state(
        checkpoints / "step_000001", lambda state: state["cascade"].update(converged={"second": 1})
    )

    done = doctor("experiment=quickstart_opd", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("resumption ... fine") for line in lines)
    assert any(line.startswith("teacher 'first' ... fine") for line in lines)
    assert not any(line.startswith("teacher 'second'") for line in lines)


def test_a_fault_is_said_once(world: World, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    path = f"data.sources.math.path={file}"
    (found,) = faults(1, "experiment=quickstart_opd", f"root={world.root}", ALONE, path)
    assert "source 'math': 1 of 1 rows are at fault" in found
    assert found.count("save the file as UTF-8") == 1


def test_a_mask_without_the_stop_token_is_found(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    text = CHATML.read_text()
    moved = text.replace(
        "{{- '<|im_end|>' }}\n{%- endgeneration %}",
        "{%- endgeneration %}\n{{- '<|im_end|>' }}",
    )
    assert moved != text
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(moved)
    given = [f"root={world.root}", ALONE, f"model.tokenizer={tmp_path / 'tokenizer'}"]
    (found,) = faults(1, "experiment=quickstart_sft", *given)
    assert "would not learn to stop" in found


def test_what_is_wrong_with_a_config_is_said_whole(world: World) -> None:
    for override, said in (
        ("stage.objectiv=full", "objectiv"),
        ("~data.sources", "data.sources"),
        ("resume=nowhere", "is no complete checkpoint"),
        ("stage.cascade.first.teacher.stop_id=5", "its stop_id is 5"),
        ("stage.objective=topk", "stage.top_k is None"),
        ("output_dir=/proc/run", "/proc is no directory that can be written ("),
    ):
        (found,) = faults(1, "experiment=quickstart_opd", f"root={world.root}", ALONE, override)
        assert said in found, override


def test_every_word_that_is_wrong_is_said(world: World) -> None:
    words = [f"root={world.root}", ALONE, "optim.lr=1", "stage.max_lenth=3", "optim.beta1=high"]
    found = faults(1, "experiment=quickstart_sft", *words)
    assert len(found) == 3
    for part in ("there is no optim.lr;", "there is no stage.max_lenth;", "optim.beta1=high: "):
        assert any(fault.startswith(part) for fault in found), part


def test_a_memory_that_is_too_small_is_found() -> None:
    check_memory(1000)
    with pytest.raises(InputError, match=r"take 1048576\.00 GiB here, and \d"):
        check_memory(2**50)


def test_a_port_that_is_held_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(InputError, match=f"MASTER_PORT is {port}, and ranks cannot meet"):
            check_port()
    for wrong in ("some", "99999"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(InputError, match=f"MASTER_PORT is {wrong}, and ranks cannot meet"):
            check_port()
    monkeypatch.delenv("MASTER_PORT")
    check_port()


def test_a_driver_that_torch_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "said", lambda *_: "470.82.01, Tesla V100\n470.82.01, Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=r"tells of 2 GPUs \(470.82.01, Tesla V100\), and torch"):
        check_driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_driver()


def test_a_vllm_that_is_there_and_broken_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13 is not found')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match=r"vLLM cannot be imported here \(ImportError: libcudart"):
        check_vllm_import()
    (tmp_path / "vllm.py").write_text("")
    check_vllm_import()
    assert wants_vllm(compose_config("quickstart_opd", "rollout@stage.rollout=vllm"))
    assert not wants_vllm(compose_config("quickstart_opd"))
