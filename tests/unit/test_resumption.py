"""What a resumption may change: what is free, what is asked, and what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from marco_train.config import TrainConfig
from marco_train.config.compose import read_run
from marco_train.config.opd import OPDConfig
from marco_train.config.resumption import (
    KINDS,
    continuation,
    is_finished,
    kind_of,
    leaves,
    observed,
    plain_config,
    schedule_steps,
)
from marco_train.content import digest
from marco_train.errors import InputError
from marco_train.run import mark_finished
from marco_train.train import read
from tests.helpers.checkpoints import leave_checkpoint, write_state
from tests.helpers.configs import compose_config
from tests.helpers.world import World

SERVED = [
    "teacher@stage.cascade.second.teacher=vllm_server",
    "stage.cascade.second.teacher.servers.urls=[http://a:1]",
]
PHASE = "teacher@stage.cascade.third.teacher=hf"


def composed(stage: str, world: World, out: Path, *overrides: str) -> TrainConfig:
    """Six steps of SFT, or four and two of OPD."""
    lengths = {
        "sft": ["stage.num_steps=6", "optim.warmup_steps=2"],
        "opd": ["stage.cascade.first.num_steps=4", "stage.cascade.second.num_steps=2"],
        "evaluate": [],
    }
    given = [f"root={world.root}", f"output_dir={out}", *lengths[stage]]
    return compose_config(f"quickstart_{stage}", *given, *overrides)


def third_phase(world: World, steps: int = 2) -> list[str]:
    path = f"+stage.cascade.third.teacher.path={world.path('teacher_first', 'export')}"
    return [f"+{PHASE}", path.removeprefix("+"), f"+stage.cascade.third.num_steps={steps}"]


FIRST = "teacher@stage.cascade.first.teacher"
EVERY_KIND = [
    ("sft", []),
    ("opd", [*SERVED, "rollout@stage.rollout=vllm_server"]),
    ("opd", [f"{FIRST}=native", "rollout@stage.rollout=vllm"]),
    ("opd", [f"{FIRST}=vllm"]),
    ("evaluate", []),
    ("evaluate", ["+teacher@stage.teachers.third=native", "stage.teachers.third.path=anywhere"]),
]


@pytest.mark.parametrize(
    ("stage", "more"), EVERY_KIND, ids=[" ".join(m) or s for s, m in EVERY_KIND]
)
def test_every_field_of_a_config_is_classified(
    stage: str, more: list[str], world: World, tmp_path: Path
) -> None:
    cfg = composed(stage, world, tmp_path, *more)
    if isinstance(cfg.stage, OPDConfig):
        first, second = cfg.stage.cascade.values()
        first.teachers_by_group = {"category_math": second.teacher, "language_de": first.teacher}
    paths = [path for path, _ in leaves(plain_config(cfg))]
    assert len(paths) > 60
    assert [".".join(path) for path in paths if kind_of(path) is None] == []
    assert kind_of(("optim.label_smoothing",)) is None


def test_every_row_of_the_table_is_a_field() -> None:
    rows = [row for patterns in KINDS.values() for row in patterns]
    assert len(rows) == len(set(rows)) > 60


COSINE = [
    "optim.schedule=cosine",
    "optim.min_learning_rate=1e-4",
    "optim.warmup_steps=0",
]
URLS = "stage.cascade.second.teacher.servers"
# Stage, then, now, and what becomes of it: free, said, or the group that has to be allowed.
CHANGES: list[tuple[str, list[str], list[str], str]] = [
    ("sft", [], ["data.max_tokens_per_microbatch=4096"], "free"),
    ("sft", [], ["parallel.recompute=layer", "parallel.dispatch=deduplicated"], "free"),
    ("sft", [], ["parallel.timeout_seconds=60"], "free"),
    ("sft", [], ["name=other", "logging=wandb", "checkpoint.save_every=7"], "free"),
    ("sft", [], ["stage.eval_every=2", "stage.num_eval_examples=8"], "free"),
    ("sft", [], ["data.held_out=null", "stage.eval_every=null"], "free"),
    ("sft", [], ["stage.num_steps=5", "optim.schedule=cosine"], "asked"),
    ("sft", [], ["stage.num_steps=8"], "asked"),
    ("sft", [], ["stage.num_steps=8", "on_resume.schedule=keep"], "said"),
    ("sft", [], ["stage.num_steps=8", "on_resume.schedule=stretch"], "said"),
    ("sft", ["stage.max_steps=4"], ["stage.max_steps=null"], "asked"),
    ("sft", [], ["stage.num_steps=2"], "fewer"),
    ("sft", [], ["stage.max_steps=2"], "fewer"),
    ("sft", [], ["seed=1"], "data"),
    ("sft", [], ["stage.global_batch_size=16"], "data"),
    ("sft", [], ["stage.max_length=80"], "data"),
    ("sft", [], ["data.num_rows=null"], "data"),
    ("sft", [], ["data.sources.math.weight=0.15", "data.sources.alignment.weight=0.05"], "data"),
    ("sft", [], ["stage.loss_tokens=all"], "objective"),
    ("sft", [], ["optim.learning_rate=2e-3"], "optim"),
    ("sft", [], ["optim.warmup_steps=3", "optim.clip_norm=0.5"], "optim"),
    ("sft", [], ["parallel.zero_stage=2"], "free"),
    ("sft", [], ["parallel.expert_parallel_size=1"], "free"),
    ("sft", [], ["model.dtype=bfloat16"], "layout"),
    ("sft", [], ["model.dtype=bfloat16"], "layout"),
    ("opd", [], ["stage.max_sampler_mismatch=0.5", "stage.rollout.canary_tolerance=1e-2"], "free"),
    ("opd", [], ["stage.rollout.batch_size=8", "stage.score_cache.path=cache"], "free"),
    ("opd", [], ["stage.cascade.first.teacher.max_tokens_per_batch=64"], "free"),
    ("opd", SERVED, [f"{URLS}.urls=[http://b:2,http://c:3]"], "free"),
    ("opd", SERVED, [f"{URLS}.give_up_after_seconds=9000", f"{URLS}.max_rejected=0.5"], "free"),
    ("opd", [], ["data.held_out=null"], "free"),
    ("opd", [], ["stage.cascade.second.num_steps=9"], "said"),
    ("opd", [], ["stage.cascade.first.num_steps=3"], "said"),
    ("opd", COSINE, ["stage.cascade.second.num_steps=9"], "asked"),
    ("opd", [], ["stage.cascade.first.num_steps=2"], "fewer"),
    ("opd", [], ["stage.objective=sampled"], "objective"),
    ("opd", [], ["stage.cascade.first.early_switch.measure_every=2"], "objective"),
    ("opd", [], ["stage.max_importance_ratio=null"], "objective"),
    ("opd", [], ["stage.max_response_length=20"], "data"),
    ("opd", [], ["teacher@stage.cascade.second.teacher=native"], "teacher"),
    ("opd", [], ["stage.cascade.second.teacher.stop_id=3"], "teacher"),
    ("opd", [], ["stage.cascade.first.teacher.dtype=bfloat16"], "teacher"),
    ("opd", [], ["rollout@stage.rollout=vllm"], "rollout"),
    ("opd", [], ["stage.rollout.replay_routing=true"], "rollout"),
]


@pytest.mark.parametrize(
    ("stage", "then", "now", "outcome"), CHANGES, ids=[" ".join(row[2]) or "-" for row in CHANGES]
)
def test_a_change_is_free_or_said_or_asked_or_refused(
    stage: str, then: list[str], now: list[str], outcome: str, world: World, tmp_path: Path
) -> None:
    leave_checkpoint(composed(stage, world, tmp_path, *then), 3)
    teacher = [f"stage.cascade.second.teacher.path={world.path('teacher_second', 'export')}"]
    given = [*then, *now, *(teacher if stage == "opd" else [])]
    cfg = composed(stage, world, tmp_path, *given)
    if outcome in {"free", "said"}:
        found = continuation(cfg)
        assert found is not None and found.num_updates == 3
        assert bool(found.sentences) == (outcome == "said")
        return
    with pytest.raises(InputError) as refused:
        continuation(cfg)
    said = str(refused.value)
    if outcome == "asked":
        assert "on_resume.schedule=keep" in said and "on_resume.schedule=stretch" in said
    elif outcome == "fewer":
        assert re.search(r"num_steps=2 is fewer than the 3 steps that .* has made", said)
    elif outcome == "layout":
        assert "nothing allows it yet" in said and "on_resume.allow" not in said
    else:
        field = now[0].split("=")[0].removeprefix("teacher@").removeprefix("rollout@")
        assert field in said
        assert f"on_resume.allow=[{outcome}]" in said
        assert continuation(
            composed(stage, world, tmp_path, *given, f"on_resume.allow=[{outcome}]")
        )


def test_all_groups_that_a_resumption_needs_are_named_at_once(world: World, tmp_path: Path) -> None:
    leave_checkpoint(composed("sft", world, tmp_path), 3)
    given = ["seed=1", "optim.eps=1e-6", "model.dtype=bfloat16", "on_resume.allow=[objective]"]
    with pytest.raises(InputError) as refused:
        continuation(composed("sft", world, tmp_path, *given))
    said = str(refused.value)
    assert "data: seed: 0 -> 1; optim: optim.eps: 1e-08 -> 1e-06; " in said
    assert "on_resume.allow=[data,objective,optim] goes on with the new values" in said
    assert "model.dtype: float32 -> bfloat16: the checkpoint cannot be loaded so" in said


def test_the_held_out_rows_are_of_the_data_where_they_end_a_phase(
    world: World, tmp_path: Path
) -> None:
    measured = "stage.cascade.first.early_switch.measure_every=2"
    leave_checkpoint(composed("opd", world, tmp_path, measured), 3)
    given = [
        measured,
        "data.held_out.sources.math.weight=0.15",
        "data.held_out.sources.alignment.weight=0.05",
    ]
    with pytest.raises(InputError, match=r"on_resume.allow=\[data\]"):
        continuation(composed("opd", world, tmp_path, *given))


def test_another_model_of_other_shape_is_refused_and_one_that_only_moved_is_not(
    world: World, tmp_path: Path
) -> None:
    leave_checkpoint(composed("sft", world, tmp_path / "out"), 3)
    shutil.copytree(world.path("student"), tmp_path / "moved")
    moved = composed("sft", world, tmp_path / "out", f"model.path={tmp_path / 'moved'}")
    assert continuation(moved) is not None
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    for field, value, group in (("num_experts_per_tok", 4, "model"), ("hidden_size", 64, "layout")):
        (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(InputError, match=f"model.architecture.{field}: ") as refused:
            continuation(moved)
        assert ("on_resume.allow=[model]" in str(refused.value)) == (group == "model")


def test_a_longer_cosine_says_both_rates_and_takes_the_chosen_one(
    world: World, tmp_path: Path
) -> None:
    # From 4e-3 to 4e-4 over steps 2 .. 5, or 2 .. 9: cos(pi/3) = 1/2 and cos(pi/7) = 0.90097.
    leave_checkpoint(composed("sft", world, tmp_path), 3)
    assert composed("sft", world, tmp_path).optim.rate_at(3, 6) == pytest.approx(3.1e-3)
    with pytest.raises(InputError) as asked:
        continuation(composed("sft", world, tmp_path, "stage.num_steps=10"))
    said = str(asked.value)
    assert said.startswith("stage.num_steps: 6 -> 10 steps: the learning rate of step 3 is 0.0031 ")
    assert "on the course of 6 steps and 0.003822 on that of 10" in said
    assert "which stays at 0.0004 from step 6 on" in said
    for choice, steps in (("keep", 6), ("stretch", 10)):
        given = ["stage.num_steps=10", f"on_resume.schedule={choice}"]
        cfg = composed("sft", world, tmp_path, *given)
        assert schedule_steps(cfg) == steps
        found = continuation(cfg)
        assert found is not None and found.sentences[0] == "stage.num_steps: 6 -> 10 steps"


# An epoch of 32 rows is 4 steps of 8.
ONE_AND_A_HALF = ["stage.num_steps=null", "stage.num_epochs=1.5", "stage.global_batch_size=8"]


def epochs(number: float) -> list[str]:
    return [*ONE_AND_A_HALF, f"stage.num_epochs={number}"]


def test_other_epochs_are_another_number_of_steps(world: World, tmp_path: Path) -> None:
    assert schedule_steps(composed("sft", world, tmp_path, *ONE_AND_A_HALF), 32) == 6
    leave_checkpoint(composed("sft", world, tmp_path, *ONE_AND_A_HALF), 3, epoch_rows=32)
    same = continuation(composed("sft", world, tmp_path, *ONE_AND_A_HALF))
    assert same is not None and same.schedule_steps == 6 and same.sentences == []
    with pytest.raises(InputError) as asked:
        continuation(composed("sft", world, tmp_path, *epochs(2.5)))
    assert str(asked.value).startswith("stage.num_epochs: 6 -> 10 steps: the learning rate of step")
    for choice, steps in (("keep", 6), ("stretch", 10)):
        cfg = composed("sft", world, tmp_path, *epochs(2.5), f"on_resume.schedule={choice}")
        assert schedule_steps(cfg, 32) == steps
    with pytest.raises(
        InputError, match=r"num_epochs=0.5 makes 2 steps, which is fewer than the 3 steps that"
    ):
        continuation(composed("sft", world, tmp_path, *epochs(0.5)))


def test_steps_in_place_of_as_many_epochs_are_no_change(world: World, tmp_path: Path) -> None:
    given = ["stage.global_batch_size=8"]
    leave_checkpoint(composed("sft", world, tmp_path, *ONE_AND_A_HALF), 3, epoch_rows=32)
    found = continuation(composed("sft", world, tmp_path, *given))  # of six steps
    assert found is not None and found.sentences == []
    with pytest.raises(InputError, match=r"^stage.num_steps: 6 -> 8 steps"):
        continuation(composed("sft", world, tmp_path, *given, "stage.num_steps=8"))


def test_an_epoch_of_other_data_is_as_long_as_these(world: World, tmp_path: Path) -> None:
    leave_checkpoint(composed("sft", world, tmp_path, *ONE_AND_A_HALF), 3, epoch_rows=32)
    cfg = composed("sft", world, tmp_path, *ONE_AND_A_HALF)
    assert continuation(cfg) is not None  # the data are not open yet
    with pytest.raises(InputError, match=r"^stage.num_epochs: 6 -> 8 steps: .*schedule=stretch"):
        continuation(cfg, 40)
    with pytest.raises(InputError, match=r"makes 2 steps, which is fewer than the 3 steps"):
        schedule_steps(cfg, 10)


def test_a_finished_run_of_epochs_goes_on_with_more_of_them(world: World, tmp_path: Path) -> None:
    cfg = composed("sft", world, tmp_path, *ONE_AND_A_HALF)
    leave_checkpoint(cfg, 6, epoch_rows=32)
    mark_finished(cfg, observed(cfg, digests={}), 32)
    assert is_finished(cfg)
    assert is_finished(composed("sft", world, tmp_path, *epochs(1.4)))  # 5.6 steps are six
    keep = "on_resume.schedule=keep"
    assert not is_finished(composed("sft", world, tmp_path, *epochs(1.6), keep))
    with pytest.raises(InputError, match=r"a finished run of 6 steps, and 5 are fewer"):
        is_finished(composed("sft", world, tmp_path, *epochs(1.25)))


def test_a_kept_course_is_kept_by_later_resumptions_until_another_is_chosen(
    world: World, tmp_path: Path
) -> None:
    leave_checkpoint(composed("sft", world, tmp_path, "stage.num_steps=10"), 7, schedule_steps=6)
    same = ["stage.num_steps=10"]
    assert schedule_steps(composed("sft", world, tmp_path, *same)) == 6
    keep = [*same, "on_resume.schedule=keep"]
    assert schedule_steps(composed("sft", world, tmp_path, *keep)) == 6
    stretch = [*same, "on_resume.schedule=stretch"]
    assert schedule_steps(composed("sft", world, tmp_path, *stretch)) == 10
    # 6 and 10 steps are both at their end by step 12: nothing to choose between 10 and 12 but rates
    with pytest.raises(InputError, match=r"on_resume.schedule=keep"):
        continuation(composed("sft", world, tmp_path, "stage.num_steps=12"))


def phases(world: World, tmp_path: Path, names: list[str], *more: str) -> TrainConfig:
    """A cascade of two steps a phase, in the order that is given."""
    cfg = composed("opd", world, tmp_path, *more)
    first = cfg.stage.cascade["first"]
    first.num_steps = 2
    cfg.stage.cascade = dict.fromkeys(names, first)
    return cfg


# Phases then and now, steps made, and what becomes of it.
ORDERS = {
    "one more": (["a", "b"], ["a", "b", "c"], 3, "a phase of 2 steps is added"),
    "one more after the end": (["b", "a"], ["b", "a", "c"], 4, "a phase of 2 steps is added"),
    "one less": (["a", "b", "c"], ["a", "b"], 3, "a phase of 2 steps is left out"),
    "others to come": (["a", "b", "c"], ["a", "c", "b"], 1, "on_resume.allow=[teacher]"),
    "one put between": (["a", "b"], ["a", "c", "b"], 1, "on_resume.allow=[teacher]"),
    "one put before": (["b", "c"], ["a", "b", "c"], 3, "has made 2 steps of 'b' as phase 1"),
    "trade places": (["z", "a"], ["a", "z"], 3, "has made 2 steps of 'z' as phase 1"),
    "one that taught is gone": (["a", "b"], ["a"], 3, "has made 1 steps of 'b' as phase 2"),
}


@pytest.mark.parametrize(("then", "now", "made", "says"), ORDERS.values(), ids=ORDERS.keys())
def test_phases_come_after_those_that_taught(
    then: list[str], now: list[str], made: int, says: str, world: World, tmp_path: Path
) -> None:
    leave_checkpoint(phases(world, tmp_path, then), made)
    cfg = phases(world, tmp_path, now, "on_resume.allow=[teacher]")
    if "phase of" in says:
        found = continuation(phases(world, tmp_path, now))
        assert found is not None and says in found.sentences[0]
        return
    with pytest.raises(InputError) as refused:
        continuation(phases(world, tmp_path, now) if "allow" in says else cfg)
    assert says in str(refused.value)
    if "allow" in says:
        assert continuation(cfg) is not None


def test_a_phase_that_was_followed_by_another_cannot_become_longer(
    world: World, tmp_path: Path
) -> None:
    leave_checkpoint(composed("opd", world, tmp_path), 5)
    with pytest.raises(InputError, match=r"first.num_steps=6, but that phase ended after 4 steps"):
        continuation(composed("opd", world, tmp_path, "stage.cascade.first.num_steps=6"))
    with pytest.raises(InputError, match=r"first.num_steps=3 is fewer than the 4 steps"):
        continuation(composed("opd", world, tmp_path, "stage.cascade.first.num_steps=3"))
    converged = {"converged": {"first": 3}}
    shutil.rmtree(tmp_path / "checkpoints")
    leave_checkpoint(composed("opd", world, tmp_path), 4, cascade=converged)
    assert continuation(composed("opd", world, tmp_path, "stage.cascade.first.num_steps=6"))


def test_a_field_that_an_older_checkpoint_does_not_have_counts_as_its_default(
    world: World, tmp_path: Path
) -> None:
    cfg = composed("opd", world, tmp_path)
    path = leave_checkpoint(cfg, 3)
    state = json.loads((path / "state.json").read_text())
    config = state["config"]
    del config["on_resume"], config["stage"]["max_steps"], config["data"]["num_rows"]
    del config["stage"]["cascade"]["first"]["early_switch"]["num_prompts"]
    del config["stage"]["cascade"]["second"]["teachers_by_group"]
    write_state(path, state)
    assert continuation(cfg) == continuation(cfg) is not None
    other = "stage.cascade.first.early_switch.num_prompts=8"
    with pytest.raises(InputError, match=r"first.early_switch.num_prompts: 256 -> 8"):
        continuation(composed("opd", world, tmp_path, other))
    del config["optim"]["learning_rate"]  # that has none
    config["optim"]["label_smoothing"] = 0.1  # nor is there such a field
    write_state(path, state)
    with pytest.raises(InputError) as refused:
        continuation(cfg)
    assert "optim: optim.label_smoothing: 0.1 -> None, optim.learning_rate: None -> 0.001" in str(
        refused.value
    )


def test_a_run_is_not_made_of_another_stages(world: World, tmp_path: Path) -> None:
    leave_checkpoint(composed("sft", world, tmp_path), 3)
    with pytest.raises(InputError, match=r"stage.kind: sft -> opd, and nothing allows that"):
        continuation(composed("opd", world, tmp_path))


def test_a_torn_state_is_refused_in_a_sentence(world: World, tmp_path: Path) -> None:
    path = leave_checkpoint(composed("sft", world, tmp_path), 3)
    (path / "state.json").write_text('{"num_updates": 3, "conf')
    with pytest.raises(InputError, match=r"state.json is damaged: .* resume=<path>"):
        continuation(composed("sft", world, tmp_path))


def test_a_state_of_another_version_is_refused_in_a_sentence(world: World, tmp_path: Path) -> None:
    cfg = composed("sft", world, tmp_path)
    path = leave_checkpoint(cfg, 3)
    state = json.loads((path / "state.json").read_text())
    del state["schedule_steps"], state["phases"]
    write_state(path, state)
    with pytest.raises(InputError, match=r"another version .*lacks phases, schedule_steps.*never"):
        continuation(cfg)


FINISHED = [
    ([], "finished"),
    (["checkpoint.save_every=9", "stage.eval_every=3"], "finished"),
    (["stage.num_steps=8", "on_resume.schedule=keep"], "goes on"),
    (["stage.num_steps=8"], "choose on_resume.schedule=keep"),
    (["stage.num_steps=5"], "a finished run of 6 steps, and 5 are fewer than were made"),
    (["stage.max_steps=4"], "a finished run of 6 steps, and 4 are fewer than were made"),
    (["seed=1"], "data: seed: 0 -> 1; it has no steps left to make with other values"),
    (["seed=1", "on_resume.allow=[data]"], "it has no steps left to make with other values"),
    (["seed=1", "stage.num_steps=8"], "on_resume.allow=[data]"),
    (["seed=1", "on_resume.allow=[data]", "stage.num_steps=8"], "on_resume.schedule=keep"),
    (
        ["seed=1", "on_resume.allow=[data]", "stage.num_steps=8", "on_resume.schedule=keep"],
        "goes on",
    ),
]


@pytest.mark.parametrize(("now", "outcome"), FINISHED, ids=[" ".join(row[0]) for row in FINISHED])
def test_a_finished_run_has_nothing_left_or_goes_on_or_is_refused(
    now: list[str], outcome: str, world: World, tmp_path: Path
) -> None:
    cfg = composed("sft", world, tmp_path)
    leave_checkpoint(cfg, 6)
    finish(cfg)
    again = composed("sft", world, tmp_path, *now)
    if outcome in {"finished", "goes on"}:
        assert is_finished(again) == (outcome == "finished")
        return
    with pytest.raises(InputError) as refused:
        is_finished(again)
    assert outcome in str(refused.value)


def test_a_finished_run_goes_on_with_mended_rows_where_that_is_allowed(
    world: World, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    given = ["data=quickstart_text", f"data.sources.text.path={rows}"]
    cfg = composed("sft", world, tmp_path, *given)
    leave_checkpoint(cfg, 6)
    finish(cfg)
    rows.write_text('{"text": "mended"}\n')
    more = [*given, "stage.num_steps=8", "on_resume.schedule=keep"]
    with pytest.raises(InputError, match=r"data.sources.text.path: .* holds something else"):
        is_finished(composed("sft", world, tmp_path, *more))
    assert not is_finished(composed("sft", world, tmp_path, *more, "data.on_change=continue"))
    with pytest.raises(InputError, match=r"was made anew; .* or give it more steps"):
        is_finished(composed("sft", world, tmp_path, *given, "data.on_change=continue"))


def test_a_finished_run_without_a_checkpoint_says_so(world: World, tmp_path: Path) -> None:
    finish(composed("sft", world, tmp_path))
    with pytest.raises(InputError, match=r"of 6 steps that left no checkpoint to go on from"):
        is_finished(composed("sft", world, tmp_path, "stage.num_steps=8"))


def test_a_finished_cascade_that_converged_has_no_steps_left(world: World, tmp_path: Path) -> None:
    cfg = composed("opd", world, tmp_path)
    leave_checkpoint(cfg, 5, cascade={"converged": {"first": 3}})
    finish(cfg)
    assert is_finished(composed("opd", world, tmp_path, "stage.cascade.first.num_steps=9"))
    assert not is_finished(composed("opd", world, tmp_path, "stage.cascade.second.num_steps=3"))


def finish(cfg: TrainConfig) -> None:
    """Leave the note of a run that has just begun and ended."""
    mark_finished(cfg, observed(cfg, digests={}))


@pytest.fixture
def own(world: World, tmp_path: Path) -> Path:
    """A student and data that a test may change."""
    shutil.copytree(world.path("student"), tmp_path / "student")
    shutil.copytree(world.path("data"), tmp_path / "data")
    return tmp_path


def touch(path: Path) -> None:
    later = path.stat().st_mtime + 60
    os.utime(path, (later, later))


@pytest.mark.parametrize("file", ["student/model.safetensors", "data/train/math.jsonl"])
def test_a_finished_run_looks_at_what_files_hold_and_not_at_their_times(
    file: str, world: World, own: Path
) -> None:
    cfg = compose_config("quickstart_sft", f"root={own}", f"output_dir={own / 'out'}")
    Path(cfg.output_dir).mkdir()
    finish(cfg)
    touch(own / file)
    assert is_finished(cfg)
    shutil.copytree(own / "student", own / "elsewhere")
    moved = f"model.path={own / 'elsewhere'}"
    assert is_finished(
        compose_config("quickstart_sft", f"root={own}", f"output_dir={own / 'out'}", moved)
    )
    content = bytearray((own / file).read_bytes())
    content[-5] ^= 1  # of as many bytes
    (own / file).write_bytes(content)
    touch(own / file)
    with pytest.raises(
        InputError, match=rf"was finished before .*{Path(file).parts[0]}.* was made anew"
    ):
        is_finished(cfg)


def test_a_plan_of_a_benchmark_ignores_what_its_directory_holds(
    world: World, tmp_path: Path
) -> None:
    words = ["experiment=benchmark", "stage.suite=fixture", f"output_dir={tmp_path}"]
    words += [f"model.path={world.path('student')}"]
    finish(read_run(words))
    with pytest.raises(SystemExit, match="holds a finished run of another config"):
        read([*words, "seed=7"])
    cfg = read([*words, "seed=7", "stage.plan=true"])
    assert cfg is not None and cfg.seed == 7


def test_a_file_that_was_written_while_the_run_ran_is_not_noted_as_its_own(
    world: World, own: Path
) -> None:
    cfg = compose_config("quickstart_sft", f"root={own}", f"output_dir={own / 'out'}")
    Path(cfg.output_dir).mkdir()
    content = observed(cfg, digests={})
    rows = own / "data" / "train" / "math.jsonl"
    rows.write_text(rows.read_text() + "\n")
    mark_finished(cfg, content)
    with pytest.raises(InputError, match=r"was finished before .*math.jsonl was made anew"):
        is_finished(cfg)


def test_json_in_another_spelling_holds_the_same(tmp_path: Path) -> None:
    for name, text in (("one", '{"a": 1, "b": 2}'), ("two", '{"b":2,\n"a":1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "two" / "trainer_state.json").write_text("{}")  # no part of a model
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text('{"b": 2, "a": 2}')
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_a_digest_covers_every_byte_and_no_name_of_a_directory(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3_000_000))
        (tmp_path / name / "README.md").write_text(name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    content = bytearray(3_000_000)
    content[1_234_567] = 1
    (tmp_path / "two" / "model.safetensors").write_bytes(content)
    assert digest(tmp_path / "one") != digest(tmp_path / "two")
    assert digest(tmp_path / "three") is None


def test_an_evaluation_that_asks_for_more_is_not_finished(world: World, tmp_path: Path) -> None:
    cfg = composed("evaluate", world, tmp_path)
    finish(cfg)
    assert is_finished(composed("evaluate", world, tmp_path, "logging.console_every=3"))
    with pytest.raises(InputError, match=r"stage.num_prompts: .*; choose another root") as refused:
        is_finished(composed("evaluate", world, tmp_path, "stage.num_prompts=3"))
    assert "on_resume" not in str(refused.value)
