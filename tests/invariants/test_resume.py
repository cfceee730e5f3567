"""Three updates, a crash, a resumption and three more are six, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marco_train.config.resumption import check_resume, complete_checkpoints, is_finished, observed
from marco_train.errors import InputError
from marco_train.run import mark_finished
from tests.helpers.checkpoints import same_generators, same_state
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

BFLOAT16 = ["model.dtype=bfloat16", "stage.rollout.canary_tolerance=0.2"]
CASES = {
    "sft, one rank": ("sft", 1, []),
    "sft, experts over two ranks": ("sft", 2, []),
    "sft, experts over two ranks, ZeRO 2": ("sft", 2, ["parallel.zero_stage=2"]),
    "sft, experts over two ranks, bfloat16": ("sft", 2, BFLOAT16[:1]),
    "sft, experts over two ranks, bfloat16, ZeRO 2": (
        "sft",
        2,
        [*BFLOAT16[:1], "parallel.zero_stage=2"],
    ),
    "opd, one rank": ("opd", 1, []),
    "opd, experts over two ranks": ("opd", 2, []),
    "opd, experts over two ranks, bfloat16, offloaded": (
        "opd",
        2,
        [*BFLOAT16, "parallel.offload_while_sampling=true"],
    ),
    "opd, experts over two ranks, bfloat16, replayed": (
        "opd",
        2,
        [*BFLOAT16, "stage.rollout.replay_routing=true"],
    ),
    "opd, one rank, sampled": ("opd", 1, ["stage.objective=sampled"]),
}


LONG = [name for name in CASES if "bfloat16" in name or "sampled" in name]


@pytest.mark.parametrize(
    ("stage", "num_ranks", "more"),
    [
        pytest.param(*case, marks=[pytest.mark.long] if name in LONG else [], id=name)
        for name, case in CASES.items()
    ],
)
def test_three_a_crash_and_three_more_are_six_updates(
    stage: str, num_ranks: int, more: list[str], world: World, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = [*overrides(stage, world, whole, num_ranks), *more]
    cfg = compose_config(f"quickstart_{stage}", *given)
    run_on_ranks(num_ranks, run, cfg, stage, None)

    given = [*overrides(stage, world, parts, num_ranks), *more]
    cfg = compose_config(f"quickstart_{stage}", *given)
    run_on_ranks(num_ranks, run, cfg, stage, 5)
    assert sorted(p.name for p in (parts / "checkpoints").iterdir()) == ["step_000003"]
    assert not (parts / "finished.json").exists()
    run_on_ranks(num_ranks, run, cfg, stage, None)

    last = [out / "checkpoints" / "step_000006" for out in (whole, parts)]
    same_state(*last)
    same_generators(*last)
    assert len(list(last[0].glob("rank_*"))) == num_ranks
    assert losses(whole) == losses(parts)
    assert [line["step"] for line in losses(parts)] == [1, 2, 3, 4, 5, 6]
    for export in ("export", *(("export-first", "export-second") if stage == "opd" else ())):
        files = [(path / export / "model.safetensors").read_bytes() for path in (whole, parts)]
        assert files[0] == files[1]


def test_a_checkpoint_that_is_written_beside_training_is_the_same(
    world: World, tmp_path: Path
) -> None:
    given = ["model.dtype=bfloat16", "parallel.zero_stage=2"]
    for name in ("blocking", "beside"):
        more = [*given, f"checkpoint.asynchronous={name == 'beside'}"]
        cfg = compose_config("quickstart_sft", *overrides("sft", world, tmp_path / name, 2), *more)
        run_on_ranks(2, run, cfg, "sft", None)
    for step in ("step_000003", "step_000006"):
        paths = [tmp_path / name / "checkpoints" / step for name in ("blocking", "beside")]
        same_state(*paths)
        same_generators(*paths)
        assert (
            sorted(paths[0].iterdir())[0].read_text() == sorted(paths[1].iterdir())[0].read_text()
        )
    assert losses(tmp_path / "blocking") == losses(tmp_path / "beside")


def test_a_phase_converges_at_the_same_step_after_a_resumption(
    world: World, tmp_path: Path
) -> None:
    outs = [tmp_path / "whole", tmp_path / "parts"]
    for out, crash_at in zip(outs, (None, 3), strict=True):
        rule = {"measure_every": 2, "num_prompts": 3, "num_measures": 1, "min_fall": 5.0}
        given = [
            *overrides("opd", world, out, 1),
            "checkpoint.save_every=1",
            "stage.cascade.second.num_steps=4",
            # The first before step 2, the second before step 4, which ends the run.
            *(f"stage.cascade.first.early_switch.{name}={v}" for name, v in rule.items()),
            *(f"stage.cascade.second.early_switch.{name}={v}" for name, v in rule.items()),
        ]
        cfg = compose_config("quickstart_opd", *given)
        for crash in (crash_at, None):
            run_on_ranks(1, run, cfg, "opd", crash)
    whole, parts = (losses(out) for out in outs)
    assert whole == parts
    assert [line["cascade/phase"] for line in whole] == [0, 0, 1, 1]
    # The second phase is measured first where the former ended, with its own teacher.
    assert ["eval/reverse_kl" in line for line in whole] == [True, False, True, False]
    assert whole[0]["eval/reverse_kl"] > 0
    for export in ("export", "export-first", "export-second"):
        files = [(out / export / "model.safetensors").read_bytes() for out in outs]
        assert files[0] == files[1]
    # One copy of the last phase's.
    assert (outs[0] / "export").readlink() == Path("export-second")


def test_a_run_whose_first_phase_converges_makes_all_steps_of_the_second(
    world: World, tmp_path: Path
) -> None:
    rule = {"measure_every": 2, "num_prompts": 3, "num_measures": 1, "min_fall": 5.0}
    given = overrides("opd", world, tmp_path, 1)
    given += [f"stage.cascade.first.early_switch.{name}={v}" for name, v in rule.items()]
    run_on_ranks(1, run, compose_config("quickstart_opd", *given), "opd", None)
    assert [line["cascade/phase"] for line in losses(tmp_path)] == [0, 0, 1, 1]
    assert (tmp_path / "finished.json").exists()


def test_two_ranks_distil_as_one(world: World, tmp_path: Path) -> None:
    found = []
    for name, num_ranks in (("one", 1), ("two", 2)):
        out = tmp_path / name
        cfg = compose_config("quickstart_opd", *overrides("opd", world, out, num_ranks))
        run_on_ranks(num_ranks, run, cfg, "opd", None)
        found.append((losses(out), load_file(out / "export" / "model.safetensors")))
    (one_metrics, one_weights), (two_metrics, two_weights) = found
    for one, two in zip(one_metrics, two_metrics, strict=True):
        # How far sampler and policy round apart differs; it is bounded by the canary.
        assert one.pop("kl/sampler_mismatch") < 1e-5
        assert two.pop("kl/sampler_mismatch") < 1e-5
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for name, weight in one_weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def crashed(own_world: World, tmp_path: Path) -> tuple[list[str], Path]:
    out = tmp_path / "run"
    given = overrides("sft", own_world, out, 1)
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", 4)
    return given, out


def refusal(given: list[str], num_ranks: int = 1) -> str:
    with pytest.raises(AssertionError) as failure:
        run_on_ranks(num_ranks, run, compose_config("quickstart_sft", *given), "sft", None)
    assert InputError.__name__ in str(failure.value)
    return str(failure.value)


def test_a_checkpoint_is_refused_where_it_does_not_belong(
    crashed: tuple[list[str], Path], world: World, tmp_path: Path
) -> None:
    given, out = crashed
    wrong = compose_config("quickstart_sft", *given, "resume=/no/such/step_000003")
    with pytest.raises(InputError, match=r"resume=/no/such/step_000003 is no .*/step_000003$"):
        check_resume(wrong)
    assert "seed: 0 -> 1" in refusal([*given, "seed=1"])
    assert "learning_rate: 0.004 -> 0.002" in refusal([*given, "optim.learning_rate=2e-3"])
    shard = out / "checkpoints" / "step_000003" / "rank_000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert "rank_000.safetensors is damaged" in refusal(given)


def test_resume_never_starts_over_and_keeps_the_old_checkpoints(
    crashed: tuple[list[str], Path],
) -> None:
    given, out = crashed
    cfg = compose_config("quickstart_sft", *given, "resume=never", "stage.max_steps=2")
    run_on_ranks(1, run, cfg, "sft", None)
    assert [line["step"] for line in losses(out)] == [1, 2]
    assert (out / "checkpoints.old-0" / "step_000003" / "manifest.json").is_file()


def test_an_older_checkpoint_is_taken_up_and_newer_ones_are_kept_aside(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = [*overrides("sft", world, out, 1), "checkpoint.save_every=1", "checkpoint.keep_last=3"]
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", None)
    final = (out / "export" / "model.safetensors").read_bytes()
    old = out / "checkpoints" / "step_000004"
    again = compose_config("quickstart_sft", *given, f"resume={old}")
    assert not is_finished(again)
    run_on_ranks(1, run, again, "sft", 5)
    assert not (out / "finished.json").exists()
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == [
        "step_000005",
        "step_000004",
    ]
    assert len(list((out / "checkpoints.old-0").iterdir())) == 2
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", None)
    assert (out / "export" / "model.safetensors").read_bytes() == final


def test_a_finished_run_is_stale_once_its_model_is_made_anew(
    own_world: World, tmp_path: Path
) -> None:
    cfg = compose_config("quickstart_sft", f"root={own_world.root}", f"output_dir={tmp_path}")
    assert not is_finished(cfg)
    mark_finished(cfg, observed(cfg, digests={}))
    assert is_finished(cfg)
    file = Path(own_world.path("student", "config.json"))
    before = file.read_text()
    file.write_text(before.replace("10000.0", "20000.0"))
    later = tmp_path.stat().st_mtime + 60
    os.utime(file, (later, later))
    with pytest.raises(InputError, match=r"was finished before .*student was made anew"):
        is_finished(cfg)
    file.write_text(before)
    assert is_finished(cfg)  # what is there is what was there, whatever its time


def test_a_torn_line_of_metrics_does_not_stop_a_resumption(
    crashed: tuple[list[str], Path],
) -> None:
    given, out = crashed
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/cr')
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", None)
    assert [line["step"] for line in losses(out)] == [1, 2, 3, 4, 5, 6]


def test_changed_data_are_refused(crashed: tuple[list[str], Path], own_world: World) -> None:
    given, _ = crashed
    file = Path(own_world.path("data", "train", "math.jsonl"))
    file.write_text(file.read_text().replace("vier", "five"))  # as many rows, another answer
    assert "the data changed since the checkpoint was saved" in refusal(given)


def test_only_complete_checkpoints_count_and_old_ones_go(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [*overrides("sft", world, out, 1), "checkpoint.save_every=1", "checkpoint.keep_last=2"]
    (out / "checkpoints" / "step_000099").mkdir(parents=True)  # no manifest
    run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", None)
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step_000005", "step_000006", "step_000099"]
