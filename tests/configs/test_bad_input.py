"""What a user can get wrong is refused in a sentence that names it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.config.model import DType
from marco_train.config.opd import Objective
from marco_train.config.rollout import check_replay
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader, SFTLoader, held_out_questions
from marco_train.data.stream import ConversationStream
from marco_train.errors import InputError
from marco_train.evaluation.answers import checked_questions
from marco_train.evaluation.verifiers import check_verifier
from marco_train.inference.engine import require_one_engine
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.rollout import build
from marco_train.stages import evaluate, opd
from marco_train.stages.checks import Checks
from marco_train.stages.evaluate import prepare_evaluate
from marco_train.stages.opd import engine_owners, prepare_opd, run_opd
from marco_train.stages.sft import prepare_sft
from marco_train.teachers.vocab import check_student_vocabulary
from marco_train.train import main
from tests.helpers.checkpoints import leave_checkpoint
from tests.helpers.configs import compose_config
from tests.helpers.models import DENSE, architecture
from tests.helpers.processes import launch
from tests.helpers.tokenizers import make_tokenizer, tokenizer_of
from tests.helpers.world import World

REFUSED = [
    (
        "quickstart_evaluate",
        "rollout@stage.rollout=vllm_server",
        "choose rollout@stage.rollout=native",
    ),
    ("quickstart_opd", "stage.rollout.max_staleness=1", "there is no stage.rollout.max_staleness"),
    ("quickstart_opd", "stage.rollout.sync_path=x", "known are backend, canary_tolerance, replay"),
    ("quickstart_opd", "stage.rollout.batch_size=null", "not Optional"),
    ("quickstart_sft", "optim.learnin_rate=1", "learnin_rate"),
    ("quickstart_sft", "+optim.momentum=0.9", "momentum"),
    ("quickstart_sft", "optim.learning_rate=fast", "fast"),
    ("quickstart_sft", "stage.num_steps=1.5", "1.5"),
    ("quickstart_sft", "stage.num_steps=0", "num_steps is 0"),
    ("quickstart_sft", "stage.num_epochs=2", "num_steps is 300 and stage.num_epochs is 2.0: give"),
    ("quickstart_sft", "stage.num_steps=null", "is None and stage.num_epochs is None: give one of"),
    ("quickstart_sft", "stage.max_length=-4", "max_length is -4"),
    ("quickstart_sft", "optim.warmup_steps=-1", "warmup_steps is -1"),
    ("quickstart_sft", "optim.min_learning_rate=1.0", "min_learning_rate 1.0 is above"),
    ("quickstart_sft", "optim.min_learning_rate=4e-3", "optim.schedule is cosine, and"),
    ("quickstart_opd", "optim.min_learning_rate=1e-4", "0.0001 must equal optim.learning_rate"),
    ("quickstart_opd", "optim=adamw", "optim is adamw, and the stage trains"),
    ("quickstart_evaluate", "+optim.learning_rate=1", "this stage trains nothing"),
    ("benchmark", "stage.suite=gsm9k", "did you mean gsm8k?"),
    ("benchmark", "stage.suite=cards", "did you mean card?"),
    ("benchmark", "stage.suite='gsm8k,fixture'", "fixture is a suite, which cannot be joined"),
    ("quickstart_sft", "on_resume.allow=optim", "a list: write on_resume.allow=[optim]"),
    ("quickstart_sft", "logging.backends=tensorboard", "write logging.backends=[tensorboard]"),
    ("benchmark", "stage.responses_per_prompt=0", "responses_per_prompt is 0"),
    ("benchmark", "stage.rollout.replay_routing=true", "makes no update"),
    ("quickstart_sft", "optim.beta2=1.0", "beta2 is 1.0"),
    ("quickstart_sft", "profile.steps=ten", "profile.steps is 'ten': write the first and the last"),
    ("quickstart_sft", "profile.steps=12-10", "profile.steps is '12-10': write"),
    ("quickstart_sft", "profile.steps=0-3", "profile.steps is '0-3': write"),
    ("quickstart_evaluate", "profile.steps=3", "profile.steps is 3, and this stage makes no"),
    ("quickstart_sft", "seed=-3", "seed is -3"),
    ("quickstart_sft", "parallel.zero_stage=3", "zero_stage is 3"),
    (
        "quickstart_sft",
        "parallel.timeout_seconds=10",
        "timeout_seconds is 10, and must be at least",
    ),
    ("quickstart_sft", "data.sources.math.weight=0.5", "sum to 1.4"),
    ("quickstart_sft", "data.sources.math.weight=0", "weight is 0"),
    ("quickstart_sft", "data.sources.math.weight=-0.1", "weight is -0.1"),
    ("quickstart_sft", "data.sources.math.weight=nan", "weight is nan"),
    ("quickstart_sft", "data.sources.maths.weight=0.5", "data.sources.maths.path has no value"),
    ("quickstart_sft", "data.sources.math.weight=some", "'some', and must be a share above 0, or"),
    ("quickstart_sft", "data.sources.math.weight=true", "weight is True, and must be a share"),
    ("quickstart_sft", "data.sources.math.kind=csv", "csv"),
    ("quickstart_sft", "+data.sources.math.roles={bot: robot}", "maps 'bot' to 'robot', and must"),
    ("quickstart_sft", "data.sources.math.near_duplicates=2", "near_duplicates is 2.0, and must"),
    ("quickstart_sft", "data.max_bad_rows=2", "max_bad_rows is 2.0, and must be a share"),
    ("quickstart_sft", "data.max_lost_rows=-0.1", "max_lost_rows is -0.1, and must be a share"),
    ("quickstart_sft", "data.judge_rows=0", "judge_rows is 0"),
    ("quickstart_sft", "data.thinking=some", "some"),
    ("quickstart_sft", "data.on_change=ignore", "ignore"),
    ("quickstart_sft", "data.max_tokens_per_microbatch=50", "max_tokens_per_microbatch is 50"),
    ("quickstart_sft", "stage.loss_tokens=user", "user"),
    ("quickstart_sft", "model=large_one", "large_one"),
    ("quickstart_base", "parallel.expert_parallel_size=2", "is dense"),
    ("marco_nano_sft", "parallel.expert_parallel_size=16", "16 does not divide the 232 experts"),
    ("marco_nano_sft", "model.architecture.num_experts_per_tok=300", "300, more than the 232"),
    ("quickstart_sft", "parallel.dispatch=broadcast", "broadcast"),
    ("quickstart_sft", "parallel.recompute=everything", "everything"),
    ("quickstart_sft", "parallel.offload_while_sampling=true", "nothing is sampled for an update"),
    ("quickstart_evaluate", "parallel.offload_while_sampling=true", "nothing is sampled for"),
    ("quickstart_sft", "optim.balance_coefficient=-0.1", "balance_coefficient is -0.1"),
    ("quickstart_sft", "optim.router_z_coefficient=inf", "router_z_coefficient is inf"),
    (
        "marco_nano_sft",
        "model.architecture.moe_intermediate_size=100",
        "100 is not a multiple of 8",
    ),
    ("quickstart_opd", "stage.objective=forward", "forward"),
    ("quickstart_opd", "stage.objective=topk", "stage.top_k is None and stage.objective is topk"),
    ("quickstart_opd", "stage.top_k=8", "stage.top_k is 8 and stage.objective is full"),
    ("quickstart_opd", "stage.max_advantage=0", "max_advantage is 0"),
    ("quickstart_opd", "stage.rollout.temperature=0.7", "no stage.rollout.temperature"),
    ("quickstart_opd", "teacher@stage.cascade.first.teacher=oracle", "oracle"),
    ("quickstart_opd", "stage.cascade.first.teacher.backend=api", "api"),
    ("quickstart_opd", "stage.cascade.first.teacher.backend=vllm", "choose teacher@stage.cascade"),
    ("quickstart_opd", "stage.rollout.backend=vllm", "choose rollout@stage.rollout=vllm"),
    ("quickstart_opd", "stage.rollout.replay_routing=perhaps", "perhaps"),
    ("marco_mini_opd", "stage.rollout.kv_cache_gib=all", "is 'all', and must be a number or auto"),
    ("marco_mini_opd", "stage.rollout.kv_cache_gib=0", "kv_cache_gib is 0, and must be greater"),
    ("quickstart_opd", "stage.rollout.expert_parallel=true", "no stage.rollout.expert_parallel"),
    ("marco_mini_opd", "stage.rollout.reserve_gib=-1", "reserve_gib is -1.0, and must be greater"),
    ("quickstart_evaluate", "stage.rollout.replay_routing=true", "an evaluation makes no update"),
    ("quickstart_evaluate", "rollout@stage.rollout=vllm_server", "a server is of one shape"),
    ("quickstart_evaluate", "stage.num_kl_responses=9", "num_kl_responses is 9"),
    ("quickstart_evaluate", "stage.temperature=0.5", "temperature is 0.5"),
    ("quickstart_evaluate", "+stage.models.first=outputs/other", "both name first"),
    ("quickstart_evaluate", "+stage.models={up/first: other}", "names 'up/first', and its answers"),
    ("quickstart_evaluate", "+stage.models.up/first=other", "'+stage.models.up/first=other' is no"),
    ("quickstart_base", "stage.max_length=300", "sequences of 300 tokens, and the model has 256"),
    ("quickstart_opd", "experiment=quickstart_dpo", "quickstart_dpo"),
]


@pytest.mark.parametrize(("experiment", "override", "names"), REFUSED)
def test_a_wrong_override_is_refused_by_name(experiment: str, override: str, names: str) -> None:
    given = ["model.path=weights"] if experiment.startswith(("benchmark", "marco")) else []
    with pytest.raises(InputError) as refusal:
        compose_config(experiment, *given, override)
    said = str(refusal.value)
    assert names in said
    assert "\n" not in said and "use +" not in said


def test_an_evaluation_shares_no_engine_over_ranks() -> None:
    given = ["rollout@stage.rollout=vllm", "stage.rollout.expert_parallel=true"]
    with pytest.raises(InputError, match="in an evaluation each rank samples alone"):
        compose_config("quickstart_evaluate", *given)


def test_routing_of_a_dense_student_is_not_replayed(world: World) -> None:
    dense = r"replay_routing is true, but the student is dense and has no experts: set it to false"
    asked = [f"root={world.root}", "stage.rollout.replay_routing=true"]
    with pytest.raises(InputError, match=dense):
        compose_config(
            "quickstart_opd",
            *asked,
            "model=quickstart_small",
            "model.path=null",
            "parallel.expert_parallel_size=1",
        )
    # Its shape is known to its files alone; refused before any data are read.
    cfg = compose_config(
        "quickstart_opd",
        *asked,
        f"model.path={world.path('teacher_first', 'export')}",
        f"data.sources.math.path={world.path('none.jsonl')}",
    )
    assert cfg.model.architecture is None
    with pytest.raises(InputError, match=dense):
        run_opd(cfg)
    check_replay(cfg.stage.rollout, architecture())


def test_engines_share_the_experts_of_an_moe_model_that_the_ranks_divide_on_gpus(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    asked = [
        f"root={world.root}",
        "rollout@stage.rollout=vllm",
        "stage.rollout.expert_parallel=true",
    ]
    dense = ["model=quickstart_small", "model.path=null", "parallel.expert_parallel_size=1"]
    with pytest.raises(InputError, match="expert_parallel is true, but the student is dense"):
        compose_config("quickstart_opd", *asked, *dense)
    stage = compose_config("quickstart_opd", *asked).stage
    monkeypatch.setattr(build, "require_vllm", lambda: None)
    refused = [
        (architecture(**DENSE), 1, "expert_parallel is true, but the student is dense"),
        (architecture(), 3, "8 experts over all 3 ranks of this launch, which do not divide them"),
        (architecture(), 4, "expert_parallel is true, and there is no GPU: vLLM on a CPU has"),
    ]
    for shape, num_ranks, words in refused:
        monkeypatch.setattr(build, "world_size", lambda n=num_ranks: n)
        with pytest.raises(InputError, match=words):
            build.check_sampler(stage, shape, DType.float32)
    monkeypatch.setattr(build, "device", lambda: torch.device("cuda", 3))
    build.check_sampler(stage, architecture(), DType.float32)


def test_the_command_line_fails_in_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    done = launch("experiment=quickstart_sft", f"root={tmp_path}", "optim.clip_norm=0")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: optim.clip_norm is 0.0, and must be greater than 0"


def test_a_resumption_that_changes_what_is_learnt_says_how_to_allow_it(
    world: World, tmp_path: Path
) -> None:
    given = ["experiment=quickstart_sft", f"root={world.root}", f"output_dir={tmp_path}"]
    leave_checkpoint(compose_config("quickstart_sft", *given[1:]), 3)
    # Before anything is opened: the file would be missed.
    absent = f"data.sources.math.path={tmp_path}/absent"
    done = launch(*given, absent, "seed=1", "on_resume.allow=[optim]")
    assert done.returncode != 0
    assert "seed: 0 -> 1; on_resume.allow=[data,optim] goes on with the new values" in done.stderr
    assert "Traceback" not in done.stderr
    wrong = launch(*given, "on_resume.allow=[date]")
    assert "Traceback" not in wrong.stderr and "model, data, objective" in wrong.stderr


def test_a_missing_path_is_named_before_a_model_is_built(tmp_path: Path) -> None:
    done = launch(
        "experiment=quickstart_sft", f"root={tmp_path}", "parallel.expert_parallel_size=1"
    )
    assert done.returncode == 1
    assert "error: model.tokenizer: no tokenizer.json in" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_dataset_is_named(world: World) -> None:
    cfg = compose_config(
        "quickstart_sft", f"root={world.root}", "data.sources.math.path=nowhere.jsonl"
    )
    tokenizer = load_tokenizer(cfg.model)
    with pytest.raises(InputError, match=r"source 'math': there is no file 'nowhere"):
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)


def test_a_line_that_is_not_json_is_named(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": []\n')
    cfg = compose_config("quickstart_sft", f"root={world.root}", f"data.sources.math.path={broken}")
    tokenizer = load_tokenizer(cfg.model)
    with pytest.raises(InputError, match=r"broken.jsonl, line 1: not JSON"):
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)


ENGINES = [
    (["rollout@stage.rollout=vllm"], ["stage.rollout"]),
    (
        ["rollout@stage.rollout=vllm", "teacher@stage.cascade.second.teacher=vllm"],
        ["stage.rollout", "teacher 'second'"],
    ),
    (
        [f"teacher@stage.cascade.{phase}.teacher=vllm" for phase in ("first", "second")],
        ["teacher 'first'", "teacher 'second'"],
    ),
    (["teacher@stage.cascade.second.teacher=vllm_server"], []),
]


@pytest.mark.parametrize(("kinds", "owners"), ENGINES)
def test_a_process_has_one_engine_of_vllm_on_a_gpu_and_any_number_on_a_cpu(
    kinds: list[str], owners: list[str]
) -> None:
    given = [f"stage.cascade.{phase}.teacher.path=somewhere" for phase in ("first", "second")]
    servers = "stage.cascade.second.teacher.servers.urls=[http://a:1]"
    given += [servers] if not owners else []
    found = engine_owners(compose_config("quickstart_opd", *kinds, *given).stage)
    assert found == owners
    require_one_engine(found, torch.device("cpu"))
    if len(owners) < 2:
        require_one_engine(found, torch.device("cuda", 3))
        return
    with pytest.raises(InputError, match=f"^{', '.join(owners)} want 2 engines of vLLM in each"):
        require_one_engine(found, torch.device("cuda", 3))


def test_a_second_engine_on_a_gpu_is_refused_before_anything_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = [f"teacher@stage.cascade.{phase}.teacher=vllm" for phase in ("first", "second")]
    paths = [f"stage.cascade.{phase}.teacher.path=nobody" for phase in ("first", "second")]
    cfg = compose_config("quickstart_opd", f"root={world.root}", *vllm, *paths)
    monkeypatch.setattr(opd, "device", lambda: torch.device("cuda", 0))
    with pytest.raises(InputError, match="'first', teacher 'second' want 2 engines of vLLM"):
        prepare_opd(cfg, Checks())
    monkeypatch.setattr(opd, "device", lambda: torch.device("cpu"))
    with pytest.raises(InputError, match=r"teacher 'first': there is no model at"):
        prepare_opd(cfg, Checks())


@pytest.mark.parametrize(
    ("wanting", "owners"),
    [
        (
            ["teacher@stage.teachers.first", "teacher@stage.teachers.second"],
            "teachers.first, stage.",
        ),
        (["rollout@stage.rollout", "teacher@stage.teachers.second"], "rollout, stage."),
    ],
)
def test_an_evaluation_has_one_engine_on_a_gpu_too(
    wanting: list[str], owners: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = [f"{each}=vllm" for each in wanting]
    cfg = compose_config("quickstart_evaluate", "root=nowhere", *vllm)
    monkeypatch.setattr(evaluate, "device", lambda: torch.device("cuda", 0))
    with pytest.raises(InputError, match=rf"^stage\.{re.escape(owners)}teachers\.second want"):
        prepare_evaluate(cfg, Checks())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["stage.rollout.replay_routing=true"], "an evaluation makes no update"),
        (["stage.rollout.kv_cache_gib=5e-5"], "one sequence of 97 tokens needs 0.0001"),
        ([], "vLLM is not installed"),
    ],
)
def test_an_evaluation_with_vllm_is_refused_before_a_model_is_loaded(
    given: list[str], said: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "vllm" else find(n))
    vllm = ["rollout@stage.rollout=vllm", "~stage.models.opd_first", "~stage.models.opd_second"]
    with pytest.raises(InputError, match=said):
        prepare_evaluate(
            compose_config("quickstart_evaluate", f"root={world.root}", *vllm, *given), Checks()
        )


def test_a_teacher_that_is_missing_is_named(world: World) -> None:
    cfg = compose_config(
        "quickstart_opd", f"root={world.root}", "stage.cascade.second.teacher.path=nobody"
    )
    with pytest.raises(InputError, match=r"teacher 'second': there is no model at"):
        prepare_opd(cfg, Checks())


def foreign_teacher(world: World, path: Path, corpus: list[str]) -> None:
    make_tokenizer(path / "tokenizer", corpus)
    model = random_model(architecture(**DENSE), torch.float32, seed=0)
    save_model(model, path / "model", path / "tokenizer")


def test_a_teacher_with_another_vocabulary_is_refused_with_the_difference(
    world: World, tmp_path: Path
) -> None:
    foreign_teacher(world, tmp_path, ["quite other words about nothing at all"] * 3)
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"stage.cascade.first.teacher.path={tmp_path / 'model'}",
    )
    with pytest.raises(InputError, match=r"tokenizer of teacher 'first' .* differences"):
        prepare_opd(cfg, Checks())


def test_two_ids_swapped_in_a_teachers_vocabulary_are_enough_to_refuse_it(
    world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("teacher_first", "export"), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"stage.cascade.first.teacher.path={tmp_path / 'model'}",
    )
    with pytest.raises(InputError, match=r"2 differences .*model\.vocab\.a: \d+ -> \d+"):
        prepare_opd(cfg, Checks())


def test_a_teacher_with_fewer_output_rows_is_refused(world: World, tmp_path: Path) -> None:
    student = random_model(architecture(vocab_size=328), torch.float32, seed=0)
    save_model(student, tmp_path / "student", world.path("data", "tokenizer"))
    given = f"root={world.root}", f"model.path={tmp_path / 'student'}"
    cfg = compose_config("quickstart_opd", *given)
    with pytest.raises(InputError, match="has 320 output rows and the student 328"):
        prepare_opd(cfg, Checks())


def test_columns_and_roles_are_given_as_refusals_say() -> None:
    given = ["data.sources.math.columns={messages: chosen}", "data.sources.math.roles={bot: user}"]
    math = compose_config("quickstart_sft", *given).data.sources["math"]
    assert (math.columns, math.roles) == ({"messages": "chosen"}, {"bot": "user"})


def test_a_template_that_neither_marks_answers_nor_asks_as_it_answers_is_refused(
    world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{- m.role + ': ' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{- 'Now answer: ' }}{% endif %}"
    )
    cfg = compose_config(
        "quickstart_sft", f"root={world.root}", f"model.tokenizer={tmp_path / 'tokenizer'}"
    )
    tokenizer = load_tokenizer(cfg.model)  # enough to make prompts
    with pytest.raises(InputError, match=r"asked otherwise .*; set model.chat_template=chatml"):
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)


def test_a_source_that_cannot_be_opened_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1, and no more of a parquet file")
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    # Read from the environment at import; without it the hub would be asked again and again.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    absent = tmp_path / "absent.jsonl"
    for kind, path, says in (
        ("parquet", str(broken), f"source 'math': {broken} cannot be read: "),
        ("hub", "nobody/nothing-at-all", "source 'math': 'nobody/nothing-at-all' cannot be opened"),
        (
            "auto",
            "nothing-at-all",
            "source 'math': 'nothing-at-all' is no file here, and as a set of the hub cannot be "
            "opened: ",
        ),
        ("jsonl", str(absent), f"source 'math': there is no file '{absent}'"),
    ):
        cfg = compose_config(
            "quickstart_sft",
            f"root={world.root}",
            f"data.sources.math.kind={kind}",
            f"data.sources.math.path={path}",
        )
        with pytest.raises(InputError, match=re.escape(says)):
            SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)


def test_weights_of_another_tokenizer_are_refused_as_a_student(
    world: World, tmp_path: Path
) -> None:
    foreign_teacher(world, tmp_path, ["quite other words about nothing at all"] * 3)
    cfg = compose_config("quickstart_opd", f"root={world.root}", f"model.path={tmp_path / 'model'}")
    with pytest.raises(InputError, match=r"tokenizer of model\.path"):
        check_student_vocabulary(cfg.model)


def test_a_missing_value_is_asked_for_in_one_sentence() -> None:
    done = launch("experiment=marco_mini_sft")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: model.path has no value")
    nothing = launch()
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("error: ")
    assert "experiment=<name>" in nothing.stderr
    assert "Traceback" not in done.stderr + nothing.stderr


@pytest.mark.parametrize(("stage", "num_steps"), [("sft", 300), ("opd", 7)])
def test_steps_to_profile_that_the_run_does_not_make_are_refused(
    stage: str, num_steps: int, world: World
) -> None:
    lengths = ["stage.cascade.first.num_steps=4", "stage.cascade.second.num_steps=3"]
    given = [f"root={world.root}", *(lengths if stage == "opd" else [])]
    prepare = {"sft": prepare_sft, "opd": prepare_opd}[stage]
    last = f"profile.steps={num_steps}"
    prepare(compose_config(f"quickstart_{stage}", *given, last), Checks())
    beyond = f"profile.steps={num_steps}-{num_steps + 1}"
    with pytest.raises(InputError, match=f"and the run makes {num_steps} steps: name some"):
        prepare(compose_config(f"quickstart_{stage}", *given, beyond), Checks())


def test_a_held_out_row_that_cannot_be_checked_is_refused(world: World, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    file = tmp_path / "rows.jsonl"
    source = SourceConfig(
        kind=SourceKind.jsonl, path=str(file), category="math", weight=1.0, subset=None
    )

    def opened() -> ConversationStream:
        return ConversationStream({"rows": source}, None, seed=0)

    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(InputError, match=r"none of 3 .* the row is no question with its answer"):
        held_out_questions(opened(), 3, 64, tokenizer)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(
        InputError,
        match=r"none of 3 .* \(1 data/dropped_too_long in 'rows' over "
        r"stage.max_prompt_length=2, drawn 3 times\)",
    ):
        held_out_questions(opened(), 3, 2, tokenizer)
    (question, *_) = held_out_questions(opened(), 3, 64, tokenizer)
    with pytest.raises(InputError, match="column `verifier` names None; known are exact"):
        check_verifier(question.verifier)


def rows_of(world: World, tmp_path: Path, *contents: tuple[str, str | None]) -> list[str]:
    """One source with these prompts and answers."""
    file = tmp_path / "rows.jsonl"
    rows = []
    for prompt, answer in contents:
        messages = [{"role": "user", "content": prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"root={world.root}",
        "data=quickstart_text",
        f"data.sources.text.path={file}",
    ]


def test_rows_at_fault_are_dropped_and_counted(world: World, tmp_path: Path) -> None:
    overrides = rows_of(
        world,
        tmp_path,
        ("a fine prompt", "yes"),
        ("no answer here", None),
        ("too long " * 60, "no"),
        ("ends <|im_end|> early", "no"),
    )
    any_share = ["stage.global_batch_size=4", "data.max_lost_rows=1"]
    cfg = compose_config("quickstart_sft", *overrides, *any_share)
    tokenizer = load_tokenizer(cfg.model)
    loader = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    (batch,) = next(loader)
    assert batch.num_loss_tokens > 0
    found = loader.metrics()
    assert found["data/num_sequences"] == 1
    assert found["data/dropped_no_loss"] == 1
    assert found["data/dropped_too_long"] == 1
    assert found["data/dropped_special"] == 1


def test_a_prompt_over_the_limit_is_dropped_and_counted(world: World, tmp_path: Path) -> None:
    overrides = rows_of(world, tmp_path, ("short", "x"), ("far too long " * 60, "x"))
    cfg = compose_config("quickstart_opd", *overrides, "stage.global_batch_size=2")
    tokenizer = load_tokenizer(cfg.model)
    loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    (prompt,) = next(loader)
    assert "short" in tokenizer.decode(prompt.input_ids)
    assert loader.metrics()["data/dropped_too_long"] == 1
    assert cfg.stage.objective is Objective.full


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        ({"name": "json_schema"}, "has the schema None"),
        ({"name": "json_schema", "schema": "{}"}, "has the schema {}"),
        ({"name": "reasoning_gym", "dataset": "nope", "entry": {}}, "reasoning_gym: "),
        ({"name": "reasoning_gym", "dataset": "gcd"}, "has no entry"),
        ({}, "names None; known are exact"),
    ],
)
def test_a_verifier_that_would_fail_is_refused_before_anything_is_sampled(
    verifier: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_verifier(verifier)
    assert said in str(refused.value)


def test_questions_that_cannot_be_checked_are_left_out_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [{"messages": turns, "verifier": {"name": "exact"}}, {"messages": turns}]
    file = tmp_path / "rows.jsonl"
    cfg = compose_config("quickstart_evaluate", f"root={world.root}", "stage.num_prompts=8")
    assert cfg.data.held_out is not None
    for source in cfg.data.held_out.sources.values():
        source.path = str(file)
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = checked_questions(cfg, tokenizer)
    assert 0 < len(kept) < 8
    assert all(question.verifier == {"name": "exact"} for question in kept)
    assert "left out questions that cannot be checked" in capsys.readouterr().out
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(InputError, match=r"no held-out question can be checked \(.*names None"):
        checked_questions(cfg, tokenizer)


def test_the_report_of_a_torchrun_ends_with_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit) as ended:
        main(["experiment=quickstart_sft", "optim.learnin_rate=1"])
    assert str(ended.value).startswith("error: there is no optim.learnin_rate")
    report = str(ChildFailedError("run", {0: ProcessFailure(0, 1, 1, str(file))}))
    assert report.rstrip("=\n").endswith(f"traceback : {ended.value}")
