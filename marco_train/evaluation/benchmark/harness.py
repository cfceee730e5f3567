"""lm-eval, by which tasks are loaded, asked, graded and aggregated: the one module that knows it.

tasks' YAML -> lm-eval's tasks -> prompts -> SampledLM: our samplers -> grades -> its results
"""

import importlib.util
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from statistics import fmean
from typing import TYPE_CHECKING, Any

from marco_train.config.benchmark import (
    BENCHMARK_DIR,
    CARD_LITE,
    HELD_OUT,
    LITE_SHARE,
    OWN,
    PREFIX,
    CardRow,
    SuiteConfig,
    row_of,
    tasks_of,
)
from marco_train.data.chat import Tokenizer
from marco_train.data.loader import Question
from marco_train.distributed import barrier, gather_objects, is_main, rank, world_size
from marco_train.errors import require
from marco_train.evaluation.benchmark.grading import Graded, Translated
from marco_train.evaluation.benchmark.held_out import items_of
from marco_train.evaluation.benchmark.store import TOO_LONG, Answer, AnswerStore, digest_of
from marco_train.evaluation.benchmark.tasks import (
    Items,
    check_access,
    check_languages,
    where_of,
)
from marco_train.rollout.base import Sampler
from marco_train.tracking import format_eta, log_line
from marco_train.types import FinishReason, Message, Prompt, Rollout

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SECONDS_BETWEEN_LINES = 15.0
NUM_COUNTED = 32  # prompts of a task whose tokens a plan counts


@dataclass(frozen=True)
class BenchmarkTask:
    """A task that is ready to be asked."""

    name: str
    card: CardRow
    of_lm_eval: Any
    num_responses: int
    items: Items


@dataclass(frozen=True)
class Asked:
    """A task that was asked and graded."""

    task: BenchmarkTask
    graded: list[Graded] | list[Translated]
    answers: dict[str, list[Answer]]
    """By item."""
    results: dict[str, Any]
    """As lm-eval reports them."""
    samples: list[dict[str, Any]]
    """As lm-eval logs them."""
    seconds: float


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        InputError: Says what to install.
    """
    for package in ("lm_eval", "math_verify", "sacrebleu", "jsonschema"):
        require(
            importlib.util.find_spec(package) is not None,
            f"questions are asked with the package {package}: pip install 'marco-train[benchmark]'",
        )


def load_tasks(suite: str, asked: SuiteConfig) -> list[BenchmarkTask]:
    """Load the items of a suite's tasks.

    Raises:
        InputError: Those of a task are not there, or are not what they should be.
    """
    require_lm_eval()
    if suite == OWN:
        where: dict[str, Any] = {"own": asdict(asked.own)}
    else:
        check_languages(tasks_of(suite), asked.languages)
        where = where_of(suite, asked.data_dir, asked.data_dirs)
        check_access(tasks_of(suite), where)
    metadata = where | {
        "languages": asked.languages,
        "share": LITE_SHARE if suite == CARD_LITE else None,
        "max_items": asked.max_items,
    }
    num_responses = 1 if asked.greedy else asked.responses_per_prompt
    return _tasks(tasks_of(suite), metadata, num_responses)


def held_out_task(questions: Sequence[Question], num_responses: int) -> BenchmarkTask:
    """Make the task of questions from a run's own held-out rows."""
    require_lm_eval()
    (task,) = _tasks([HELD_OUT], {"items": items_of(questions)}, num_responses)
    return task


def _tasks(
    names: Sequence[str], metadata: Mapping[str, Any], num_responses: int | None
) -> list[BenchmarkTask]:
    from lm_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager(
            include_path=str(BENCHMARK_DIR / "tasks"), include_defaults=False, metadata=metadata
        )
        return [_load(manager, name, num_responses) for name in names]


def _load(manager: Any, name: str, num_responses: int | None) -> BenchmarkTask:
    from lm_eval.filters import build_filter_ensemble

    (loaded,) = manager.load([f"{PREFIX}{name}"])["tasks"].values()
    if num_responses is not None:
        loaded.set_config("repeats", num_responses)
        loaded._filters = [build_filter_ensemble("all", [["take_first_k", {"k": num_responses}]])]
    return BenchmarkTask(name, row_of(name), loaded, loaded.config.repeats, loaded.dataset["test"])


def ask(lm: "SampledLM", task: BenchmarkTask) -> Asked:
    """Ask a model all items of a task and grade its answers; all ranks take part, to one result."""
    from lm_eval.evaluator import evaluate

    start = time.perf_counter()
    with _quiet():
        found = evaluate(
            lm=lm.of_lm_eval(task),
            task_dict={"tasks": {task.of_lm_eval.task_name: task.of_lm_eval}, "groups": {}},
            apply_chat_template=True,
            bootstrap_iters=0,  # the report has its own, over items
        )
    samples = found.pop("samples")[task.of_lm_eval.task_name]
    measure = "bleu" if "bleu" in samples[0]["metrics"] else "avg_at_k"
    graded = [sample.pop(measure) for sample in samples]
    for sample, grades in zip(samples, graded, strict=True):
        for name in sample["metrics"]:  # each is the same grades to lm-eval
            sample.pop(name, None)
        sample.update(_as_json(grades))
    return Asked(task, graded, lm.answers, found, samples, time.perf_counter() - start)


def _as_json(graded: Graded | Translated) -> dict[str, Any]:
    if isinstance(graded, Translated):
        return {"translations": list(graded.texts)}
    found: dict[str, Any] = {"right": list(graded.right), "answers": list(graded.answers)}
    return found | ({"errors": list(graded.errors)} if graded.errors else {})


class SampledLM:
    """Answers lm-eval's requests with a sampler of ours; ranks share the items.

    A request is rendered by the run's own chat template, and sampled with the seed of its task,
    item and response. Answers that the store has are not asked for again.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        store: AnswerStore | None,
        max_prompt_length: int,
        *,
        greedy: bool,
        keeps_ids: bool = False,
    ) -> None:
        """Answer with a sampler.

        Args:
            sampler: With the weights of a model.
            tokenizer: Of the model.
            store: Of answers that are known, and where others are kept. None: all are asked for.
            max_prompt_length: Tokens, over which a question is not asked.
            greedy: Whether each token of an answer is the likeliest one.
            keeps_ids: Whether answers have their tokens, for `rollouts_of`.
        """
        self._keeps_ids = keeps_ids
        self._greedy = greedy
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._store = store
        self._max_prompt_length = max_prompt_length
        self.answers: dict[str, list[Answer]] = {}
        """Of the task that was asked last, by item."""

    def of_lm_eval(self, task: BenchmarkTask) -> "LM":
        """Make lm-eval's view of it, for one task."""
        from lm_eval.api.model import LM

        outer = self

        class OfLMEval(LM):  # type: ignore[misc]
            tokenizer_name = outer._tokenizer.path

            def apply_chat_template(
                self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
            ) -> str:
                return outer.render(chat_history, open_answer=add_generation_prompt)

            def generate_until(self, requests: list[Any]) -> list[str]:
                return outer.generate(task, requests)

            def loglikelihood(self, requests: list[Any]) -> Any:
                raise NotImplementedError("tasks of the card sample; none needs a likelihood")

            loglikelihood_rolling = loglikelihood

        return OfLMEval()

    def render(self, turns: Sequence[Mapping[str, str]], *, open_answer: bool) -> str:
        """Render turns by the run's chat template."""
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
        return self._tokenizer.render(messages, open_answer=open_answer).text

    def generate(self, task: BenchmarkTask, requests: Sequence[Any]) -> list[str]:
        """Answer requests, of which each item's k come one after the other.

        Returns:
            The texts, in the order of the requests; the same on every rank.
        """
        prompts = {request.doc["id"]: self._asked(request) for request in requests}
        digests = {item: digest_of(text) for item, (text, _) in prompts.items()}
        k = task.num_responses
        known = {} if self._store is None else self._store.read(task.name)
        barrier()  # before another rank writes
        kept = {
            item: [known.get((item, number, digest)) for number in range(k)]
            for item, digest in digests.items()
        }
        missing = [item for item, answers in kept.items() if None in answers]
        mine = missing[rank() :: world_size()]
        made = self._sample(task, {item: prompts[item] for item in mine}, kept)
        for of_rank in gather_objects(made):
            for answer in of_rank:
                kept[answer.item][answer.response] = answer
        self.answers = {
            item: [a for a in answers if a is not None] for item, answers in kept.items()
        }
        return [answer.text for answers in self.answers.values() for answer in answers]

    def _asked(self, request: Any) -> tuple[str, list[int] | None]:
        """The text of a request, and its tokens where its item has them."""
        ids = request.doc.get("prompt_ids")
        return (request.args[0] if ids is None else self._tokenizer.decode(ids)), ids

    def _sample(
        self,
        task: BenchmarkTask,
        prompts: Mapping[str, tuple[str, list[int] | None]],
        kept: Mapping[str, Sequence[Answer | None]],
    ) -> list[Answer]:
        """Sample what is missing of this rank's items, and write each answer down as it ends."""
        made: list[Answer] = []
        asked: list[Prompt] = []
        item_of: dict[int, str] = {}

        def keep(answer: Answer) -> None:
            if kept[answer.item][answer.response] is None:
                if self._store is not None:
                    self._store.append(task.name, answer)
                made.append(answer)

        for item, (text, known) in prompts.items():
            ids = self._tokenizer.encoder.encode(text)[0] if known is None else known
            if len(ids) > self._max_prompt_length:
                for number in range(task.num_responses):
                    keep(Answer(item, number, digest_of(text), "", 0, TOO_LONG))
                continue
            prompt = prompt_of(task, item, ids)
            item_of[prompt.index] = item
            asked.append(prompt)
        progress = Progress(task, len(asked) * task.num_responses)
        for rollout in self._sampler.sample(asked, task.num_responses, greedy=self._greedy):
            item = item_of[rollout.prompt.index]
            keep(self._answer(item, digest_of(prompts[item][0]), rollout))
            progress.count()
        return made

    def _answer(self, item: str, digest: str, rollout: Rollout) -> Answer:
        ids = rollout.response_ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(
            item,
            rollout.sample_index,
            digest,
            text,
            len(ids),
            rollout.finish_reason.value,
            ids if self._keeps_ids else [],
        )


def rollouts_of(asked: Asked) -> list[Rollout]:
    """The answers to this rank's share of held-out rows, for a teacher to score.

    What the sampler made of their probabilities is not kept, and stands as 0.
    """
    return [
        Rollout(
            prompt=prompt_of(asked.task, item["id"], item["prompt_ids"]),
            sample_index=answer.response,
            response_ids=answer.ids,
            sampler_logprobs=[0.0] * len(answer.ids),
            topk_ids=[[]] * len(answer.ids),
            finish_reason=FinishReason(answer.finish),
            weight_version=0,
        )
        for item in asked.task.items[rank() :: world_size()]
        for answer in asked.answers[item["id"]]
    ]


def prompt_of(task: BenchmarkTask, item: str, ids: list[int]) -> Prompt:
    """The prompt of an item; its index, and so its seeds, are a function of task and item."""
    key = blake2b(f"{task.name}/{item}".encode(), digest_size=8).digest()
    language = item.partition("/")[0]
    return Prompt(int.from_bytes(key, "big") >> 1, ids, task.name, task.card.section, language)


class Progress:
    """Says how far this launch is with a task, every few seconds, for the main rank's share."""

    def __init__(self, task: BenchmarkTask, total: int) -> None:
        self._task = task
        self._total = total
        self._done = 0
        self._start = self._said = time.perf_counter()

    def count(self) -> None:
        """Count an answer."""
        self._done += 1
        now = time.perf_counter()
        if is_main() and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            eta = (now - self._start) / self._done * (self._total - self._done)
            share = f"{self._done}/{self._total} answers of this rank"
            log_line(f"{self._task.card.name}: {share} | eta {format_eta(eta)}")


def mean_prompt_tokens(tokenizer: Tokenizer, task: BenchmarkTask) -> float:
    """Mean tokens of some of a task's prompts, with the template around them."""
    some = task.items[:: math.ceil(len(task.items) / NUM_COUNTED)]
    return fmean(prompt_lengths(tokenizer, some))


def prompt_lengths(tokenizer: Tokenizer, items: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of items' prompts, with the template around them."""
    texts = [
        tokenizer.render([Message("user", item["prompt"])], open_answer=True).text for item in items
    ]
    return [len(tokenizer.encoder.encode(text)[0]) for text in texts]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval say warnings only, and draw no bar for the prompts of each task and rank."""
    import lm_eval.api.task
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
