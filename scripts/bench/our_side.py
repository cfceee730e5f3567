"""Our side of `opd.py`: runs of experiment=quickstart_opd, their inputs, and what they log.

A run is `run_opd` on one rank. Weights and prompts are random, so that nearly every response has
its full length, or given.
"""

import argparse
import json
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from harness import REPEATS, do_job, in_turn, run_job
from shapes import FIVE_MILLION, MEDIUM, MINI, QUICKSTART, dense

from marco_train import distributed
from marco_train.config import TrainConfig
from marco_train.config.compose import read_run
from marco_train.config.lengths import longest_sequence
from marco_train.data.chat import CHATML, load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.losses.chains import compile_chains
from marco_train.losses.distillation import bucketed_kl
from marco_train.models import save_model
from marco_train.models.weights import random_model
from marco_train.rollout.base import in_order
from marco_train.rollout.sync import canary_sequences
from marco_train.stages.opd import open_opd, run_opd, sync

SHAPES = {
    "quickstart": QUICKSTART,
    "medium": MEDIUM,
    "five_million": FIVE_MILLION,
    "vocabulary": replace(MEDIUM, vocab_size=MINI.vocab_size),
}
GIVEN = "given"
RUN = ["experiment=quickstart_opd", "parallel=one_rank", "checkpoint=none", "resume=never"]
RUN += ["~stage.cascade.second", "optim.warmup_steps=0"]
# Sources of the experiment; all are given the same prompts.
SOURCES = ("instruction_following", "knowledge_reasoning", "alignment", "math", "multilingual")
# Letters of random prompts, a token each; the template adds 19. The quickstart's prompts have 18 to
# 40 tokens, 24 on average.
PROMPT_LETTERS, NUM_PROMPTS = (1, 9), 1024
TOP_K = 64
OBJECTIVES = {
    "sampled": ["stage.objective=sampled"],
    "topk": ["stage.objective=topk", f"stage.top_k={TOP_K}"],
    "full": ["stage.objective=full"],
}
STEP_PARTS = ("sync", "sample", "score", "train")
WARM_UPS = 3  # first steps of a run, which open the teacher and take memory; not timed
Step = dict[str, float]  # what a run logs of one, by the names of its metrics
Rounds = dict[str, list[list[Step]]]  # of each side in each round: its first step, and those timed


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Read the config of a run."""
    return read_run([*RUN, *overrides])


def make_inputs(directory: Path, shape: str, args: argparse.Namespace) -> list[str]:
    """Make models and prompts of a shape, or take those given; the overrides that name them."""
    rng, prompts = Random(0), directory / "prompts.jsonl"
    student, teacher = args.student, args.teacher
    if shape == GIVEN:
        lines = [line for file in args.prompts for line in file.read_text().splitlines()]
    else:
        student, teacher, tokenizer = (directory / name for name in ("student", "teacher", "words"))
        make_tokenizer(tokenizer)
        models = {student: SHAPES[shape], teacher: dense(SHAPES[shape])}
        for seed, (path, arch) in enumerate(models.items()):
            save_model(random_model(arch, torch.float32, seed), path, tokenizer)
        lengths = [rng.randint(*PROMPT_LETTERS) for _ in range(NUM_PROMPTS)]
        texts = ("".join(rng.choices(string.ascii_letters, k=length)) for length in lengths)
        turns = ([{"role": "user", "content": text}] for text in texts)
        lines = [json.dumps({"messages": messages}) for messages in turns]
    prompts.write_text("\n".join(lines))
    named = [
        f"model.path={student}",
        f"model.tokenizer={student}",
        f"stage.cascade.first.teacher.path={teacher}",
    ]
    return named + [f"data.sources.{source}.path={prompts}" for source in SOURCES]


def make_tokenizer(path: Path) -> None:
    """Write a tokenizer of a byte a token, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML.read_text()
    fast.save_pretrained(path)


def read_log(run: Path) -> list[Step]:
    """What a run logged of its steps."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def distil(sides: dict[str, list[str]]) -> dict[str, list[Step]]:
    """Job: make a run of each side in turn, by its overrides, and give what it logged."""
    distributed.start()
    found = {}
    for side, overrides in sides.items():
        with tempfile.TemporaryDirectory() as directory:
            cfg = compose_config([*overrides, f"output_dir={directory}"])
            compile_chains(cfg.compile_losses)
            run_opd(cfg)
            found[side] = read_log(Path(directory))
    return found


@torch.no_grad()
def first_step(overrides: list[str]) -> dict[str, Any]:
    """Job: what a run samples in its first step, and its KL by transformers and plain torch.

    Returns:
        By response `prompts`, texts, and `responses`, token ids; `kl`, the mean of each objective,
        nats a token; `texts`, the prompts of all steps.
    """
    from transformers import AutoModelForCausalLM

    distributed.start()
    kl, num_tokens = dict.fromkeys(OBJECTIVES, 0.0), 0
    with tempfile.TemporaryDirectory() as directory:
        cfg = compose_config([*overrides, f"output_dir={directory}"])
        with open_opd(cfg) as (policy, stream, sampler, *_):
            sync(cfg, policy, sampler, 0)
            rollouts = in_order(stream.rollouts(0, 1))
    paths = (cfg.model.path, cfg.stage.cascade["first"].teacher.path)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    for rollout in rollouts:
        ids, length = torch.tensor([rollout.input_ids]), len(rollout.response_ids)
        logits = (model(ids).logits[0, -length - 1 : -1] for model in models)
        logp, logq = (each.log_softmax(-1) for each in logits)
        likeliest = logp.topk(TOP_K).indices
        values = {
            "sampled": (logp - logq).gather(1, ids[0, -length:, None]),
            "topk": bucketed_kl(logp.gather(1, likeliest), logq.gather(1, likeliest)),
            "full": F.kl_div(logq, logp, reduction="none", log_target=True),
        }
        kl = {name: total + float(values[name].double().sum()) for name, total in kl.items()}
        num_tokens += length
    tokenizer = load_tokenizer(cfg.model)
    loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    steps = range(cfg.stage.cascade["first"].num_steps)
    return {
        "prompts": [tokenizer.decode(rollout.prompt.input_ids) for rollout in rollouts],
        "responses": [rollout.response_ids for rollout in rollouts],
        "kl": {name: total / num_tokens for name, total in kl.items()},
        "texts": [tokenizer.decode(p.input_ids) for _ in steps for p in next(loader)],
    }


def our_runs(inputs: list[str], sides: Mapping[str, list[str]]) -> dict[str, list[Step]]:
    """Make a run of each of our sides, in a fresh process."""
    overrides = {side: inputs + chosen for side, chosen in sides.items()}
    found: dict[str, list[Step]] = run_job(__file__, "distil", {"sides": overrides})
    return found


def in_rounds(
    make_runs: Callable[[], dict[str, list[Step]]], repeats: int, warm_ups: int
) -> Rounds:
    """Make a run of each side in every round, whose first `warm_ups` steps are not timed."""
    rounds = [make_runs() for _ in range(repeats)]
    return {
        side: [[found[side][0], *found[side][warm_ups:]] for found in rounds] for side in rounds[0]
    }


def means(rounds: list[list[Step]], name: str) -> list[float]:
    """Mean of a metric over the timed steps of each round."""
    return [fmean(step[name] for step in steps[1:]) for steps in rounds]


def rates(rounds: list[list[Step]], tokens: str, seconds: str) -> list[float]:
    """Tokens a second over the timed steps of each round, by the metrics that give both."""
    pairs = zip(means(rounds, tokens), means(rounds, seconds), strict=True)
    return [count / spent for count, spent in pairs]


def timed_steps(rounds: list[list[Step]]) -> list[Step]:
    """The timed steps of all rounds."""
    return [step for steps in rounds for step in steps[1:]]


def parts_ms(steps: Sequence[Step]) -> dict[str, float]:
    """Columns of the parts of steps, medians."""
    return {
        f"{part} ms": 1e3 * median(step[f"time/{part}"] for step in steps)
        for part in STEP_PARTS
        if f"time/{part}" in steps[0]
    }


def sync_bound(overrides: list[str]) -> dict[str, float]:
    """Job: bytes of the policy's weights, and seconds of a copy of them and of the canary."""
    distributed.start()
    with tempfile.TemporaryDirectory() as directory:
        cfg = compose_config([*overrides, f"output_dir={directory}"])
        with open_opd(cfg) as (policy, _, sampler, *_):
            sync(cfg, policy, sampler, 0)
            vocab_size = policy.model.architecture.vocab_size
            probes = canary_sequences(vocab_size, longest_sequence(cfg.stage))

            def copy() -> object:
                return [weight.clone() for _, weight in policy.named_weights()]

            def canary() -> object:
                return policy.score(probes), sampler.score(probes)

            calls = {"copy": copy, "canary": canary}
            times = in_turn(calls, REPEATS["cpu"], torch.device("cpu"))
            num_bytes = sum(weight.nbytes for _, weight in policy.named_weights())
    return {name: median(seconds) for name, seconds in times.items()} | {"bytes": num_bytes}


if __name__ == "__main__":
    do_job({"distil": distil, "first_step": first_step, "sync_bound": sync_bound})
