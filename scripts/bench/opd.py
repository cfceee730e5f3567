"""Steps of on-policy distillation: objectives, the teacher's share, and TRL's trainer beside ours.

    python scripts/bench/opd.py --json opd.json --shapes quickstart,medium
    python scripts/bench/opd.py --json share.json --only teacher_share --run outputs/quickstart/opd
    python scripts/bench/opd.py --json trl.json --only trl --trl-python venv-trl/bin/python

All on a CPU, in float32, with the numbers of experiment=quickstart_opd on one rank. Weights and
prompts are random and every response has its full length; those of --student end where it ends
them. Sides are first compared by numbers and then timed in turn, round by round; a side whose
numbers differ is reported as wrong and not timed. Ratios are within a round, as median and range.
The environment of --trl-python needs torch and trl alone.

Legend: T tokens with loss, V vocabulary.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from model import (
    MEDIUM,
    MIB,
    MINI,
    OURS,
    QUICKSTART,
    Bench,
    architecture,
    compared,
    peak_bytes,
    release,
    report,
    span,
    write,
)
from torch import Tensor

from marco_train import distributed
from marco_train.config import TrainConfig, to_run
from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import Objective, OPDConfig
from marco_train.config.resumption import plain_config
from marco_train.data.packing import pack_rollouts
from marco_train.inference.engine import with_tied_head
from marco_train.losses.distillation import bucketed_kl, build_reverse_kl
from marco_train.metrics import Metrics
from marco_train.models import save_model
from marco_train.models.hf_io import stop_token_ids
from marco_train.models.weights import accounted, meta_model, random_model, weight_shapes
from marco_train.rollout.base import in_order, summarize
from marco_train.rollout.build import build_sampler
from marco_train.rollout.sync import canaries, sync_weights
from marco_train.teachers.base import ScoreSpec, scores_from_hidden
from marco_train.teachers.build import build_teacher
from marco_train.train import CONFIG_DIR
from marco_train.types import FinishReason, FullMicrobatch, PolicyOutput, Prompt, Rollout
from marco_train.types import ScoredRollout as Scored

SHAPES = {
    "quickstart": QUICKSTART,
    "medium": MEDIUM,
    "five_million": architecture(1536, 3, 4, 32, width=128, experts=32, top_k=4, expert_width=128),
    "vocabulary": replace(MEDIUM, vocab_size=MINI.vocab_size),
}
GIVEN = "given"
# Of random prompts; the quickstart's have 18 to 40 tokens, 24 on average.
PROMPT_LENGTHS = (18, 31)
TOP_K = 64
OBJECTIVES = {
    objective: [f"stage.objective={objective.value}"]
    + [f"stage.top_k={TOP_K}"] * (objective is Objective.topk)
    for objective in (Objective.sampled, Objective.topk, Objective.full)
}
# The first is so small that float32 weights stay as they are, and with them what is sampled.
STILL, MOVING = ([f"optim.learning_rate={rate}"] for rate in (1e-30, 1e-6))
MEMORY_WIDTHS = (64, 96)  # of policy and teacher
SAMPLERS = {
    "native": [],
    "vllm": ["stage.rollout.kv_cache_gib=0.25", "stage.rollout.max_tokens_per_batch=4096"],
}
SYNC_PARTS = ("sync", "copy", "canary")
STEP_PARTS = ("sync", "sample", "score", "train")
TOLERANCE = 1e-4
THEIR_SCRIPT = Path(__file__).with_name("trl_side.py")
THEIR_SIDES: dict[str, dict[str, Any]] = {
    "TRL": {"experts": "grouped_mm", "microbatches": 1, "recompute": False},
    "TRL's defaults in float32": {"experts": None, "microbatches": 8, "recompute": True},
}
WARM_UPS = 3
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def compose_config(directory: Path, *overrides: str) -> TrainConfig:
    """Read experiment=quickstart_opd for the models of a directory and one rank."""
    given = ["experiment=quickstart_opd", "parallel=one_rank", "optim.warmup_steps=0"]
    given += [f"model.path={directory}/student", f"model.tokenizer={directory}/tokenizer"]
    given += [f"stage.cascade.{n}.teacher.path={directory}/teacher" for n in ("first", "second")]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_run(compose("train", overrides=[*given, *overrides]))


def make_inputs(directory: Path, shape: str, args: argparse.Namespace, num_steps: int) -> None:
    """Put student, teacher, tokenizer and prompts of all steps under a directory."""
    opd, rng = compose_config(directory).stage, Random(0)
    if shape == GIVEN:
        paths = {"student": args.student, "teacher": args.teacher, "tokenizer": args.student}
        for name, path in paths.items():
            (directory / name).symlink_to(path.resolve())
        lines = [line for file in args.prompts for line in file.read_text().splitlines()]
        rng.shuffle(lines)
        texts = rendered(directory / "tokenizer", lines, opd.max_prompt_length)
    else:
        arch = SHAPES[shape]
        for seed, (name, shaped) in enumerate({"student": arch, "teacher": dense(arch)}.items()):
            save_model(random_model(shaped, torch.float32, seed), directory / name)
        make_tokenizer(directory / "tokenizer", arch.vocab_size)
        lengths = [rng.randint(*PROMPT_LENGTHS) for _ in range(num_steps * opd.global_batch_size)]
        drawn = ([rng.randrange(1, arch.vocab_size) for _ in range(length)] for length in lengths)
        texts = [" ".join(f"t{token}" for token in tokens) for tokens in drawn]
    needed = num_steps * opd.global_batch_size
    assert len(texts) >= needed, f"{needed} prompts are needed, and there are {len(texts)}"
    (directory / "prompts.json").write_text(json.dumps(texts[:needed]))


def dense(arch: ArchitectureConfig) -> ArchitectureConfig:
    """The same shape with one MLP in place of the experts."""
    return replace(arch, num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None)


def rendered(tokenizer_dir: Path, lines: list[str], max_length: int) -> list[str]:
    """Render the prompts of conversations; long ones are left out."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    texts = []
    for line in lines:
        turns = json.loads(line)["messages"][:-1]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if len(tokenizer(text)["input_ids"]) <= max_length:
            texts.append(text)
    return texts


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer of a word a token, whose stop no model of this vocabulary can sample."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(vocab_size)}
    words_alone = Tokenizer(models.WordLevel(words, unk_token="t0"))
    words_alone.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_alone, pad_token="t0", eos_token="<stop>"
    )
    assert tokenizer.eos_token_id == vocab_size
    tokenizer.save_pretrained(path)


class Distillation:
    """The loop of `run_opd` over given prompts, without tracker and checkpoints."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        # Each takes seconds to import.
        from transformers import PreTrainedTokenizerFast

        from marco_train.engine.policy import build_policy

        distributed.start()
        self.cfg = cfg = compose_config(directory, *overrides)
        self.opd = opd = cfg.stage
        student, tokenizer_dir = read_architecture(directory / "student"), directory / "tokenizer"
        self.vocab_size = student.vocab_size
        self.probes = canaries(student.vocab_size, longest_sequence(opd))
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        self.texts: list[str] = json.loads((directory / "prompts.json").read_text())
        wanted = wanted_of(opd, student.vocab_size, self.tokenizer.eos_token_id)
        self.teacher = build_teacher(opd.cascade["first"].teacher, wanted)
        self.policy = build_policy(cfg.model, cfg.optim, cfg.parallel, 1, cfg.seed, "")
        stops = self.tokenizer.eos_token_id < student.vocab_size
        stop_ids = stop_token_ids(tokenizer_dir) if stops else []
        self.sampler = build_sampler(opd, student, cfg.model.dtype, stop_ids, cfg.seed)
        self.rollouts: list[Rollout] = []
        self.tokens: list[int] = []
        self.seconds: dict[str, list[float]] = {part: [] for part in ("step", *STEP_PARTS)}

    def step(self) -> Metrics:
        """Make one step and note the seconds of its parts."""
        opd, number, marks = self.opd, len(self.tokens), [time.perf_counter()]
        tolerance = opd.rollout.canary_tolerance
        sync_weights(self.policy, self.sampler, number, self.probes, tolerance)
        marks.append(time.perf_counter())
        first = number * opd.global_batch_size
        prompts = self.tokenised(self.texts[first : first + opd.global_batch_size])
        self.rollouts = in_order(self.sampler.sample(prompts, opd.responses_per_prompt))
        marks.append(time.perf_counter())
        scored = self.teacher.score(self.rollouts)
        marks.append(time.perf_counter())
        metrics = self.train(scored) | summarize(self.rollouts)
        marks.append(time.perf_counter())
        for part, start, end in zip(STEP_PARTS, marks[:-1], marks[1:], strict=True):
            self.seconds[part].append(end - start)
        self.seconds["step"].append(marks[-1] - marks[0])
        self.tokens.append(sum(len(rollout.input_ids) for rollout in self.rollouts))
        return metrics

    def tokenised(self, texts: list[str]) -> list[Prompt]:
        """Make prompts of texts, of no particular category."""
        found = self.tokenizer(texts)["input_ids"]
        first = len(self.tokens) * len(texts)
        return [Prompt(first + i, ids, "bench", "none", "none") for i, ids in enumerate(found)]

    def train(self, scored: Sequence[Scored]) -> Metrics:
        """Make an update."""
        packed = pack_rollouts(scored, self.opd.objective, self.cfg.data.max_tokens_per_microbatch)
        return self.policy.train_step(packed, build_reverse_kl(self.opd, self.teacher.head))


def wanted_of(cfg: OPDConfig, vocab_size: int, stop_id: int) -> ScoreSpec:
    """What an objective needs of its teacher."""
    length = longest_sequence(cfg)
    return ScoreSpec(cfg.objective, cfg.top_k or 0, cfg.top_k_source, vocab_size, length, stop_id)


def rollout_of(prompt: Prompt, response: list[int], topk_ids: list[list[int]]) -> Rollout:
    """A response that no sampler made."""
    return Rollout(prompt, 0, response, [0.0] * len(response), topk_ids, FinishReason.length, 0)


def bench_objectives(bench: Bench, args: argparse.Namespace) -> None:
    """Time whole steps of each objective, and weigh its loss."""
    for shape in bench.shapes:
        with tempfile.TemporaryDirectory() as directory:
            make_inputs(Path(directory), shape, args, bench.repeats + 2)
            objectives_case(bench, shape, Path(directory))
        release(bench.device)
    bench.note("objectives", f"goal: full at most 1.15 x sampled; topk tells {TOP_K} tokens apart;")
    bench.note("objectives", "`error` is of kl/reverse against whole logits in plain torch")
    memory_case(bench, args.tokens)


def objectives_case(bench: Bench, shape: str, directory: Path) -> None:
    """Check and time all objectives of one shape on the same rollouts."""
    loops = {name: Distillation(directory, *given, *STILL) for name, given in OBJECTIVES.items()}
    found = {name: loop.step()["kl/reverse"] for name, loop in loops.items()}
    responses = {name: [r.response_ids for r in loop.rollouts] for name, loop in loops.items()}
    wanted = whole_logits(loops[Objective.full])
    errors = {name: abs(found[name] / wanted[name] - 1) for name in loops}
    right = {
        name: loop
        for name, loop in loops.items()
        if errors[name] <= TOLERANCE and responses[name] == responses[Objective.full]
    }
    times = bench.in_turn({name.value: loop.step for name, loop in right.items()})
    for name, loop in loops.items():
        cells: dict[str, Any] = {"shape": shape, "V": loop.vocab_size, "objective": name.value}
        cells |= {"T": sum(map(len, responses[name])), "kl": found[name], "error": errors[name]}
        if name not in right:
            bench.add("objectives", cells | {"note": "wrong, not timed"})
            continue
        cells |= compared(times, name.value, base=Objective.sampled.value)
        parts = {part: seconds[-bench.repeats :] for part, seconds in loop.seconds.items()}
        cells |= {f"{part} ms": 1e3 * median(parts[part]) for part in STEP_PARTS}
        bench.add("objectives", cells, {"times": times[name.value], "parts": parts})


@torch.no_grad()
def whole_logits(loop: Distillation) -> dict[Objective, float]:
    """Mean kl/reverse of each objective on the last rollouts of a loop of `full`."""
    sums, num_tokens = dict.fromkeys(OBJECTIVES, 0.0), 0
    scored = loop.teacher.score(loop.rollouts)
    for batch in pack_rollouts(scored, Objective.full, loop.cfg.data.max_tokens_per_microbatch):
        assert isinstance(batch, FullMicrobatch)
        output, targets = loop.policy.forward(batch), batch.targets[batch.loss_mask, None]
        logp = F.linear(output.hidden[batch.loss_mask], output.head).log_softmax(-1)
        assert loop.teacher.head is not None
        logq = F.linear(batch.teacher_hidden, loop.teacher.head).log_softmax(-1)
        ids = logp.topk(TOP_K).indices
        values = {
            Objective.sampled: (logp - logq).gather(1, targets),
            Objective.topk: bucketed_kl(logp.gather(1, ids), logq.gather(1, ids)),
            Objective.full: F.kl_div(logq, logp, reduction="none", log_target=True),
        }
        sums = {name: total + float(values[name].double().sum()) for name, total in sums.items()}
        num_tokens += len(targets)
    return {name: total / num_tokens for name, total in sums.items()}


def memory_case(bench: Bench, most: int) -> None:
    """Weigh forward and backward of each objective's loss over doubling numbers of tokens."""
    sizes = [most >> shift for shift in (3, 2, 1, 0)]
    # Every larger block comes from the system and goes back to it, so that the peak is of what is
    # held and not of how the heap was cut up before.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = run_job([sys.executable, __file__, "--job"], exact, job="memory", sizes=sizes)
    for name in OBJECTIVES:
        for tokens in sizes:
            cells: dict[str, Any] = {"objective": name.value, "T": tokens, "V": MINI.vocab_size}
            cells |= {"extra MiB": found[name.value][str(tokens)] / MIB}
            cells |= {"[T, V] MiB": 4 * tokens * MINI.vocab_size / MIB}
            bench.add("memory", cells)
    bench.note(
        "memory", "peak of a loss's forward and backward over its inputs and their gradients"
    )


def memory_job(sizes: list[int]) -> dict[str, dict[int, int]]:
    """Job: peak bytes of each objective's loss at each number of tokens."""
    heads = [torch.randn(MINI.vocab_size, width) * 0.1 for width in MEMORY_WIDTHS]
    found: dict[str, dict[int, int]] = {}
    for name, given in OBJECTIVES.items():
        cfg = compose_config(Path("none"), *given).stage
        warm_up = min(64, *sizes)
        found[name.value] = {tokens: loss_peak(cfg, tokens, *heads) for tokens in (warm_up, *sizes)}
    return found


def loss_peak(cfg: OPDConfig, tokens: int, head: Tensor, teacher_head: Tensor) -> int:
    """Peak bytes of forward and backward at one random response, over inputs and gradients."""
    head.grad = None
    hidden, of_teacher = (torch.randn(tokens, width) for width in MEMORY_WIDTHS)
    vocab_size = len(head)
    ids = torch.randint(0, vocab_size, (tokens, 1 + cfg.num_sampler_topk)).tolist()
    prompt = Prompt(0, [0], "bench", "none", "none")
    rollout = rollout_of(prompt, [row[0] for row in ids], [row[1:] for row in ids])
    wanted = wanted_of(cfg, vocab_size, stop_id=0)
    scored = Scored(rollout, scores_from_hidden(rollout, of_teacher, teacher_head, wanted))
    (batch,) = pack_rollouts([scored], cfg.objective, max_tokens=tokens)
    output = PolicyOutput(hidden.requires_grad_(), head.requires_grad_())
    loss_fn = build_reverse_kl(cfg, teacher_head)

    def run() -> None:
        loss_fn(output, batch).loss.backward()  # type: ignore[no-untyped-call]

    return peak_bytes(run, torch.device("cpu")) - hidden.nbytes - head.nbytes


def bench_teacher_share(bench: Bench, args: argparse.Namespace) -> None:
    """Read the share of scoring in the steps of a run."""
    phases: dict[int, list[dict[str, float]]] = {}
    for step in map(json.loads, (args.run / "metrics.jsonl").read_text().splitlines()):
        phases.setdefault(step["cascade/phase"], []).append(step)
    for phase, (_opening, *steps) in phases.items():
        cells: dict[str, Any] = {"phase": phase, "steps": len(steps)}
        if not steps:
            bench.add("teacher_share", cells | {"note": "only its first step, left out"})
            continue
        shares = [step["time/score"] / step["time/step"] for step in steps]
        for part in ("step", *STEP_PARTS):
            cells[f"{part} ms"] = 1e3 * median(step[f"time/{part}"] for step in steps)
        cells |= {"score / step": median(shares), "range": span(shares), "goal": 0.4}
        # Of servers, from the first request to the last answer; 0 where all scores were kept.
        asked = [step for step in steps if step.get("teacher/seconds")]
        if asked:
            waits = [step["time/score"] / step["teacher/seconds"] for step in asked]
            cells["scoring ms"] = 1e3 * median(step["teacher/seconds"] for step in asked)
            cells |= {"wait / scoring": median(waits), "wait range": span(waits), "wait goal": 0.2}
        bench.add("teacher_share", cells, shares)
    bench.note("teacher_share", "without the first step of each phase, which opens its teacher;")
    bench.note("teacher_share", "score is the wait for a teacher once all is sampled")


def bench_sampler(bench: Bench, _: argparse.Namespace) -> None:
    """Time both samplers and their syncs."""
    for shape in bench.shapes:
        with tempfile.TemporaryDirectory() as directory:
            make_inputs(Path(directory), shape, argparse.Namespace(), 1)
            task = {"directory": directory, "repeats": bench.repeats}
            found = run_job([sys.executable, __file__, "--job"], {}, job="sampler", **task)
        times = {side: found[side]["sample"] for side in SAMPLERS}
        for side in SAMPLERS:
            parts = found[side]
            cells: dict[str, Any] = {"shape": shape, "sampler": side, "MiB": found["bytes"] / MIB}
            cells |= compared(times, side, base="vllm")
            rates = [n / s for n, s in zip(parts["tokens"], times[side], strict=True)]
            cells["tokens/s"] = median(rates)
            cells |= {f"{part} ms": 1e3 * median(parts[part]) for part in SYNC_PARTS}
            each = zip(*(parts[part] for part in SYNC_PARTS), strict=True)
            over = [sync / (2 * copy + canary) for sync, copy, canary in each]
            cells |= {"sync / bound": median(over), "bound range": span(over)}
            bench.add("sampler", cells, parts)
    bench.note(
        "sampler", "goals: native at least 1.3 times the time of vllm; a sync at most its bound,"
    )
    bench.note(
        "sampler", "which is two copies of its bytes and the canary; tokens are sampled ones"
    )
    bench.note("sampler", "goal: all names of Mini accounted for in 1 s: " + accounting())


def accounting() -> str:
    """How long samplers take to check a stream of Mini's weights, without their bytes."""
    shapes = weight_shapes(meta_model(MINI))
    stream = [(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
    start = time.perf_counter()
    count = sum(1 for _ in with_tied_head(accounted(stream, shapes), shapes))
    return f"{count} weights in {time.perf_counter() - start:.3f} s"


def sampler_job(directory: str, repeats: int) -> dict[str, Any]:
    """Job: seconds of sampling, of syncs and of what syncs are made of, the samplers in turn."""
    loops = {
        side: Distillation(Path(directory), f"rollout@stage.rollout={side}", *given, *STILL)
        for side, given in SAMPLERS.items()
    }
    policy = next(iter(loops.values())).policy
    found: dict[str, Any] = {"bytes": sum(w.nbytes for _, w in policy.named_weights())}
    for side in loops:
        found[side] = {part: [] for part in (*SYNC_PARTS, "sample", "tokens")}
    for number in range(1 + repeats):  # the first warms up
        for side, loop in loops.items():
            prompts = loop.tokenised(loop.texts)
            marks = [time.perf_counter()]
            sync_weights(
                loop.policy,
                loop.sampler,
                number,
                loop.probes,
                loop.opd.rollout.canary_tolerance,
            )
            marks.append(time.perf_counter())
            copies = [weight.clone() for _, weight in loop.policy.named_weights()]
            marks.append(time.perf_counter())
            loop.policy.score(loop.probes), loop.sampler.score(loop.probes)
            marks.append(time.perf_counter())
            rollouts = list(loop.sampler.sample(prompts, loop.opd.responses_per_prompt))
            marks.append(time.perf_counter())
            del copies
            if number == 0:
                continue
            parts = (*SYNC_PARTS, "sample")
            for part, start, end in zip(parts, marks[:-1], marks[1:], strict=True):
                found[side][part].append(end - start)
            found[side]["tokens"].append(sum(len(r.response_ids) for r in rollouts))
    for loop in loops.values():
        loop.sampler.close()
    return found


def our_job(directory: str, steps: int, warm_ups: int, check: bool) -> dict[str, Any]:
    """Job: our side of `trl`; `trl_side.py` is the other."""
    loop = Distillation(Path(directory), *OBJECTIVES[Objective.full], *MOVING)
    if check:
        given = json.loads((Path(directory) / "check.json").read_text())
        prompts = loop.tokenised([one["text"] for one in given])
        rollouts = [
            rollout_of(prompt, one["response"], [[] for _ in one["response"]])
            for prompt, one in zip(prompts, given, strict=True)
        ]
        metrics = loop.train(loop.teacher.score(rollouts))
        found = {"kl": metrics["kl/reverse"], "grad_norm": metrics["optim/grad_norm"]}
        return found | {"prompts": [prompt.input_ids for prompt in prompts]}
    for _ in range(warm_ups + steps):
        loop.step()
    parts = {part: seconds[warm_ups:] for part, seconds in loop.seconds.items()}
    return {"seconds": parts.pop("step"), "tokens": loop.tokens[warm_ups:], "parts": parts}


def run_job(command: list[str], settings: dict[str, str], **task: Any) -> Any:
    """Do a task in a child process and return what it found."""
    # A group of one process has left its ranks here, which a child would take for a launch.
    environment = {k: v for k, v in os.environ.items() if k not in RANKS}
    with tempfile.TemporaryDirectory() as directory:
        given, found = Path(directory) / "task.json", Path(directory) / "found.json"
        given.write_text(json.dumps(task))
        command = [*command, str(given), str(found)]
        subprocess.run(command, env=environment | settings, stdout=sys.stderr, check=True)
        return json.loads(found.read_text())


def bench_trl(bench: Bench, args: argparse.Namespace) -> None:
    """Time whole steps beside those of TRL's trainer."""
    for shape in bench.shapes:
        with tempfile.TemporaryDirectory() as directory:
            make_inputs(Path(directory), shape, args, args.steps + WARM_UPS)
            trl_case(bench, args, shape, Path(directory))
    bench.note(
        "trl", "goal: 5 x the tokens/s of TRL, prompts and responses without padding; kl and"
    )
    bench.note(
        "trl", "|grad| are of given sequences; train is all that is neither sampled nor scored"
    )
    for side, settings in THEIR_SIDES.items():
        bench.note("trl", f"{side}: {settings}")


def trl_case(bench: Bench, args: argparse.Namespace, shape: str, directory: Path) -> None:
    """Check and time all sides of one shape."""
    cfg, rng = compose_config(directory, *MOVING), Random(1)
    vocab_size = read_architecture(directory / "student").vocab_size
    opd, texts = cfg.stage, json.loads((directory / "prompts.json").read_text())
    lengths = [rng.randint(1, opd.max_response_length) for _ in range(opd.global_batch_size)]
    responses = [[rng.randrange(1, vocab_size) for _ in range(length)] for length in lengths]
    sequences = [{"text": t, "response": r} for t, r in zip(texts, responses, strict=False)]
    (directory / "check.json").write_text(json.dumps(sequences))
    task = {"directory": str(directory), "steps": args.steps, "warm_ups": WARM_UPS}
    numbers = {"batch": opd.global_batch_size, "responses": opd.responses_per_prompt}
    numbers |= {"max_response_length": opd.max_response_length, "optim": plain_config(cfg)["optim"]}
    sides = {OURS: partial(run_job, [sys.executable, __file__, "--job"], {}, job="ours", **task)}
    for side, settings in THEIR_SIDES.items():
        command = [str(args.trl_python), str(THEIR_SCRIPT)]
        sides[side] = partial(run_job, command, {}, **task, **numbers, **settings)
    checks = {side: run(check=True) for side, run in sides.items()}
    right = [side for side in sides if same(checks[side], checks[OURS])]
    rounds = [{side: sides[side](check=False) for side in right} for _ in range(bench.repeats)]
    for side, check in checks.items():
        cells: dict[str, Any] = {"shape": shape, "side": side, "version": check.get("version")}
        cells |= {"kl": check["kl"], "|grad|": check["grad_norm"]}
        if side not in right:
            bench.add("trl", cells | {"note": "wrong, not timed"})
            continue
        rates = [rate(found[side]) for found in rounds]
        ratios = [rate(found[OURS]) / own for found, own in zip(rounds, rates, strict=True)]
        cells["tokens / step"] = median(t for found in rounds for t in found[side]["tokens"])
        cells |= {"tokens/s": median(rates), "tokens/s range": span(rates)}
        cells |= {"ours / side": median(ratios), "ratio range": span(ratios)}
        for part in STEP_PARTS:
            every = [s for found in rounds for s in found[side]["parts"].get(part, [])]
            cells[f"{part} ms"] = 1e3 * median(every) if every else None
        bench.add("trl", cells, [found[side] for found in rounds])


def rate(found: dict[str, Any]) -> float:
    """Tokens a second over all steps of a child."""
    return float(sum(found["tokens"]) / sum(found["seconds"]))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sides found the same prompts, loss and gradient norm."""
    close = [abs(one[name] / other[name] - 1) <= TOLERANCE for name in ("kl", "grad_norm")]
    return one["prompts"] == other["prompts"] and all(close)


JOBS: dict[str, Callable[..., Any]] = {
    "memory": memory_job,
    "ours": our_job,
    "sampler": sampler_job,
}
PARTS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "objectives": bench_objectives,
    "teacher_share": bench_teacher_share,
    "sampler": bench_sampler,
    "trl": bench_trl,
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}; default what is possible")
    parser.add_argument("--shapes", help=f"some of {','.join(SHAPES)}; default quickstart")
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    parser.add_argument("--steps", type=int, default=20, help="of a side of trl in a round")
    parser.add_argument("--tokens", type=int, default=4096, help="most of the memory case")
    parser.add_argument("--run", type=Path, help="directory of a finished distillation")
    parser.add_argument("--trl-python", type=Path, help="an interpreter with trl")
    parser.add_argument("--student", type=Path, help="Hugging Face directory, with a tokenizer")
    parser.add_argument("--teacher", type=Path, help="Hugging Face directory")
    parser.add_argument("--prompts", type=Path, nargs="+", help="jsonl files of conversations")
    args = parser.parse_args()
    needs = {"teacher_share": args.run, "trl": args.trl_python}
    possible = [part for part in PARTS if needs.get(part, True)]
    args.only = args.only.split(",") if args.only else possible
    models = (args.student, args.teacher, args.prompts)
    args.shapes = [GIVEN] if all(models) else (args.shapes or "quickstart").split(",")
    if unknown := [part for part in args.only if part not in possible]:
        parser.error(f"--only: {', '.join(unknown)} is unknown, or needs --run or --trl-python")
    if unknown := [shape for shape in args.shapes if shape not in {GIVEN, *SHAPES}]:
        parser.error(f"--shapes: {', '.join(unknown)} is none of {', '.join(SHAPES)}")
    if any(models) and not all(models):
        parser.error("give all or none of --student, --teacher and --prompts")
    return args


def main() -> None:
    """Run the parts asked for; print tables and write the numbers."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if sys.argv[1:2] == ["--job"]:
        task = json.loads(Path(sys.argv[2]).read_text())
        Path(sys.argv[3]).write_text(json.dumps(JOBS[task.pop("job")](**task)))
        distributed.stop()
        return
    args = parse_arguments()
    bench = Bench(torch.device("cpu"), args.repeats, args.shapes)
    for part in args.only:
        PARTS[part](bench, args)
        write(bench, args.json)
    report(bench)
    distributed.stop()


if __name__ == "__main__":
    main()
