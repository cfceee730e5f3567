"""Runs that go on with more steps, phases, other numbers or elsewhere, and what they ask first."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marco_train.commands.doctor import examine
from marco_train.config import TrainConfig
from marco_train.config.resumption import check_resume, is_finished
from marco_train.errors import InputError
from tests.helpers.checkpoints import edit_state, same_generators, same_state
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

CONSTANT = ["optim.schedule=constant", "optim.min_learning_rate=4e-3"]


def sft(world: World, out: Path, *more: str) -> TrainConfig:
    return compose_config("quickstart_sft", *overrides("sft", world, out, 1), *more)


def opd(world: World, out: Path, *more: str) -> TrainConfig:
    return compose_config("quickstart_opd", *overrides("opd", world, out, 1), *more)


def launch(cfg: TrainConfig, crash_at: int | None = None, num_ranks: int = 1) -> None:
    run_on_ranks(num_ranks, run, cfg, cfg.stage.kind.value, crash_at)


def refusal(cfg: TrainConfig) -> str:
    with pytest.raises(AssertionError) as failure:
        launch(cfg)
    assert InputError.__name__ in str(failure.value)
    return str(failure.value)


def same_checkpoint(one: Path, other: Path, step: int) -> None:
    """Masters, moments and generators."""
    paths = [out / "checkpoints" / f"step_{step:06d}" for out in (one, other)]
    same_state(*paths)
    same_generators(*paths)


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    """All that lies in a directory, with the time of the last change."""
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def test_a_finished_run_that_is_given_more_steps_is_the_longer_run(
    world: World, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(sft(world, whole, *CONSTANT, "stage.num_steps=7"))
    launch(sft(world, parts, *CONSTANT, "stage.num_steps=4"))  # no multiple of save_every
    longer = sft(world, parts, *CONSTANT, "stage.num_steps=7")
    assert not is_finished(longer)
    launch(longer)
    assert is_finished(longer)
    assert losses(parts) == losses(whole)
    same_checkpoint(parts, whole, 7)


def test_a_run_of_epochs_is_the_run_of_their_steps(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # 60 rows in batches of 6: ten steps an epoch.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(sft(world, whole, *CONSTANT, "stage.num_steps=7"))
    epochs = [*CONSTANT, "stage.num_steps=null"]
    launch(sft(world, parts, *epochs, "stage.num_epochs=0.4"))
    longer = sft(world, parts, *epochs, "stage.num_epochs=0.7")
    assert not is_finished(longer)
    capfd.readouterr()
    launch(longer)
    # 42 samples, a tenth of them of 12 rows.
    judged, plan, made = (line for line in capfd.readouterr().out.splitlines() if "'math'" in line)
    assert judged == "source 'math': 12 rows, shape messages"
    assert plan == "source 'math': 12 rows, weight 0.1, 0.35 epochs in 7 steps"
    assert made == "source 'math': 12 rows, weight 0.1, 0.35 epochs made in 7 steps"
    assert is_finished(longer)
    assert losses(parts) == losses(whole)
    same_checkpoint(parts, whole, 7)


@pytest.mark.long
def test_a_phase_after_a_finished_cascade_makes_the_longer_cascade(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    third = [
        "+teacher@stage.cascade.another.teacher=hf",
        f"stage.cascade.another.teacher.path={world.path('teacher_first', 'export')}",
        "+stage.cascade.another.num_steps=2",
    ]
    launch(opd(world, whole, *third))
    launch(opd(world, parts))
    longer = opd(world, parts, *third)
    assert list(longer.stage.cascade) == ["first", "second", "another"]
    assert not is_finished(longer)
    capfd.readouterr()
    launch(longer)
    said = capfd.readouterr().out
    assert "stage.cascade.another: a phase of 2 steps is added" in said
    for when in ("in 8", "made in 8"):  # of 6 prompts
        assert f"source 'math': 12 rows, weight 0.1, 0.4 epochs {when} steps" in said
    assert is_finished(longer)
    assert losses(parts) == losses(whole)
    assert [line["cascade/phase"] for line in losses(parts)] == [0, 0, 0, 0, 1, 1, 2, 2]
    same_checkpoint(parts, whole, 8)
    exports = ("export", "export-first", "export-second", "export-another")
    for export in exports:
        one, other = (out / export / "model.safetensors" for out in (whole, parts))
        assert one.read_bytes() == other.read_bytes()


# Warm-up over 2 steps, then half a cosine from 4e-3 to 4e-4 at the last step:
# 4e-4 + 3.6e-3 * (1 + cos(pi * progress)) / 2 with progress in thirds (6 steps) or fifths (8).
COSINE_OF_6 = [2e-3, 4e-3, 4e-3, 3.1e-3, 1.3e-3, 4e-4]
COURSES = {
    "keep": [*COSINE_OF_6, 4e-4, 4e-4],
    "stretch": [*COSINE_OF_6[:3], 3.6562306e-3, 2.7562306e-3, 1.6437694e-3, 7.4376941e-4, 4e-4],
}


@pytest.mark.parametrize("choice", ["keep", "stretch"])
def test_more_steps_keep_or_stretch_the_course_of_the_rate(
    choice: str, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(sft(world, tmp_path), crash_at=4)
    longer = "stage.num_steps=8"
    assert "is 0.0031 on the course of 6 steps and 0.003656 on that of 8" in refusal(
        sft(world, tmp_path, longer)
    )
    capfd.readouterr()
    chosen = f"on_resume.schedule={choice}"
    launch(sft(world, tmp_path, longer, chosen), crash_at=7)
    said = capfd.readouterr().out
    assert "stage.num_steps: 6 -> 8 steps" in said
    assert f"on_resume.schedule={choice} takes that of {6 if choice == 'keep' else 8}" in said
    launch(sft(world, tmp_path, longer))  # nothing is asked again
    rates = [line["optim/lr"] for line in losses(tmp_path)]
    assert rates == pytest.approx(COURSES[choice], rel=1e-6)


def test_fewer_steps_than_were_made_never_finish(world: World, tmp_path: Path) -> None:
    given = ["checkpoint.save_every=2"]
    launch(sft(world, tmp_path / "sft", *given), crash_at=4)
    assert "stage.num_steps=3 is fewer than the 4 steps that" in refusal(
        sft(world, tmp_path / "sft", *given, "stage.num_steps=3")
    )
    launch(opd(world, tmp_path / "opd", *given), crash_at=5)
    assert "stage.cascade.first.num_steps=3 is fewer than the 4 steps that" in refusal(
        opd(world, tmp_path / "opd", *given, "stage.cascade.first.num_steps=3")
    )
    for stage in ("sft", "opd"):
        assert not (tmp_path / stage / "finished.json").exists()


def test_a_fork_leaves_the_run_it_comes_from_as_it_is(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    launch(sft(world, old, *CONSTANT))
    before = files_of(old)
    fork = old / "checkpoints" / "step_000003"
    changed = ["optim.learning_rate=2e-3", "optim.min_learning_rate=2e-3", *CONSTANT[:1]]
    capfd.readouterr()
    given = [*changed, f"resume={fork}", "on_resume.allow=[optim]"]
    launch(sft(world, new, *given))
    said = capfd.readouterr().out
    assert "optim.learning_rate: 0.004 -> 0.002 (allowed by on_resume.allow=[optim])" in said
    assert f"{new}/metrics.jsonl begins with step 4" in said
    assert files_of(old) == before
    assert [line["step"] for line in losses(new)] == [4, 5, 6]
    assert [line["optim/lr"] for line in losses(new)] == [2e-3] * 3
    assert losses(new)[0]["loss/cross_entropy"] == losses(old)[3]["loss/cross_entropy"]
    state = json.loads((new / "checkpoints" / "step_000006" / "state.json").read_text())
    assert state["resumed_from"] == [str(fork)]
    assert (new / "checkpoints" / "step_000003" / "manifest.json").is_file()  # needs no other run
    assert is_finished(sft(world, new, *changed))


def test_a_run_goes_on_with_mended_data_once_it_is_allowed_to(
    own_world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    launch(sft(own_world, out), crash_at=4)
    file = Path(own_world.path("data", "train", "math.jsonl"))
    file.write_text("\n".join(file.read_text().splitlines()[1:]) + "\n")  # without its first row
    assert "with data.on_change=continue (with any others: on_resume.allow=[data])" in refusal(
        sft(own_world, out)
    )
    capfd.readouterr()
    launch(sft(own_world, out, "on_resume.allow=[data]"), crash_at=4)
    assert capfd.readouterr().out.count("as on_resume.allow=[data] allows: rows may be") == 1
    launch(sft(own_world, out, "on_resume.allow=[data]", "checkpoint.save_every=1"))
    assert [line["step"] for line in losses(out)] == [1, 2, 3, 4, 5, 6]
    assert is_finished(sft(own_world, out))


def test_a_run_goes_on_with_its_files_elsewhere(own_world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch(sft(own_world, out), crash_at=4)
    own_world.root.rename(tmp_path / "moved")
    launch(sft(World(tmp_path / "moved"), out))
    assert [line["step"] for line in losses(out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_began_with_other_weights_is_not_taken_up_unasked(
    own_world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    launch(sft(own_world, out), crash_at=4)
    # The same shape, and in the second case the same place.
    other = own_world.path("sft", "export")
    assert "on_resume.allow=[model]" in refusal(sft(own_world, out, f"model.path={other}"))
    shutil.copy(f"{other}/model.safetensors", own_world.path("student"))
    assert "student holds something else than before" in refusal(sft(own_world, out))
    capfd.readouterr()
    launch(sft(own_world, out, "on_resume.allow=[model]"))
    assert "student holds something else than before (allowed" in capfd.readouterr().out
    launch(sft(own_world, out))  # it is known from then on


def test_another_teacher_is_taken_once_it_is_allowed_to(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["checkpoint.save_every=1"]
    launch(opd(world, tmp_path, *given), crash_at=3)
    other = f"stage.cascade.first.teacher.path={world.path('teacher_second', 'export')}"
    assert "go on with this one with on_resume.allow=[teacher]" in refusal(
        opd(world, tmp_path, *given, other)
    )
    launch(opd(world, tmp_path, *given, other, "on_resume.allow=[teacher]"), crash_at=4)
    assert "as on_resume.allow=[teacher] allows" in capfd.readouterr().out
    launch(opd(world, tmp_path, *given, other))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_teacher_of_a_coming_phase_is_known_too(own_world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["checkpoint.save_every=1"]
    launch(opd(own_world, out, *given), crash_at=2)
    second, first = (own_world.path(f"teacher_{name}", "export") for name in ("second", "first"))
    shutil.copytree(second, tmp_path / "same")
    other, same = (
        f"stage.cascade.second.teacher.path={path}" for path in (first, tmp_path / "same")
    )
    asked = "teacher: stage.cascade.second.teacher.path"
    assert asked in refusal(opd(own_world, out, *given, other))
    launch(opd(own_world, out, *given, same), crash_at=3)  # it holds the same
    launch(opd(own_world, out, *given, other, "on_resume.allow=[teacher]"))
    assert [line["step"] for line in losses(out)] == [1, 2, 3, 4, 5, 6]


def test_what_was_measured_with_another_teacher_ends_no_phase(
    own_world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The phase would end where the second measure lies not five nats below the first.
    rule = "stage.cascade.first.early_switch."
    given = [f"{rule}measure_every=1", f"{rule}num_measures=2", f"{rule}num_prompts=4"]
    given += [
        "checkpoint.save_every=1",
        f"{rule}min_fall=5",
        "stage.cascade.first.num_steps=5",
    ]
    launch(opd(own_world, tmp_path / "run", *given), crash_at=2)
    other = f"stage.cascade.first.teacher.path={own_world.path('teacher_second', 'export')}"
    capfd.readouterr()
    launch(opd(own_world, tmp_path / "run", *given, other, "on_resume.allow=[teacher]"), crash_at=4)
    said = capfd.readouterr().out
    assert "phase 'first': its convergence is measured anew" in said
    # Three measures of the new teacher, before steps 2, 3 and 4.
    assert "phase 'first' has converged before step 4" in said


@pytest.mark.parametrize("top_k", [[], ["stage.top_k=4"]])
def test_the_same_teacher_goes_on_with_another_objective(
    top_k: list[str], world: World, tmp_path: Path
) -> None:
    given = ["checkpoint.save_every=1"]
    before = ["stage.objective=topk", "stage.top_k=2"] if top_k else ["stage.objective=full"]
    after = ["stage.objective=topk", *(top_k or ["stage.top_k=2"]), "on_resume.allow=[objective]"]
    launch(opd(world, tmp_path, *given, *before), crash_at=2)
    launch(opd(world, tmp_path, *given, *after))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_held_out_rows_are_known_from_when_they_decide(own_world: World, tmp_path: Path) -> None:
    out, rule = tmp_path / "run", "stage.cascade.first.early_switch."
    given = ["checkpoint.save_every=1"]
    launch(opd(own_world, out, *given), crash_at=2)
    file = Path(own_world.path("data", "development", "math.jsonl"))
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[1:]))  # nothing was decided by them
    given += [f"{rule}measure_every=1", f"{rule}num_measures=9", f"{rule}num_prompts=4"]
    launch(opd(own_world, out, *given, "on_resume.allow=[objective]"), crash_at=3)
    file.write_text("".join(rows[2:]))
    assert "data: data.held_out.sources.math.path" in refusal(opd(own_world, out, *given))


def test_a_copied_run_looks_at_what_its_files_hold(own_world: World, tmp_path: Path) -> None:
    out, copy = tmp_path / "run", tmp_path / "copy"
    launch(sft(own_world, out), crash_at=4)
    shutil.copy(f"{own_world.path('sft', 'export')}/model.safetensors", own_world.path("student"))
    shutil.copytree(out, copy)  # all of it is newer than the student
    assert "on_resume.allow=[model]" in refusal(sft(own_world, copy))


def test_a_fork_needs_a_directory_of_its_own(world: World, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    launch(sft(world, one))
    launch(sft(world, other, "seed=5"))
    before = files_of(other)
    resume = f"resume={one / 'checkpoints' / 'step_000003'}"
    with pytest.raises(InputError, match=r"holds one already: choose an output_dir of its own"):
        check_resume(sft(world, other, resume))
    assert files_of(other) == before
    check_resume(sft(world, one, resume))
    check_resume(sft(world, tmp_path / "new", resume))


def test_the_doctor_finds_what_a_resumption_would_refuse(own_world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["checkpoint.save_every=1"]
    cfg = opd(own_world, out, *given)
    launch(cfg, crash_at=2)
    asked = ["experiment=quickstart_opd", *overrides("opd", own_world, out, 1), *given]
    assert run_on_ranks(1, examine, asked) == [[]]
    file = Path(own_world.path("data", "train", "math.jsonl"))
    rows = file.read_text()
    file.write_text(rows + rows.splitlines()[0] + "\n")
    ((fault,),) = run_on_ranks(1, examine, asked)
    assert "on_resume.allow=[data]" in fault
    file.write_text(rows)
    shutil.copytree(
        own_world.path("teacher_second"), own_world.path("teacher_first"), dirs_exist_ok=True
    )
    ((fault,),) = run_on_ranks(1, examine, asked)
    assert "teacher 'first' is another than the one that taught" in fault


def test_a_checkpoint_from_before_a_field_came_is_taken_up(world: World, tmp_path: Path) -> None:
    launch(sft(world, tmp_path), crash_at=4)

    def forget(state: dict[str, Any]) -> None:
        del state["config"]["on_resume"], state["config"]["stage"]["max_steps"]

    edit_state(tmp_path / "checkpoints" / "step_000003", forget)
    launch(sft(world, tmp_path))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_all_ranks_refuse_alike_and_go_on_alike(own_world: World, tmp_path: Path) -> None:
    given = ["parallel.expert_parallel_size=2"]
    launch(sft(own_world, tmp_path, *given), crash_at=4, num_ranks=2)
    shutil.copy(f"{own_world.path('sft', 'export')}/model.safetensors", own_world.path("student"))
    with pytest.raises(AssertionError) as failure:
        launch(sft(own_world, tmp_path, *given), num_ranks=2)
    assert str(failure.value).count("InputError: ") == 2
    launch(sft(own_world, tmp_path, *given, "on_resume.allow=[model]"), num_ranks=2)
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
