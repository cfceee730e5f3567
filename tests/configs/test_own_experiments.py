"""A run is told by words alone, or by a file outside the repository; what is mistyped is named."""

import json
from pathlib import Path

import pytest

from marco_train.config.compose import compose, read_run
from marco_train.config.data import AUTO
from marco_train.config.opd import OPDConfig
from marco_train.config.optim import OptimConfig, Schedule
from marco_train.config.teacher import HFTeacherConfig, NativeTeacherConfig
from marco_train.data.loader import PromptLoader, SFTLoader, held_out_questions, held_out_stream
from marco_train.data.stream import ConversationStream
from marco_train.errors import InputError
from marco_train.types import Conversation
from tests.helpers.processes import launch
from tests.helpers.rows import chat, write
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

OWN = ["model.path=weights", "data=own", "data.path=rows.jsonl"]
SFT = ["experiment=sft", *OWN]
OPD = ["experiment=opd", *OWN, "teacher.path=teacher"]


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        read_run(words)
    return str(refused.value)


def test_a_model_and_rows_are_a_fine_tuning() -> None:
    cfg = read_run(SFT)
    (source,) = cfg.data.sources.values()
    assert (source.path, source.weight) == ("rows.jsonl", AUTO)
    assert (cfg.stage.num_epochs, cfg.stage.global_batch_size) == (1, 32)
    assert cfg.stage.max_length == 4096
    assert cfg.data.held_out is None


def test_a_teacher_reaches_the_phase_of_the_general_distillation() -> None:
    for words, kind in (([], HFTeacherConfig), (["teacher=native"], NativeTeacherConfig)):
        stage = read_run([*OPD, *words]).stage
        assert isinstance(stage, OPDConfig)
        (phase,) = stage.cascade.values()
        assert type(phase.teacher) is kind
        assert phase.teacher.path == "teacher"
        assert (phase.num_steps, phase.num_epochs) == (None, 1)
        assert (stage.max_prompt_length, stage.max_response_length) == (2048, 2048)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (SFT[:1], "model.path has no value: give model.path=<directory, or org/name"),
        (SFT[:3], "data.path has no value: give data.path=<file"),
        (OPD[:-1], "teacher.path has no value: give teacher.path="),
    ],
)
def test_what_is_missing_is_asked_for(words: list[str], names: str) -> None:
    assert refusal(*words).startswith(names)


def test_a_run_without_a_length_takes_the_positions_of_its_model(world: World) -> None:
    path = f"model.path={world.path('sft', 'export')}"  # of 256 positions
    assert read_run([*SFT, path]).stage.max_length == 256
    stage = read_run([*OPD, path]).stage
    assert (stage.max_prompt_length, stage.max_response_length) == (128, 128)
    stage = read_run([*OPD, path, "stage.max_response_length=200"]).stage
    assert (stage.max_prompt_length, stage.max_response_length) == (56, 200)


def own_experiment(directory: Path, *defaults: str) -> list[str]:
    """An experiment of one's own that builds on `sft`, and the words that choose it."""
    (directory / "experiment").mkdir(parents=True, exist_ok=True)
    lines = ["# @package _global_", "defaults:", *(f"  - {each}" for each in defaults)]
    lines += ["name: chats", "stage: {num_epochs: 2, eval_every: 50}", "data: {path: rows.jsonl}"]
    (directory / "experiment" / "chats.yaml").write_text("\n".join([*lines, ""]))
    return ["--config-dir", str(directory), "experiment=chats", "model.path=weights"]


def test_an_experiment_that_the_one_below_it_would_undo_is_refused(tmp_path: Path) -> None:
    own = "override /data: own"
    for order in (["sft", own, "_self_"], ["sft", "_self_", own], ["sft", own]):
        assert read_run(own_experiment(tmp_path, *order)).stage.num_epochs == 2
    words = own_experiment(tmp_path, "_self_", "sft", own)
    assert refusal(*words) == (
        "experiment/chats.yaml: sft stands behind _self_ in its defaults, and undoes name=chats, "
        "stage.num_epochs=2.0: put the line `- _self_` last"
    )
    # What the command line says counts all the same.
    assert read_run([*words, "name=mine", "stage.num_epochs=3"]).stage.num_epochs == 3


def test_sources_are_added_by_their_fields_alone() -> None:
    words = [
        *SFT,
        "data.sources.mine.path=more.jsonl",
        "data.sources.mine.columns.messages=chat",
        "data.held_out.sources.dev.path=dev.jsonl",
    ]
    data = read_run(words).data
    assert {name: each.path for name, each in data.sources.items()} == {
        "own": "rows.jsonl",
        "mine": "more.jsonl",
    }
    assert data.sources["mine"].columns == {"messages": "chat"}
    assert data.held_out is not None
    assert data.held_out.sources["dev"].path == "dev.jsonl"


PATHS = [
    "with spaces.jsonl",
    "ä/中.jsonl",
    "quote's.jsonl",
    "a=b,c.jsonl",
    "a(1).jsonl",
    "x\\'y",
    "z\\",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_any_characters_needs_no_quotes_of_hydra(path: str) -> None:
    words = ["experiment=sft", "model.path=weights", "data=own", f"data.path={path}"]
    assert read_run([*words, "data.sources.more.path=ä b"]).data.path == path


NO_SHAPE = (
    "model.architecture is null, as the model's files tell its shape; for a new model choose "
    "model=<group>, or give its shape in a file of --config-dir"
)
MISTYPED = [
    (["optim.learnin_rate=1"], "there is no optim.learnin_rate; did you mean optim.learning_rate"),
    (["optim.lr=1"], "did you mean optim.learning_rate? optim has balance_coefficient, "),
    (["learning_rate=1"], "there is no learning_rate; did you mean optim.learning_rate?"),
    (["stage.epochs=1"], "did you mean stage.num_epochs?"),
    (["+optim.momentun=1"], "there is no optim.momentun; known are learning_rate, "),
    (["+optim.bta1=1"], "did you mean optim.beta1?"),
    (["data.sources.own.pth=x"], "did you mean data.sources.own.path?"),
    (["experiment=stf"], "there is no experiment 'stf'; did you mean sft? known are "),
    (["model=qwen3_06b"], "there is no model 'qwen3_06b'; did you mean qwen3_0_6b? known are "),
    (["~optim.beta"], "there is no optim.beta to delete; did you mean optim.beta"),
    (["rollout@stage.rolout=vllm"], "this run has no part that rollout@stage.rolout could"),
    (["seed"], "'seed' is no key=value"),
    (["seed = 1"], "'seed = 1' is no key=value that can be read: it takes no spaces around ="),
    (["seed", "=", "1"], "'seed' is no key=value that can be read: it takes no spaces around ="),
    (["seed=", "1"], "'1' is no key=value that can be read: it takes no spaces around ="),
    (["stage.num_epochs=two"], "stage.num_epochs=two: takes a number"),
    (["stage.max_length=two"], "stage.max_length=two: takes a whole number"),
    (["data.keep_empty_answers=perhaps"], "keep_empty_answers=perhaps: takes true or false"),
    (["model.architecture={hidden_size:8}"], f"model.architecture={{hidden_size:8}}: {NO_SHAPE}"),
    (["model.architecture.hidden_size=8"], f"model.architecture.hidden_size=8: {NO_SHAPE}"),
    (["+model.architecture.hidden_size=8"], f"+model.architecture.hidden_size=8: {NO_SHAPE}"),
    (["name=[a"], "'name=[a' is no key=value"),
    (["--frob"], "there is no option '--frob'"),
    (["data.held_out=0.02"], "data.held_out takes data.held_out.share=0.02"),
    (["data.held_out=dev.jsonl"], "data.held_out takes data.held_out.share=0.02"),
    (["data.held_out=[a]"], "data.held_out takes data.held_out.share=0.02"),
    (["data.held_out.dev.path=x"], "data.held_out takes data.held_out.share=0.02"),
    (["+data.held_out.dev.path=x"], "there is no data.held_out.dev; known are sources, share"),
    (["data.held_out.share=2"], "share is 2.0, and must be a share between 0 and 1"),
    (
        ["data.held_out.share=0.1", "data.held_out.sources.dev.path=x"],
        "sources names dev: give one of them",
    ),
    (["data=marco_sft"], "data.path is 'rows.jsonl', and no source reads it: choose data=own"),
    (["root=${oc.env:NOBODY_SETS_THIS}"], "root: "),
    (["optim.warmup_share=2"], "warmup_share is 2.0, and must be a share from 0 to 1"),
    (["optim.warmup_steps=2"], "warmup_share is 0.1 and optim.warmup_steps is 2: give one"),
    (
        ["optim.schedule=linear", "optim.min_learning_rate=1e-5"],
        "optim.schedule is linear, and optim.min_learning_rate 1e-05 is no less",
    ),
]


@pytest.mark.parametrize(("words", "names"), MISTYPED)
def test_what_is_mistyped_is_named_with_what_there_is(words: list[str], names: str) -> None:
    said = refusal(*SFT, *words)
    assert names in said
    assert "\n" not in said and "use +" not in said and "multirun" not in said


def test_a_field_of_another_stage_is_named_by_what_it_is_here() -> None:
    assert "stage.cascade.<phase>.num_steps, or stage.max_steps" in refusal(
        *OPD, "stage.num_steps=3"
    )
    assert "did you mean stage.cascade.own? stage.cascade has own" in refusal(
        *OPD, "stage.cascade.owm.num_steps=3"
    )
    assert "num_steps is 3 and stage.cascade.*.num_epochs is 1.0: give one" in refusal(
        *OPD, "stage.cascade.own.num_steps=3"
    )
    assert "this run has no stage: choose experiment=<name>" in refusal("stage.num_epochs=1")
    assert "no stage was chosen" in refusal()


def test_several_values_are_refused_with_the_loop_to_write() -> None:
    for words in (["seed=0,1"], ["seed=0,1", "optim.beta1=choice(0.8,0.9)"]):
        assert "for job in 'seed=0" in refusal(*SFT, *words)
    done = launch("--multirun", *SFT, "seed=0,1")
    assert done.returncode == 1
    assert "for job in 'seed=0' 'seed=1'; do marco-train experiment=sft model" in done.stderr


def experiment(directory: Path, text: str, name: str = "mine") -> list[str]:
    (directory / "experiment").mkdir(exist_ok=True)
    (directory / "experiment" / f"{name}.yaml").write_text(text)
    return ["--config-dir", str(directory), f"experiment={name}"]


MINE = """# @package _global_
defaults:
  - sft
  - _self_
name: mine
model: {path: weights}
data:
  sources: {mine: {path: rows.jsonl}}
"""


def test_an_experiment_may_lie_outside_the_repository(tmp_path: Path) -> None:
    words = experiment(tmp_path, MINE)
    cfg = read_run(words)
    assert (cfg.name, cfg.data.sources["mine"].path) == ("mine", "rows.jsonl")
    assert read_run([*words[2:], f"--config-dir={tmp_path}"]) == cfg
    # By a launch too, from any directory.
    assert "name: mine" in launch(*words, "--cfg", "job").stdout


def test_a_directory_of_configs_with_commas_and_quotes_is_found(tmp_path: Path) -> None:
    odd = tmp_path / "it's [a, b]"
    odd.mkdir()
    assert read_run(experiment(odd, MINE)).name == "mine"


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    said = refusal(*experiment(tmp_path, "name: ["))
    assert "this is not YAML" in said and "mine.yaml" in said and "line 1" in said
    assert "`# @package _global_`" in refusal(*experiment(tmp_path, "name: mine\n"))
    said = refusal(*experiment(tmp_path, f"{MINE}stage:\n  num_epoch: 1\n"))
    assert (
        "experiment/mine.yaml: there is no stage.num_epoch; did you mean stage.num_epochs" in said
    )
    (tmp_path / "top.yaml").write_text(MINE)
    said = refusal("--config-dir", str(tmp_path), "experiment=top")
    assert f"has to lie in {tmp_path}/experiment/" in said
    said = refusal(*experiment(tmp_path, MINE, "sft"))
    assert "experiment/sft.yaml" in said and "would be hidden" in said
    assert "there is no directory" in refusal("--config-dir", str(tmp_path / "none"), *SFT)
    assert "names no directory" in refusal(*SFT, "--config-dir")


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--cfg", "job", "--resolve"]])
def test_a_run_is_printed_with_or_without_what_its_values_refer_to(words: list[str]) -> None:
    done = launch(*SFT, *words)
    assert done.returncode == 0, done.stderr
    shown = "rows.jsonl" if "--resolve" in words else "${data.path}"
    assert f"path: {shown}" in done.stdout.split("sources:")[1]
    assert compose(SFT).data.path == "rows.jsonl"


def rates(num_steps: int, **fields: object) -> list[float]:
    cfg = OptimConfig(**({"learning_rate": 1.0, "min_learning_rate": 0.0} | fields))  # type: ignore[arg-type]
    return [cfg.rate_at(step, num_steps) for step in range(num_steps)]


def test_a_rate_falls_on_a_line_after_a_share_of_the_steps() -> None:
    found = rates(10, schedule=Schedule.linear, warmup_share=0.5)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    fixed = rates(10, schedule=Schedule.linear, warmup_steps=5)
    assert found == fixed
    assert rates(3, schedule=Schedule.linear, warmup_share=0.0) == pytest.approx([1, 0.5, 0])


def prompts_of(stream: ConversationStream) -> set[str]:
    (source,) = stream.sources.values()
    rows = [source[index] for index in range(len(source))]
    return {row.asked[-1].content for row in rows if isinstance(row, Conversation)}


def test_a_share_of_the_prompts_is_held_out_and_not_learnt(world: World, tmp_path: Path) -> None:
    # Twenty prompts of three rows each.
    lines = [json.dumps(chat(f"question {n}", f"answer {k}")) for n in range(20) for k in range(3)]
    words = [
        f"model.path={world.path('sft', 'export')}",
        "data=own",
        f"data.path={write(tmp_path, *lines)}",
        "data.held_out.share=0.1",
    ]
    cfg = read_run(["experiment=sft", *words])
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    loader = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    learnt, held_out = prompts_of(loader._stream), prompts_of(held_out_stream(cfg.data))
    assert (len(learnt), len(held_out)) == (18, 2)
    assert learnt | held_out == {f"question {n}" for n in range(20)}
    assert loader.epoch_rows == 54
    # Each once, however many are asked for.
    assert sum(int((batch.position_ids == 0).sum()) for batch in loader.held_out()) == 6
    assert len(held_out_questions(held_out_stream(cfg.data), 400, 64, tokenizer)) == 6
    opd = read_run(["experiment=opd", *words, "teacher.path=teacher"])
    prompts = PromptLoader(opd.data, opd.stage, tokenizer, opd.seed)
    assert len(prompts.held_out(100)) == 6


def test_a_source_of_one_prompt_has_none_to_hold_out(world: World, tmp_path: Path) -> None:
    rows = write(tmp_path, json.dumps(chat("one")), json.dumps(chat("one", "yes")))
    cfg = read_run([*SFT, f"data.path={rows}", "data.held_out.share=0.5"])
    with pytest.raises(InputError, match="no source has two prompts of which one could be held"):
        held_out_stream(cfg.data)


def test_epochs_make_the_steps_of_a_distillation(world: World, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    rows = write(tmp_path, *(json.dumps(chat(f"question {n}")) for n in range(20)))
    for size, epochs, sizes in ((32, 1, [20]), (8, 1, [8, 8, 4]), (8, 1.5, [8, 8, 8, 6])):
        words = [*OPD, f"data.path={rows}", f"stage.global_batch_size={size}"]
        cfg = read_run([*words, f"stage.cascade.own.num_epochs={epochs}"])
        loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
        steps = cfg.stage.phase_steps("own", loader.epoch_rows)
        assert [len(next(loader)) for _ in range(steps)] == sizes
