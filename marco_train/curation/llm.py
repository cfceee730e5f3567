"""Asking an LLM behind the OpenAI API: many questions at a time, none of them paid for twice.

Answers are kept on disk by the content of their request, so a pipeline that goes on asks only what
was not answered; the API's key is read from the environment and never written.
"""

import json
import os
import random
import re
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from marco_train.config.curation import CURATION_DIR, LLMConfig
from marco_train.curation.frame import (
    Cost,
    Counted,
    Outcome,
    Row,
    Shard,
    Shards,
    Step,
    Transform,
    language_of,
    outcomes_of,
)
from marco_train.errors import InputError, ServersUnavailable, require
from marco_train.files import replaces

PROMPTS = CURATION_DIR / "prompts"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
CACHE = "llm.sqlite"
RESEED = 1_000_003
"""Added to the seed where a question is asked again."""
MOST_SECONDS = 60.0
"""Between two tries."""
REJECTED_FIRST = 8
"""Requests that a server refuses as they are, before it has answered any, are a wrong setting."""
THINKING = re.compile(r"\A\s*(?:<think>)?.*?</think>", re.DOTALL)
ASK_AGAIN = (
    "This is not JSON of the schema that was asked for: {fault}. Answer again, with nothing but "
    "JSON of that schema."
)


@dataclass(frozen=True)
class Prompt:
    """A versioned file of `configs/curation/prompts`; a changed one gets another digest."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Of the text."""
        return sha256(self.text.encode()).hexdigest()[:16]

    @property
    def version(self) -> str:
        """What tells it from every other."""
        return f"{self.name}@{self.digest}"

    def fill(self, **values: object) -> str:
        """Put values in place of `{{name}}`; they are taken as they are.

        Raises:
            KeyError: A name has no value.
        """
        return PLACEHOLDER.sub(lambda found: str(values[found[1]]), self.text).strip()


def read_prompt(name: str, language: str = "") -> Prompt:
    """Read a prompt, as `describe_v1`: that of a language where there is one, else the common one.

    Raises:
        InputError: There is no such file.
    """
    for file in (PROMPTS / f"{name}.{language}.txt", PROMPTS / f"{name}.txt"):
        if file.is_file():
            return Prompt(file.stem, file.read_text(encoding="utf-8"))
    raise InputError(f"there is no prompt {PROMPTS / name!s}.txt")


@dataclass(frozen=True)
class Ask:
    """One question."""

    prompt: str
    """`Prompt.version`."""
    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer. None: it is text."""
    sample: int = 0
    """Which of several answers to one question; added to the seed."""
    temperature: float | None = None
    """None: that of the config."""
    max_tokens: int | None = None
    """None: that of the config."""


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    text: str
    """Without thinking."""
    value: Any = None
    """By the schema, where there was one."""
    problem: str = ""
    """Why it is of no use: `refused`, `truncated`, `empty`, `not by its schema`, `rejected` (the
    server does not take the question) or `unanswered`. Empty: it is."""
    model: str = ""
    """That answered."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_reasks: int = 0

    @property
    def is_usable(self) -> bool:
        """Whether it can be taken."""
        return not self.problem


@dataclass(frozen=True)
class _Said:
    """A server's answer to one request, as it is kept."""

    text: str
    finish_reason: str
    refusal: str
    model: str
    prompt_tokens: int
    completion_tokens: int


class _Cache:
    """Answers by the digest of their request."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._store = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._store.execute("PRAGMA journal_mode=WAL")
        self._store.execute("CREATE TABLE IF NOT EXISTS said (key TEXT PRIMARY KEY, value TEXT)")

    def get(self, key: str) -> _Said | None:
        with self._lock:
            found = self._store.execute("SELECT value FROM said WHERE key = ?", (key,)).fetchone()
        return None if found is None else _Said(**json.loads(found[0]))

    def put(self, key: str, said: _Said) -> None:
        with self._lock:
            self._store.execute("REPLACE INTO said VALUES (?, ?)", (key, json.dumps(asdict(said))))

    def close(self) -> None:
        with self._lock:
            self._store.close()


class LLM:
    """An endpoint that is asked; `with closing(LLM(...))` ends its threads."""

    def __init__(self, cfg: LLMConfig, cache: Path) -> None:
        """Open the endpoint and the answers that are known.

        Args:
            cfg: Where and how.
            cache: Directory of the answers; several pipelines may share one, one after the other.

        Raises:
            InputError: The package is missing, there is no endpoint, or it serves something else.
            ServersUnavailable: It is away.
        """
        self._cfg = cfg
        self._client = _client(cfg)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._num_answered = self._num_rejected = 0
        self.model = cfg.model or _only_model(cfg, self._client)
        self._cache = _Cache(cache / CACHE)
        self._threads = ThreadPoolExecutor(cfg.concurrency, "ask")

    def close(self) -> None:
        """End; answers that are on their way are waited for and kept, as they may be paid for."""
        self._stopping.set()
        self._threads.shutdown(cancel_futures=True)
        self._cache.close()
        self._client.close()

    def answers(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """Ask, several at a time, and give the answers in the order of the questions.

        Raises:
            ServersUnavailable: Nothing comes back, as often as it is tried.
            InputError: The key or the model is refused, or every request is.
        """
        rest = iter(asks)
        waiting: deque[Future[Answer]] = deque()
        for ask in islice(rest, 2 * self._cfg.concurrency):
            waiting.append(self._threads.submit(self.answer, ask))
        while waiting:
            yield waiting.popleft().result()
            for ask in islice(rest, 1):
                waiting.append(self._threads.submit(self.answer, ask))

    def answer(self, ask: Ask) -> Answer:
        """Ask one question, and again where its answer is not what the schema says."""
        cfg = self._cfg
        messages = [dict(message) for message in ask.messages]
        spent = [0, 0]
        for num_reasks in range(cfg.num_reasks + 1):
            said = self._said(ask, messages, cfg.seed + ask.sample + RESEED * num_reasks)
            if isinstance(said, str):
                return Answer("", problem=said, model=self.model, num_reasks=num_reasks)
            spent = [spent[0] + said.prompt_tokens, spent[1] + said.completion_tokens]
            answer, fault = _judged(said, ask.schema)
            answer = replace(
                answer, prompt_tokens=spent[0], completion_tokens=spent[1], num_reasks=num_reasks
            )
            if not fault:
                break
            again = {"role": "user", "content": ASK_AGAIN.format(fault=fault[:300])}
            asked = [dict(message) for message in ask.messages]
            messages = [*asked, {"role": "assistant", "content": said.text[:2000]}, again]
        return answer

    def _said(self, ask: Ask, messages: list[dict[str, str]], seed: int) -> _Said | str:
        """The server's answer, known or new; or why there is none."""
        cfg = self._cfg
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": cfg.temperature if ask.temperature is None else ask.temperature,
            "top_p": cfg.top_p,
            "max_tokens": ask.max_tokens or cfg.max_tokens,
            "seed": seed,
        }
        if ask.schema is not None:
            schema = {"name": "answer", "schema": ask.schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        content = json.dumps([ask.prompt, request], sort_keys=True, default=dict)
        key = sha256(content.encode()).hexdigest()
        known = self._cache.get(key)
        if known is not None:
            return known
        said = self._tried(request)
        if isinstance(said, _Said):
            self._cache.put(key, said)
        return said

    def _tried(self, request: dict[str, Any]) -> _Said | str:
        import openai

        before = self._num_answered
        for attempt in range(self._cfg.max_tries):
            if attempt:
                wait = min(MOST_SECONDS, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                self._stopping.wait(wait)
            if self._stopping.is_set():
                raise ServersUnavailable("the asking was ended")
            try:
                said = _as_said(self._client.chat.completions.create(**request))
            except openai.APIStatusError as error:
                if not self._may_pass(error):
                    return "rejected"
                last = str(error)
            # A body that is cut, or is no JSON, or is JSON of something else.
            except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
                last = str(error) or type(error).__name__
            else:
                with self._lock:
                    self._num_answered += 1
                return said
        if self._num_answered > before:
            return "unanswered"  # and others were: it is this request
        raise ServersUnavailable(
            f"{self._cfg.base_url} gave no answer in {self._cfg.max_tries} tries, at last: {last}"
        )

    def _may_pass(self, error: Any) -> bool:
        """Whether a status may be another one later."""
        status = error.status_code
        if status in {408, 409, 425, 429} or status >= 500:
            return True
        said = " ".join(str(error).split())[:300]
        _refuse_key(self._cfg, status)
        require(
            status != 404, f"{self._cfg.base_url} serves no {self.model!r} ({said}): set llm.model"
        )
        with self._lock:
            self._num_rejected += 1
            is_setting = self._num_rejected >= REJECTED_FIRST and not self._num_answered
        require(not is_setting, f"{self._cfg.base_url} takes no request: {said}")
        return False


def _client(cfg: LLMConfig) -> Any:
    """A client of the endpoint.

    Raises:
        InputError: The package is missing, or there is no endpoint.
    """
    try:
        import openai
    except ImportError as error:
        raise InputError(
            "an LLM is asked through the package openai: pip install 'marco-train[curation]'"
        ) from error
    require(
        cfg.base_url is not None,
        "this needs an LLM: give llm.base_url=http://<host>:<port>/v1, as of "
        "recipes/serve_teacher.sh",
    )
    # A server without a key takes any, and the client insists on one.
    key = os.environ.get(cfg.key_variable) or "none"
    return openai.OpenAI(
        base_url=cfg.base_url, api_key=key, timeout=cfg.timeout_seconds, max_retries=0
    )


def check_endpoint(steps: Iterable[Step]) -> None:
    """See that the endpoint that steps will ask is given and answers, before anything is read.

    Raises:
        InputError: There is no endpoint, or it refuses the key, or has no model to choose.
        ServersUnavailable: It is away.
    """
    cfg = next((step.cfg for step in steps if isinstance(step, AskStep)), None)
    if cfg is None:
        return
    with closing(_client(cfg)) as client:
        if cfg.model is None:
            _only_model(cfg, client)
        else:
            _listed(cfg, client)


def _only_model(cfg: LLMConfig, client: Any) -> str:
    names = _listed(cfg, client)
    listed = ", ".join(names[:10]) or "none"
    require(
        len(names) == 1,
        f"{cfg.base_url} serves several models or none ({listed}): set llm.model",
    )
    return names[0]


def _listed(cfg: LLMConfig, client: Any) -> list[str]:
    """The models that the endpoint lists; none where one is named and it keeps no list."""
    import openai

    try:
        return [model.id for model in client.models.list()]
    except openai.APIStatusError as error:
        _refuse_key(cfg, error.status_code)
        if cfg.model is not None and error.status_code < 500:
            return []
        raise ServersUnavailable(f"{cfg.base_url} lists no models: {error}") from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise ServersUnavailable(f"{cfg.base_url} is away: {error}") from error


def _refuse_key(cfg: LLMConfig, status: int) -> None:
    require(
        status not in {401, 403},
        f"{cfg.base_url} refuses the key of ${cfg.key_variable} ({status}): set that variable",
    )


def _as_said(completion: Any) -> _Said:
    """Read what came back.

    Raises:
        ValueError: It is no answer.
    """
    if not getattr(completion, "choices", None):
        raise ValueError("an answer without choices")
    choice, usage = completion.choices[0], completion.usage
    return _Said(
        text=THINKING.sub("", choice.message.content or "", count=1).strip(),
        finish_reason=str(choice.finish_reason or ""),
        refusal=str(getattr(choice.message, "refusal", None) or ""),
        model=str(completion.model or ""),
        prompt_tokens=int(usage.prompt_tokens) if usage else 0,
        completion_tokens=int(usage.completion_tokens) if usage else 0,
    )


def _judged(said: _Said, schema: Mapping[str, Any] | None) -> tuple[Answer, str]:
    """Say what an answer is worth, and what is wrong where asking again may help."""
    answer = Answer(said.text, model=said.model)
    if said.refusal or said.finish_reason == "content_filter":
        return replace(answer, problem="refused"), ""
    if said.finish_reason == "length":
        return replace(answer, problem="truncated"), ""
    if schema is None:
        return replace(answer, problem="" if said.text else "empty"), ""
    try:
        value = json.loads(_without_fence(said.text))
    except (ValueError, RecursionError) as error:
        return replace(answer, problem="not by its schema"), str(error)
    fault = schema_fault(value, schema)
    if fault:
        return replace(answer, problem="not by its schema"), fault
    return replace(answer, value=value), ""


def _without_fence(text: str) -> str:
    found = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    return found[1] if found else text


def schema_fault(value: Any, schema: Mapping[str, Any]) -> str:
    """What of a value is not as a JSON schema says; empty where all is.

    Raises:
        InputError: The package that tells is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise InputError(
            "answers are checked by the package jsonschema: pip install 'marco-train[curation]'"
        ) from error
    return next((str(each.message) for each in Draft202012Validator(schema).iter_errors(value)), "")


@dataclass(frozen=True)
class AskStep:
    """A step that asks an LLM about each row, and makes of the answers what comes out."""

    name: str
    cfg: LLMConfig
    cache: Path
    """Directory of the known answers."""
    ask: Callable[[Row], Sequence[Ask]]
    """The questions about a row; none, and it is taken without an answer."""
    take: Callable[[Row, list[Answer]], Outcome | Iterable[Outcome]]
    """What comes out, of a row and the answers to its questions in their order."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Digests of the prompts, by name."""
    about: Any = None
    """What else it depends on, as JSON."""
    calls_per_row: float = 1
    prompt_tokens_per_call: float = 400
    completion_tokens_per_call: float = 300

    def identity(self) -> Any:
        """Of the model, the sampling and the prompts."""
        cfg = self.cfg
        sampling = [cfg.temperature, cfg.top_p, cfg.max_tokens, cfg.seed, cfg.num_reasks]
        return [cfg.model, sampling, dict(self.prompts), self.about]

    def plan(self, rows: float) -> Cost:
        """Estimate calls, tokens and time."""
        calls = rows * self.calls_per_row
        asked, answered = (
            calls * self.prompt_tokens_per_call,
            calls * self.completion_tokens_per_call,
        )
        seconds = answered / self.cfg.tokens_per_second
        return Cost(
            rows,
            llm_calls=calls,
            prompt_tokens=asked,
            completion_tokens=answered,
            seconds=seconds,
        )

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Open the endpoint.

        Raises:
            InputError: It serves another model than it did to earlier shards.
        """
        with closing(LLM(self.cfg, self.cache)) as llm:
            known = scratch / "model.json"
            served = json.loads(known.read_text()) if known.is_file() else llm.model
            require(
                served == llm.model,
                f"{self.cfg.base_url} serves {llm.model!r}, and earlier rows of {self.name} were "
                f"answered by {served!r}: set llm.model={llm.model!r} to redo them",
            )
            with replaces(known) as partial:
                partial.write_text(json.dumps(llm.model))

            def transform(shard: Shard) -> Iterator[Outcome]:
                questions = [self.ask(row) for row in shard.rows]
                answers = llm.answers(ask for asks in questions for ask in asks)
                for row, asks in zip(shard.rows, questions, strict=True):
                    given = list(islice(answers, len(asks)))
                    yield from _spent(given, language_of(row))
                    found = self.take(row, given)
                    yield from outcomes_of(found)

            yield transform


def _spent(answers: Sequence[Answer], language: str) -> Iterator[Counted]:
    """Count what answers took, and what became of them."""
    for answer in answers:
        yield Counted("llm calls", 1 + answer.num_reasks, language)
        yield Counted("prompt tokens", answer.prompt_tokens, language)
        yield Counted("completion tokens", answer.completion_tokens, language)
        yield Counted(f"answered by {answer.model}", 1, language)
        if answer.num_reasks:
            yield Counted("asked again", answer.num_reasks, language)
        if answer.problem:
            yield Counted(f"answers {answer.problem}", 1, language)
