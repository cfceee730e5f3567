"""Every experiment composes, and the numbers of the paper stand where they should."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from marco_train.config import TrainConfig, to_run
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.model import DType
from marco_train.config.opd import Objective, OPDConfig
from marco_train.config.optim import Schedule
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.rollout import TEMPERATURE
from marco_train.config.sft import LossTokens, SFTConfig
from tests.helpers.configs import compose_config
from tests.helpers.processes import REPOSITORY

EXPERIMENTS = sorted(p.stem for p in (REPOSITORY / "configs" / "experiment").glob("*.yaml"))
WEIGHTS = ["model.path=weights"]  # these experiments name no directory


def composed(name: str) -> TrainConfig:
    return compose_config(name, *(WEIGHTS if name.startswith(("benchmark", "marco")) else []))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_passes_its_checks(name: str) -> None:
    cfg = composed(name)
    assert cfg.name == name
    assert isinstance(cfg.stage, SFTConfig | OPDConfig | EvaluateConfig | BenchmarkConfig)


@pytest.mark.parametrize(
    ("name", "num_experts", "expert_width"), [("nano", 232, 384), ("mini", 256, 768)]
)
def test_the_models_are_the_papers(name: str, num_experts: int, expert_width: int) -> None:
    # Marco-MoE table 1 and config.json
    shape = composed(f"marco_{name}_sft").model.architecture
    assert shape is not None
    assert shape.num_experts == num_experts
    assert shape.moe_intermediate_size == expert_width
    assert shape.num_experts_per_tok == 8
    assert shape.norm_topk_prob is True
    assert shape.num_hidden_layers == 28
    assert shape.hidden_size == 1024
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (16, 8, 128)
    assert shape.rms_norm_eps == 1e-6
    assert shape.rope_theta == 1e6
    assert shape.vocab_size == 151_936
    assert shape.tie_word_embeddings is True
    assert shape.max_position_embeddings == 32_768


@pytest.mark.parametrize(
    ("name", "total", "active"), [("nano", 8.0015e9, 0.6027e9), ("mini", 17.2506e9, 0.8676e9)]
)
def test_the_parameter_counts_follow(name: str, total: float, active: float) -> None:
    shape = composed(f"marco_{name}_sft").model.architecture
    assert shape is not None
    assert shape.num_experts is not None
    assert shape.num_experts_per_tok is not None
    assert shape.moe_intermediate_size is not None
    width = shape.hidden_size
    attention = width * shape.head_dim * 2 * (shape.num_attention_heads + shape.num_key_value_heads)
    norms = 2 * width + 2 * shape.head_dim
    expert = 3 * width * shape.moe_intermediate_size
    dense = shape.num_hidden_layers * (attention + norms + shape.num_experts * width)
    dense += shape.vocab_size * width + width
    experts = shape.num_hidden_layers * expert
    assert dense + experts * shape.num_experts == pytest.approx(total, rel=1e-4)
    assert dense + experts * shape.num_experts_per_tok == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_sft_has_the_papers_numbers(name: str) -> None:
    # Marco-MoE section 4.1
    cfg = composed(f"marco_{name}_sft")
    assert cfg.stage.num_steps == 4000
    assert cfg.stage.global_batch_size == 512
    assert cfg.stage.max_length == 8192
    assert cfg.stage.loss_tokens is LossTokens.assistant
    optim = cfg.optim
    assert (optim.learning_rate, optim.min_learning_rate) == (1e-5, 1e-6)
    assert optim.schedule is Schedule.cosine
    assert optim.warmup_steps == 400
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.95, 0.1)
    assert optim.clip_norm == 1.0
    assert cfg.model.dtype is DType.bfloat16
    general = cfg.data.sources["general"]
    assert general.path == "allenai/Dolci-Instruct-SFT"
    instructions = cfg.data.sources["instruction_following"]
    assert instructions.path == "nvidia/Nemotron-Cascade-2-SFT-Data"


@pytest.mark.parametrize(("name", "steps"), [("nano", (1900, 1000)), ("mini", (1900, 1900))])
def test_opd_has_the_papers_numbers(name: str, steps: tuple[int, int]) -> None:
    # Marco-MoE section 4.2
    cfg = composed(f"marco_{name}_opd")
    stage = cfg.stage
    assert (stage.global_batch_size, stage.responses_per_prompt) == (512, 2)
    assert (stage.max_prompt_length, stage.max_response_length) == (2048, 8192)
    assert stage.objective is Objective.sampled
    assert TEMPERATURE == 1.0
    assert list(stage.cascade) == ["first", "second"]
    assert tuple(phase.num_steps for phase in stage.cascade.values()) == steps
    assert stage.cascade["first"].teacher.path == "Qwen3-30B-A3B-Instruct-2507"
    assert stage.cascade["second"].teacher.path == "Qwen3-Next-80B-A3B-Instruct"
    optim = cfg.optim
    assert (optim.learning_rate, optim.min_learning_rate) == (1e-6, 1e-6)
    assert optim.schedule is Schedule.constant


def test_a_model_data_a_rate_and_a_length_are_a_run() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        given = ["stage=sft", "model.path=weights", "data=marco_sft"]
        run = to_run(
            compose("train", overrides=[*given, "optim.learning_rate=1e-5", "stage.num_steps=3"])
        )
    assert isinstance(run.stage, SFTConfig)
    assert run.model.tokenizer == "weights"
    assert run.optim.rate_at(0, 3) == run.optim.rate_at(2, 3) == 1e-5
    assert run.output_dir == "outputs/run"


def test_an_evaluation_of_one_model_needs_neither_teachers_nor_what_training_needs() -> None:
    given = [
        "stage=evaluate",
        "model.path=weights",
        "+stage.models.mine=weights",
        "data=quickstart_test",
        "stage.num_prompts=8",
        "stage.responses_per_prompt=4",
        "stage.max_prompt_length=64",
        "stage.max_response_length=64",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        run = to_run(compose("train", overrides=given))
    assert run.optim is None
    assert run.stage.teachers == {}
    assert run.stage.num_kl_responses == 4


def test_the_opd_mixture_is_the_papers() -> None:
    shares: dict[str, float] = {}
    cfg = composed("marco_mini_opd")
    for source in cfg.data.sources.values():
        shares[source.category] = shares.get(source.category, 0.0) + source.weight
    expected = {
        "instruction_following": 0.25,
        "knowledge_reasoning": 0.25,
        "alignment": 0.10,
        "math": 0.10,
        "multilingual": 0.30,
    }
    assert shares == pytest.approx(expected)
    assert {s.path for s in cfg.data.sources.values()} >= {
        "nvidia/Nemotron-RL-instruction_following",
        "nvidia/Nemotron-RL-instruction_following-structured_outputs",
        "nvidia/Nemotron-RL-ReasoningGym-v1",
        "nvidia/Nemotron-RL-knowledge-mcqa",
        "nvidia/Nemotron-Cascade-RL-RLHF",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "Skywork/Skywork-OR1-RL-Data",
        "nvidia/Nemotron-SFT-Multilingual-v1",
    }
    quickstart = composed("quickstart_opd").data.sources
    assert {s.category: s.weight for s in quickstart.values()} == pytest.approx(expected)


def test_composing_a_run_imports_no_tensor_library() -> None:
    program = (
        "import sys; sys.argv = ['marco-train', 'experiment=quickstart_opd', '--cfg', 'job']\n"
        "from marco_train.train import main\n"
        "main()\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'vllm', 'datasets', 'wandb'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "objective: full" in done.stdout


def test_the_console_script_works_from_any_directory(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("marco-train")
    done = subprocess.run(
        [script, "experiment=marco_nano_sft", "model.path=weights", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "num_experts: 232" in done.stdout
