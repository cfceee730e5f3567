"""Every model has to have positions for the longest sequence of its stage, before it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.config.architecture import steady_positions
from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError
from marco_train.evaluation import reverse_kl
from marco_train.models import hf_io
from marco_train.models.hf_io import check_teacher_positions
from marco_train.stages import evaluate, opd, sft
from tests.helpers.configs import compose_config
from tests.helpers.teachers import teacher_config
from tests.helpers.world import World


def model(world: World, name: str, path: Path, **changes: object) -> str:
    """A copy of one of the world's models with another config.json; None takes a field out."""
    shutil.copytree(world.path(*name.split("/")), path)
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    return str(path)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hf_io, "empty_model", no_model)
    monkeypatch.setattr(reverse_kl, "build_teacher", no_model)


def sft_config(world: World, student: str, *overrides: str) -> TrainConfig:
    found = compose_config(
        "quickstart_sft",
        f"root={world.root}",
        f"model.path={student}",
        "parallel.expert_parallel_size=1",
        *overrides,
    )
    assert found.model.architecture is None
    return found


def opd_config(world: World, *overrides: str) -> TrainConfig:
    found = compose_config(
        "quickstart_opd", f"root={world.root}", "parallel.expert_parallel_size=1", *overrides
    )
    assert found.model.architecture is None
    return found


def evaluate_config(world: World, student: str, *overrides: str) -> TrainConfig:
    return compose_config(
        "quickstart_measure",
        f"root={world.root}",
        f"+stage.models.student={student}",
        "parallel.expert_parallel_size=1",
        *overrides,
    )


def test_a_student_without_positions_for_a_conversation_is_refused(
    world: World, tmp_path: Path
) -> None:
    student = model(world, "student", tmp_path / "student", max_position_embeddings=95)
    said = (
        r"the stage allows sequences of 96 tokens, and the student .* has 95 positions: bring "
        "stage.max_length down to 95 or less"
    )
    with pytest.raises(InputError, match=said):
        sft.run_sft(sft_config(world, student))


LENGTHS = "stage.max_prompt_length . stage.max_response_length"


def test_a_student_without_positions_for_a_response_is_refused(
    world: World, tmp_path: Path
) -> None:
    student = model(world, "student", tmp_path / "student", max_position_embeddings=95)
    said = rf"sequences of 96 tokens, and the student .* has 95 .*bring {LENGTHS} down to 95 or"
    with pytest.raises(InputError, match=said):
        opd.run_opd(opd_config(world, f"model.path={student}"))
    with pytest.raises(InputError, match=r"sequences of 96 tokens, and student .* has 95"):
        evaluate.run_evaluate(evaluate_config(world, student))


@pytest.mark.parametrize("backend", ["hf", "native", "vllm_server"])
def test_a_teacher_without_positions_is_refused(backend: str, world: World, tmp_path: Path) -> None:
    over_http = backend == "vllm_server"
    short = 96 if over_http else 95  # vLLM makes a token after what it scores
    teacher = "stage.cascade.second.teacher"
    chosen = [f"teacher@{teacher}={backend}"]
    if over_http:
        chosen.append(f"{teacher}.servers.urls=['http://localhost:1']")
        chosen.append("stage.objective=sampled")
    source = "teacher_second/export"
    path = model(world, source, tmp_path / "short", max_position_embeddings=short)
    said = rf"96 tokens.*, and teacher 'second' .* has {short} positions.* down to 95 or less"
    with pytest.raises(InputError, match=said):
        opd.run_opd(opd_config(world, *chosen, f"{teacher}.path={path}"))
    # With one more it goes on, to what would load it.
    path = model(world, source, tmp_path / "enough", max_position_embeddings=short + 1)
    with pytest.raises(AssertionError, match="a model was loaded"):
        opd.run_opd(opd_config(world, *chosen, f"{teacher}.path={path}"))


def test_a_teacher_of_a_group_without_positions_is_refused(world: World, tmp_path: Path) -> None:
    path = model(
        world,
        "teacher_second/export",
        tmp_path / "short",
        max_position_embeddings=None,  # as the outer part of it
        text_config={"model_type": "qwen3", "vocab_size": 320, "max_position_embeddings": 50},
    )
    group = "+teacher@stage.cascade.first.teachers_by_group.category_math"
    cfg = opd_config(
        world,
        f"{group}=vllm_server",
        f"stage.cascade.first.teachers_by_group.category_math.path={path}",
        "stage.cascade.first.teachers_by_group.category_math.servers.urls=['http://localhost:1']",
        "stage.objective=sampled",
    )
    said = r"1 more to score them, and teacher 'first' \(teachers_by_group.category_math\)"
    with pytest.raises(InputError, match=said + " .* has 50 positions"):
        opd.run_opd(cfg)


def test_a_teacher_of_an_evaluation_without_positions_is_refused(
    world: World, tmp_path: Path
) -> None:
    path = model(world, "teacher_second/export", tmp_path / "short", max_position_embeddings=95)
    cfg = evaluate_config(world, world.path("student"), f"stage.teachers.second.path={path}")
    with pytest.raises(InputError, match=r"sequences of 96 tokens, and second .* has 95"):
        evaluate.run_evaluate(cfg)


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize("fault", [cut, pickled])
def test_files_are_refused_before_any_row_is_read(
    fault: Callable[[Path], None], world: World, tmp_path: Path
) -> None:
    student = model(world, "student", tmp_path / "student")
    fault(Path(student))
    nowhere = f"data.sources.math.path={tmp_path / 'none.jsonl'}"
    said = "cut short|no pickle is loaded"
    with pytest.raises(InputError, match=said):
        sft.run_sft(sft_config(world, student, nowhere))
    with pytest.raises(InputError, match=said):
        opd.run_opd(opd_config(world, f"model.path={student}", nowhere))
    good = world.path("student")
    with pytest.raises(InputError, match=said):
        evaluate.run_evaluate(evaluate_config(world, good, f"+stage.models.last={student}"))


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 80, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "steady"),
    [
        ({"max_position_embeddings": 90, "rope_parameters": DYNAMIC}, 90),
        ({"max_position_embeddings": 200, "rope_parameters": LONG}, 80),
        ({"max_position_embeddings": 200, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 200),
        ({"max_position_embeddings": 90, "rope_parameters": {"rope_type": "default"}}, None),
        ({"max_position_embeddings": 90, "rope_parameters": {"rope_type": "yarn"}}, None),
        ({"text_config": {"max_position_embeddings": 7, "rope_parameters": DYNAMIC}}, 7),
    ],
)
def test_embeddings_that_change_with_the_batch_are_known(
    config: dict[str, Any], steady: int | None
) -> None:
    assert steady_positions(config) == steady


def test_a_teacher_whose_scores_depend_on_its_batch_is_refused(
    world: World, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def teacher(positions: int) -> str:
        path = tmp_path / str(positions)
        shutil.copytree(world.path("data", "tokenizer"), path)
        cfg = LlamaConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=positions,
            rope_parameters=DYNAMIC,
        )
        LlamaForCausalLM(cfg).save_pretrained(path)
        return str(path)

    cfg = compose_config("quickstart_opd", f"root={world.root}").stage  # 72 + 24 tokens
    check_teacher_positions(cfg, teacher_config(teacher(96), TeacherBackend.hf), "teacher")
    with pytest.raises(InputError, match=r"longer than 95 tokens, and the stage allows 96"):
        check_teacher_positions(cfg, teacher_config(teacher(95), TeacherBackend.hf), "teacher")
