"""Steps of on-policy distillation: objectives, the teacher's share, samplers, and TRL's trainer.

    python scripts/bench/opd.py --json opd.json --shapes quickstart,medium
    python scripts/bench/opd.py --json share.json --only teacher_share --run outputs/quickstart/opd
    python scripts/bench/opd.py --json trl.json --only trl --trl-python venv-trl/bin/python

Our side is `run_opd` itself: each time a run of experiment=quickstart_opd on one rank, on a CPU, in
float32, whose steps are timed as the run logs them. Weights and prompts are random, so that nearly
every response has its full length, or given. What a run logs of its first step is compared with
plain torch, or with TRL; a side whose numbers differ is reported as wrong, without its times. Sides
take turns, a run each in every round; ratios are of a round's means. The environment of
--trl-python needs torch and trl alone.

Legend: T tokens with loss of a step, V vocabulary.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import our_side
import torch
from harness import (
    MIB,
    OURS,
    Bench,
    compared,
    do_job,
    parser_of,
    peak_bytes,
    run_job,
    span,
)
from our_side import (
    GIVEN,
    OBJECTIVES,
    SHAPES,
    WARM_UPS,
    Step,
    compose_config,
    in_rounds,
    make_inputs,
    means,
    our_runs,
    parts_ms,
    rates,
    read_log,
    timed_steps,
)
from shapes import MINI
from torch import Tensor

from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig
from marco_train.config.resumption import plain_config
from marco_train.data.packing import pack_rollouts
from marco_train.inference.engine import with_tied_head
from marco_train.losses.distillation import build_reverse_kl
from marco_train.models.weights import accounted, joined_shapes, meta_model
from marco_train.teachers.base import ScoreSpec, scores_from_hidden
from marco_train.types import FinishReason, PolicyOutput, Prompt, Rollout, ScoredRollout

# The first is so small that float32 weights stay as they are, and with them what is sampled.
STILL, MOVING = (f"optim.learning_rate={rate}" for rate in (1e-30, 1e-6))
MEMORY_WIDTHS = (64, 96)  # of policy and teacher
SAMPLERS = {
    "native": ["rollout@stage.rollout=native"],
    "vllm": [
        "rollout@stage.rollout=vllm",
        "stage.rollout.kv_cache_gib=0.25",
        "stage.rollout.max_tokens_per_batch=4096",
    ],
}
STEPS = {"objectives": 3, "sampler": 3, "trl": 20}
TOLERANCE = 1e-4
OUR_SCRIPT = our_side.__file__
THEIR_SCRIPT = Path(__file__).with_name("trl_side.py")
THEIR_SIDES: dict[str, dict[str, Any]] = {
    "TRL": {"experts": "grouped_mm", "microbatches": 1, "recompute": False},
    "TRL, in microbatches": {"experts": "grouped_mm", "microbatches": 4, "recompute": False},
    "TRL's defaults in float32": {"experts": None, "microbatches": 8, "recompute": True},
}
OUR_SIDES = {
    OURS: OBJECTIVES["full"],
    "ours, sampled": OBJECTIVES["sampled"],
    "ours, compile_losses": [*OBJECTIVES["full"], "compile_losses=true"],
}


def with_steps(bench: Bench, part: str) -> list[str]:
    """How many steps the runs of a part make."""
    steps = bench.args.warm_ups + (bench.args.steps or STEPS[part])
    return [f"stage.cascade.first.num_steps={steps}"]


def bench_objectives(bench: Bench) -> None:
    """Time whole steps of each objective, and weigh its loss."""
    for shape in bench.args.shapes:
        with tempfile.TemporaryDirectory() as directory:
            objectives_case(bench, shape, make_inputs(Path(directory), shape, bench.args))
    bench.note("objectives", "goal: full at most 1.15 x sampled; topk tells 64 tokens apart;")
    bench.note("objectives", "`error` is of kl/reverse against whole logits of transformers")
    memory_case(bench)


def objectives_case(bench: Bench, shape: str, inputs: list[str]) -> None:
    """Check and time all objectives of one shape on the same rollouts."""
    inputs = [*inputs, *with_steps(bench, "objectives"), STILL]
    task = {"overrides": inputs + OBJECTIVES["full"]}
    wanted = run_job(OUR_SCRIPT, "first_step", task)["kl"]
    rounds = in_rounds(partial(our_runs, inputs, OBJECTIVES), bench.repeats, bench.args.warm_ups)
    errors = {
        name: abs(found[0][0]["kl/reverse"] / wanted[name] - 1) for name, found in rounds.items()
    }
    times = {
        name: means(found, "time/step")
        for name, found in rounds.items()
        if errors[name] <= TOLERANCE
    }
    for name, found in rounds.items():
        first = found[0][0]
        cells: dict[str, Any] = {"shape": shape, "objective": name}
        cells |= {"T": round(first["data/num_loss_tokens"]), "kl": first["kl/reverse"]}
        cells["error"] = errors[name]
        if name not in times:
            bench.add("objectives", cells | {"note": "wrong"})
            continue
        cells |= compared(times, name, base="sampled") | parts_ms(timed_steps(found))
        bench.add("objectives", cells, timed_steps(found))


def memory_case(bench: Bench) -> None:
    """Weigh forward and backward of each objective's loss over doubling numbers of tokens."""
    sizes = [bench.args.tokens >> shift for shift in (3, 2, 1, 0)]
    # Every larger block comes from the system and goes back to it, so that the peak is of what is
    # held and not of how the heap was cut up before.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = run_job(__file__, "memory", {"sizes": sizes}, settings=exact)
    for name in OBJECTIVES:
        for tokens in sizes:
            cells: dict[str, Any] = {"objective": name, "T": tokens, "V": MINI.vocab_size}
            cells |= {"extra MiB": found[name][str(tokens)] / MIB}
            cells |= {"[T, V] MiB": 4 * tokens * MINI.vocab_size / MIB}
            bench.add("memory", cells)
    bench.note("memory", "peak of forward and backward of a loss over inputs and their gradients")


def memory(sizes: list[int]) -> dict[str, dict[int, int]]:
    """Job: peak bytes of each objective's loss at each number of tokens."""
    heads = [torch.randn(MINI.vocab_size, width) * 0.1 for width in MEMORY_WIDTHS]
    warm_up = min(64, *sizes)
    found: dict[str, dict[int, int]] = {}
    for name, chosen in OBJECTIVES.items():
        cfg = compose_config(chosen).stage
        found[name] = {tokens: loss_peak(cfg, tokens, *heads) for tokens in (warm_up, *sizes)}
    return found


def loss_peak(cfg: OPDConfig, tokens: int, head: Tensor, teacher_head: Tensor) -> int:
    """Peak bytes of forward and backward at one random response, over inputs and gradients."""
    vocab_size, head.grad = len(head), None
    hidden, of_teacher = (torch.randn(tokens, width) for width in MEMORY_WIDTHS)
    response, *topk = torch.randint(0, vocab_size, (1 + cfg.num_sampler_topk, tokens)).tolist()
    topk_ids = [list(ids) for ids in zip(*topk, strict=True)] or [[]] * tokens
    prompt = Prompt(0, [0], "bench", "none", "none")
    logprobs = [0.0] * tokens
    rollout = Rollout(prompt, 0, response, logprobs, topk_ids, FinishReason.length, 0)
    length, top_k = longest_sequence(cfg), cfg.top_k or 0
    spec = ScoreSpec(cfg.objective, top_k, cfg.top_k_source, vocab_size, length, stop_id=0)
    scored = ScoredRollout(rollout, scores_from_hidden(rollout, of_teacher, teacher_head, spec))
    (batch,) = pack_rollouts([scored], cfg.objective, max_tokens=tokens)
    output = PolicyOutput(hidden.requires_grad_(), head.requires_grad_())
    loss_fn = build_reverse_kl(cfg, teacher_head)

    def run() -> None:
        loss_fn(output, batch).loss.backward()  # type: ignore[no-untyped-call]

    return peak_bytes(run, torch.device("cpu")) - hidden.nbytes - head.nbytes


def bench_teacher_share(bench: Bench) -> None:
    """Read the share of scoring in the steps of a run."""
    phases: dict[float, list[Step]] = {}
    for step in read_log(bench.args.run):
        phases.setdefault(step["cascade/phase"], []).append(step)
    for phase, (_opening, *steps) in phases.items():
        cells: dict[str, Any] = {"phase": phase, "steps": len(steps)}
        if not steps:
            bench.add("teacher_share", cells | {"note": "only its first step, left out"})
            continue
        shares = [step["time/score"] / step["time/step"] for step in steps]
        cells["step ms"] = 1e3 * median(step["time/step"] for step in steps)
        cells |= parts_ms(steps)
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


def bench_sampler(bench: Bench) -> None:
    """Time both samplers and their syncs."""
    for shape in bench.args.shapes:
        with tempfile.TemporaryDirectory() as directory:
            inputs = make_inputs(Path(directory), shape, bench.args)
            inputs += [*with_steps(bench, "sampler"), *OBJECTIVES["full"], STILL]
            rounds = in_rounds(
                partial(our_runs, inputs, SAMPLERS), bench.repeats, bench.args.warm_ups
            )
            bounds = {
                side: run_job(OUR_SCRIPT, "sync_bound", {"overrides": inputs + chosen})
                for side, chosen in SAMPLERS.items()
            }
        times = {side: means(found, "time/sample") for side, found in rounds.items()}
        for side, found in rounds.items():
            cells: dict[str, Any] = {"shape": shape, "sampler": side}
            cells |= {"MiB": bounds[side]["bytes"] / MIB} | compared(times, side, base="vllm")
            cells["tokens/s"] = median(rates(found, "data/num_loss_tokens", "time/sample"))
            syncs = means(found, "time/sync")
            bound = 2 * bounds[side]["copy"] + bounds[side]["canary"]
            cells |= {"sync ms": 1e3 * median(syncs), "bound ms": 1e3 * bound}
            over = [seconds / bound for seconds in syncs]
            cells |= {"sync / bound": median(over), "bound range": span(over)}
            bench.add("sampler", cells, {"steps": timed_steps(found), "bound": bounds[side]})
    bench.note(
        "sampler",
        "goals: native at least 1.3 times the time of vllm; a sync at most its bound, which is two",
        "copies of its bytes and the canary, medians; tokens are sampled ones",
        "goal: all names of Mini accounted for in 1 s: " + accounting(),
    )


def accounting() -> str:
    """How long samplers take to check a stream of Mini's weights, without their bytes."""
    shapes = joined_shapes(meta_model(MINI))
    stream = [(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
    start = time.perf_counter()
    count = sum(1 for _ in with_tied_head(accounted(stream, shapes), shapes))
    return f"{count} tensors in {time.perf_counter() - start:.3f} s"


def bench_trl(bench: Bench) -> None:
    """Time whole steps beside those of TRL's trainer."""
    for shape in bench.args.shapes:
        with tempfile.TemporaryDirectory() as directory:
            trl_case(bench, shape, make_inputs(Path(directory), shape, bench.args))
    bench.note(
        "trl",
        "goal: 3 x the tokens/s of TRL, prompts and responses without padding, at a third of its",
        "memory where the vocabulary and the responses are long, or else 5 x; kl and |grad| are",
        "of our first step's responses; TRL's train is all that is neither sampled nor scored",
        *(f"{side}: {settings}" for side, settings in THEIR_SIDES.items()),
    )


def trl_case(bench: Bench, shape: str, inputs: list[str]) -> None:
    """Check and time all sides of one shape."""
    inputs = [*inputs, *with_steps(bench, "trl"), *bench.args.overrides, MOVING]
    cfg = compose_config(inputs)
    num_responses = cfg.stage.global_batch_size * cfg.stage.responses_per_prompt
    first = run_job(OUR_SCRIPT, "first_step", {"overrides": [*inputs, *OUR_SIDES[OURS]]})
    common = {"student": cfg.model.path, "teacher": cfg.stage.cascade["first"].teacher.path}
    common |= {"batch": cfg.stage.global_batch_size, "responses": cfg.stage.responses_per_prompt}
    common |= {"max_response_length": cfg.stage.max_response_length}
    common |= {"texts": first["texts"], "optim": plain_config(cfg)["optim"]}
    theirs = partial(run_job, THEIR_SCRIPT, python=bench.args.trl_python)
    given = {name: first[name] for name in ("prompts", "responses")}
    setups = {
        side: {"setup": common | settings}
        for side, settings in THEIR_SIDES.items()
        if side in bench.args.sides
    }
    our_sides = {side: chosen for side, chosen in OUR_SIDES.items() if side in bench.args.sides}
    checks = {side: theirs("check", setup | given) for side, setup in setups.items()}

    def make_runs() -> dict[str, list[Step]]:
        trained = {side: theirs("train", setup) for side, setup in setups.items()}
        for side, chosen in our_sides.items():
            trained |= our_runs(inputs, {side: chosen})  # in a process each, for its peak
        return trained

    rounds = in_rounds(make_runs, bench.repeats, bench.args.warm_ups)
    for step in chain.from_iterable(chain.from_iterable(rounds[side] for side in our_sides)):
        step["data/num_tokens"] += num_responses  # their last tokens are no inputs of ours
    for side in our_sides:
        step = rounds[side][0][0]
        checks[side] = {"kl": step["kl/reverse"], "|grad|": step["optim/grad_norm"]}
    speeds = {side: rates(found, "data/num_tokens", "time/step") for side, found in rounds.items()}
    for side, found in rounds.items():
        cells: dict[str, Any] = {"shape": shape, "side": side} | checks[side]
        is_estimate = side == "ours, sampled"
        if not is_estimate and any(
            abs(cells[name] / checks[OURS][name] - 1) > TOLERANCE for name in checks[OURS]
        ):
            bench.add("trl", cells | {"note": "wrong"})
            continue
        steps = timed_steps(found)
        ratios = [one / other for one, other in zip(speeds[OURS], speeds[side], strict=True)]
        cells["tokens / step"] = median(step["data/num_tokens"] for step in steps)
        cells |= {"tokens/s": median(speeds[side]), "tokens/s range": span(speeds[side])}
        cells |= {"ours / side": median(ratios), "ratio range": span(ratios)}
        cells["peak GiB"] = median(run[-1]["memory/peak_gib"] for run in found)
        bench.add("trl", cells | parts_ms(steps), steps)


PARTS: dict[str, Callable[[Bench], None]] = {
    "objectives": bench_objectives,
    "teacher_share": bench_teacher_share,
    "sampler": bench_sampler,
    "trl": bench_trl,
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__ or "", PARTS, SHAPES, usual_shapes=["quickstart"])
    usual = ", ".join(f"{steps} of {part}" for part, steps in STEPS.items())
    parser.add_argument(
        "--steps", type=int, help=f"Time so many steps of a run; {usual} if absent."
    )
    parser.add_argument(
        "--warm-ups",
        type=int,
        default=WARM_UPS,
        help=f"First steps of a run that are not timed; {WARM_UPS} if absent.",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="Weigh losses of up to so many; 4096 if absent."
    )
    parser.add_argument(
        "--overrides", type=str.split, default=[], help="Of the runs beside TRL's, key=value."
    )
    parser.add_argument(
        "--sides",
        type=lambda text: {OURS, *text.split(";")},
        default={*OUR_SIDES, *THEIR_SIDES},
        help=f"Beside ours, some of {'; '.join([*OUR_SIDES, *THEIR_SIDES][1:])}.",
    )
    parser.add_argument("--run", type=Path, help="Read the teacher's share from this run.")
    parser.add_argument("--trl-python", type=Path, help="Run TRL in this interpreter.")
    parser.add_argument("--student", type=Path, help="Train this model instead of random ones.")
    parser.add_argument("--teacher", type=Path, help="Its teacher, of the same tokenizer.")
    parser.add_argument("--prompts", type=Path, nargs="+", help="Its prompts: jsonl of chats.")
    args = parser.parse_args()
    needs = {"teacher_share": args.run, "trl": args.trl_python}
    possible = [part for part in PARTS if needs.get(part, True)]
    if args.warm_ups < 1:
        parser.error(f"--warm-ups: {args.warm_ups}; the first step is checked and never timed")
    args.only = args.only or possible
    if missing := [part for part in args.only if part not in possible]:
        parser.error(f"--only: {', '.join(missing)} needs --run or --trl-python")
    models = (args.student, args.teacher, args.prompts)
    if any(models) and not all(models):
        parser.error("give all or none of --student, --teacher and --prompts")
    args.shapes = [GIVEN] if all(models) else args.shapes
    return args


def main() -> None:
    """Run the parts asked for; print tables and write the numbers."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if not do_job({"memory": memory}):
        Bench(parse_arguments(), torch.device("cpu")).run(PARTS)


if __name__ == "__main__":
    main()
