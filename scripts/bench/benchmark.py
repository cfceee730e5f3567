"""What lm-eval, the store of answers and the judges cost a benchmark beside its sampler.

    python scripts/bench/benchmark.py --model DIR --json benchmark.json

Sides: `alone`, our own sampler on prompts that are token ids already; `asked`, the same responses
as the stage takes them: rendered, sampled, written down, read, judged and scored; `kept`, all of
that with the answers on disk already; `loaded`, the files and rows of tasks, once a run. Items are
made up, of GSM8K's columns, so that most responses without sense reach the slowest judge.
DIR is a Hugging Face directory with a tokenizer and a chat template, as the quickstart's export.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from harness import Bench, compared, parser_of
from hydra import compose, initialize_config_dir

from marco_train.config import TrainConfig, to_run
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.run import register_schemas
from marco_train.data.chat import load_tokenizer
from marco_train.evaluation.answers import AnswerSampler
from marco_train.evaluation.benchmark.aggregate import row_score
from marco_train.evaluation.benchmark.harness import (
    BenchmarkTask,
    SampledLM,
    ask,
    load_tasks,
    prompt_of,
)
from marco_train.evaluation.benchmark.store import AnswerStore
from marco_train.models import load_model
from marco_train.models.weights import torch_dtype
from marco_train.stages.benchmark import fit_lengths
from marco_train.types import Message

# Items, and most tokens of a response.
SHAPES = {"short": (100, 32), "long": (50, 128)}


def made_up(directory: Path, count: int) -> None:
    """Write GSM8K's columns with sums of two numbers."""
    draw = Random(0)
    file = directory / "gsm8k" / "main" / "test.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("w") as lines:
        for _ in range(count):
            a, b = draw.randrange(1000), draw.randrange(1000)
            row = {"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"}
            lines.write(json.dumps(row) + "\n")


def config(model: str, directory: Path, length: int) -> TrainConfig:
    """A benchmark of GSM8K with responses of so many tokens."""
    overrides = [
        "experiment=benchmark",
        f"model.path={model}",
        "model.dtype=float32",
        "stage.suite=gsm8k",
        f"stage.data_dir={directory}",
        f"stage.max_response_length={length}",
        "stage.max_prompt_length=100",
        f"output_dir={directory / 'out'}",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_run(compose("train", overrides=overrides))


class Case:
    """A sampler with the model's weights, and a task to ask."""

    def __init__(self, path: str, directory: Path, length: int) -> None:
        cfg = config(path, directory, length)
        model = load_model(path, torch_dtype(cfg.model.dtype))
        self._cfg = fit_lengths(cfg, model.architecture)
        self._directory = directory
        self._tokenizer = load_tokenizer(cfg.model)
        self._sampler = AnswerSampler(self._cfg, self._tokenizer).sampler_of(model)
        self._task = self.loaded()
        self._num_responses = self._task.num_responses
        self._prompts = []
        for item in self._task.items:
            turns = [Message("user", item["prompt"])]
            text = self._tokenizer.render(turns, open_answer=True).text
            ids, _ = self._tokenizer.encoder.encode(text)
            self._prompts.append(prompt_of(self._task, item["id"], ids))

    def loaded(self) -> BenchmarkTask:
        """Load the task as a run does at its start."""
        (task,) = load_tasks(self._cfg.stage.suite, self._cfg.stage)
        return task

    def alone(self) -> list[int]:
        """Sample the responses to token ids; gives their lengths."""
        sampled = self._sampler.sample(self._prompts, self._num_responses)
        return [len(rollout.response_ids) for rollout in sampled]

    def asked(self) -> None:
        """Do what the stage does with a task, from its items to its score."""
        self._ask(self._directory / "asked", anew=True)

    def kept(self) -> None:
        """The same with all answers on disk."""
        self._ask(self._directory / "kept", anew=False)

    def _ask(self, directory: Path, *, anew: bool) -> None:
        limit = self._cfg.stage.max_prompt_length
        with closing(AnswerStore(directory, {}, anew=anew)) as store:
            lm = SampledLM(self._sampler, self._tokenizer, store, limit, greedy=False)
            row_score(ask(lm, self._task).graded)


def sides(bench: Bench) -> None:
    """Time the sides in turn."""
    for name in bench.args.shapes:
        count, length = SHAPES[name]
        with tempfile.TemporaryDirectory() as directory:
            made_up(Path(directory), count)
            case = Case(bench.args.model, Path(directory), length)
            calls: dict[str, Callable[[], object]] = {
                "alone": case.alone,
                "asked": case.asked,
                "kept": case.kept,
                "loaded": case.loaded,
            }
            times = bench.in_turn(calls)
            tokens = fmean(case.alone())
        for side in times:
            cells = {"shape": name, "side": side, "responses": 8 * count, "mean tokens": tokens}
            bench.add("sides", cells | compared(times, side, base="alone"), times[side])


def main() -> None:
    """Run the bench."""
    parser = parser_of(__doc__ or "", ["sides"], SHAPES, list(SHAPES))
    parser.add_argument("--model", required=True, help="Hugging Face directory.")
    register_schemas()
    Bench(parser.parse_args(), torch.device("cpu")).run({"sides": sides})


if __name__ == "__main__":
    main()
