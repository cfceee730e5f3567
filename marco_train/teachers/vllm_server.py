"""A teacher behind servers of vLLM: token ids go out, log-probabilities come back.

    Rollout -request-> [server, server, ...] -answer, checked-> TokenScores | TopKScores

A rollout is asked for as soon as it is sampled, so that scoring overlaps sampling. Every sampling
field is sent, since a server fills the others in from the model's generation_config.json.

Legend: R tokens of a response, K tokens that are told apart.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import VLLMServerTeacherConfig
from marco_train.distributed import reduce_sums
from marco_train.errors import InputError, RejectedError, UnusableAnswerError, require
from marco_train.inference.engine import neutral_sampling
from marco_train.inference.pool import Ask, SaveEarly, ServerPool, nothing_to_save
from marco_train.inference.protocol import (
    COMPLETIONS,
    GENERATE,
    MODELS,
    ROUNDING,
    check_served,
    only_choice,
    read_array,
    read_places,
    read_tokens,
)
from marco_train.models.probe import probe_ids
from marco_train.teachers.base import (
    SAME_ANSWER,
    ScoreSpec,
    Submitted,
    Teacher,
    ids_for_teacher,
    overlap_with,
    swap_ids,
)
from marco_train.teachers.identity import files_identity
from marco_train.tracking import log_line
from marco_train.types import Rollout, ScoredRollout, Scores, TokenScores, TopKScores, known_places

# Share of a response's places without a number above which the whole rollout is left out.
MAX_MISSING = 0.1
PROBE_LENGTH = 16


class ServerTeacher(Teacher):
    """Scores this rank's rollouts over HTTP."""

    def __init__(
        self,
        cfg: VLLMServerTeacherConfig,
        spec: ScoreSpec,
        save_early: SaveEarly = nothing_to_save,
    ) -> None:
        """Wait until a server answers, and check it.

        Raises:
            InputError: Servers of different models, a window that is too short, or scores that
                they cannot give.
            ServersUnavailable: No server answered in time.
        """
        require(
            spec.objective is not Objective.full,
            "stage.objective=full needs a teacher's hidden states, which vllm_server does not "
            "give: choose sampled or topk, or another kind of teacher",
        )
        self.head = None
        self._servers = cfg.servers
        self._stop_id = cfg.stop_id
        self._spec = spec
        self._same_answer = SAME_ANSWER[cfg.dtype]
        self._model: str | None = None  # the name under which all servers serve it
        self._probe_scores: Tensor | None = None  # what the first server said of the probe
        self._checking = Lock()
        self._counts: Counter[str] = Counter()
        self._pool = pool = ServerPool(cfg.servers, "teacher", self._health_check, save_early)
        try:
            list(pool.answers([pool.submit(MODELS, None, bool, s) for s in pool.servers]))
        except BaseException:
            pool.close()
            raise
        self.identity = files_identity(cfg, self._model)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Ask for all rollouts, and wait for their answers; every rank takes part."""
        return self.collect(self.submit(rollouts))

    def submit(self, rollouts: Iterable[Rollout]) -> Submitted:
        """Ask for each rollout as it comes."""
        asked_at = time.perf_counter()
        pairs = [(rollout, self._ask(rollout)) for rollout in rollouts]
        return Submitted([r for r, _ in pairs], (asked_at, [future for _, future in pairs]))

    def collect(self, submitted: Submitted) -> list[ScoredRollout]:
        """Wait for all answers; every rank takes part.

        Raises:
            ServersUnavailable: No server has answered for long.
            InputError: A server serves another model, refuses a request, or too many rollouts had
                no usable score.
        """
        asked_at, futures = submitted.asked or self.submit(submitted.rollouts).asked
        self._pool.wait(futures)
        scored = []
        for rollout, future in zip(submitted.rollouts, futures, strict=True):
            try:
                scored.append(ScoredRollout(rollout, future.result()))
            except RejectedError as error:
                log_line(f"left out a rollout of {rollout.prompt.source}: {error}")
        num_rejected, num_asked = len(futures) - len(scored), len(futures)
        self._counts["rejected"] += num_rejected
        self._counts["missing_tokens"] += sum(int((~known_places(s.scores)).sum()) for s in scored)
        self._counts["milliseconds"] += int(1e3 * (time.perf_counter() - asked_at))
        all_rejected, all_asked = reduce_sums([num_rejected, num_asked])
        share = all_rejected / max(1.0, all_asked)
        require(
            share <= self._servers.max_rejected,
            f"{all_rejected:.0f} of {all_asked:.0f} rollouts had no usable score ({share:.1%}, "
            f"more than teacher.servers.max_rejected {self._servers.max_rejected:.1%}); the last "
            f"one: {self._pool.last_error}",
        )
        return scored

    def take_counts(self) -> Counter[str]:
        """Rejected rollouts, missing tokens, repeated requests and milliseconds of scoring."""
        counts, self._counts = self._counts, Counter()
        return counts + self._pool.take_counts()

    def close(self) -> None:
        """Drop the connections."""
        self._pool.close()

    def _health_check(self, url: str, ask: Ask) -> None:
        """Check a server before its first answer, and when it was away.

        Raises:
            InputError: It serves another model than the others or than before.
        """
        with self._checking:
            served = check_served(url, ask(MODELS, None), self._spec.max_length + 1)
            self._model = self._model or served
            require(
                served == self._model,
                f"{url} serves {served!r}, and the teacher is {self._model!r}: give "
                "teacher.servers.urls servers of one model, under one --served-model-name",
            )
            probe = probe_ids(PROBE_LENGTH, self._spec.vocab_size)
            found = read_tokens(only_choice(ask(COMPLETIONS, self._completion(probe, 0))), probe, 1)
            if self._probe_scores is None:
                self._probe_scores = found
            difference = float((found - self._probe_scores).abs().max())
            require(
                difference <= self._same_answer,
                f"{url} scores a probe {difference:.3g} nats away from what the teacher said at "
                f"first (bound {self._same_answer}): its weights are others, or broken",
            )
            if self._gives_topk_of_sampler:
                self._check_given_ids(url, ask, probe)

    @property
    def _gives_topk_of_sampler(self) -> bool:
        topk = self._spec.objective is Objective.topk
        return topk and self._spec.top_k_source is TopKSource.sampler

    def _check_given_ids(self, url: str, ask: Ask, probe: list[int]) -> None:
        """Refuse a server that does not score given token ids."""
        rows = [list(range(self._spec.top_k))] * (len(probe) - 1)
        try:
            ask(GENERATE, self._generation(probe, 1, rows))
        except InputError as error:
            raise InputError(
                f"{url} does not score given token ids ({error}): vLLM does on a GPU, started with "
                "--enable-scale-out and --max-logprobs -1; else set stage.top_k_source=teacher"
            ) from error

    def _ask(self, rollout: Rollout) -> Future[Scores]:
        """Send the request for one rollout."""
        first, top_k = len(rollout.prompt.input_ids), self._spec.top_k
        traded = partial(ids_for_teacher, spec=self._spec, stop_id=self._stop_id)
        ids = rollout.prompt.input_ids + traded(rollout.response_ids)
        if not rollout.response_ids:
            return _done(_no_scores(self._spec))
        if self._spec.objective is Objective.sampled:
            return self._pool.submit(
                COMPLETIONS,
                self._completion(ids, 0),
                lambda answer: TokenScores(
                    _refuse_gaps(read_tokens(only_choice(answer), ids, first))
                ),
            )
        if not self._gives_topk_of_sampler:
            return self._pool.submit(
                COMPLETIONS,
                self._completion(ids, top_k),
                lambda answer: self._own_topk(answer, ids, first),
            )
        wanted_ids = [traded(row) for row in rollout.topk_ids]
        return self._pool.submit(
            GENERATE,
            self._generation(ids, first, wanted_ids),
            lambda answer: self._given_topk(answer, ids, rollout, wanted_ids),
        )

    def _completion(self, ids: list[int], num_topk: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": ids,
            "prompt_logprobs": num_topk,
            "return_token_ids": True,
            **neutral_sampling(max_tokens=1),
        }

    def _generation(self, ids: list[int], first: int, asked_ids: list[list[int]]) -> dict[str, Any]:
        return {
            "token_ids": ids,
            "sampling_params": {
                "prompt_logprobs": self._spec.top_k,  # for the overlap
                "prompt_logprob_token_ids": asked_ids,
                "prompt_logprob_start": first - 1,
                **neutral_sampling(max_tokens=1),
            },
            "return_token_ids": True,
        }

    def _own_topk(self, answer: Any, ids: list[int], first: int) -> TopKScores:
        """The teacher's likeliest tokens, [R, K]."""
        choice = only_choice(answer)
        named, logprobs = _read_likeliest(choice, ids, first, self._spec.top_k)
        named = swap_ids(named, self._spec.stop_id, self._stop_id)
        return TopKScores(named, _refuse_gaps(logprobs), torch.ones(len(named)))

    def _given_topk(
        self, answer: Any, ids: list[int], rollout: Rollout, asked_ids: list[list[int]]
    ) -> TopKScores:
        """The teacher's log-probabilities of the sampler's likeliest tokens, [R, K]."""
        first, shape = len(rollout.prompt.input_ids), (len(asked_ids), self._spec.top_k)
        likeliest, _ = _read_likeliest(answer, ids, first, self._spec.top_k)
        found = torch.from_numpy(read_array(answer, "prompt_token_id_logprobs")).float()
        if found.shape != shape:
            raise UnusableAnswerError(
                f"log-probabilities of shape {list(found.shape)} for {list(shape)} given ids"
            )
        overlap = overlap_with(likeliest, torch.tensor(asked_ids))
        return TopKScores(torch.tensor(rollout.topk_ids), _refuse_gaps(found), overlap)


def _done(scores: Scores) -> Future[Scores]:
    future: Future[Scores] = Future()
    future.set_result(scores)
    return future


def _no_scores(spec: ScoreSpec) -> Scores:
    """Of an empty response."""
    if spec.objective is Objective.sampled:
        return TokenScores(torch.zeros(0))
    ids = torch.zeros(0, spec.top_k, dtype=torch.int64)
    return TopKScores(ids, torch.zeros(0, spec.top_k), torch.zeros(0))


def _read_likeliest(holder: Any, ids: list[int], first: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The K likeliest tokens from `first` on and their log-probabilities, [R, K] each."""
    named, logprobs = [], []
    for place in read_places(holder, ids, first):
        # The token that stands there comes as well, whether it is among them or not.
        best = sorted(place, key=lambda i: -place[i] if place[i] < ROUNDING else math.inf)[:top_k]
        gaps = top_k - len(best)
        named.append(best + [0] * gaps)
        logprobs.append([place[i] for i in best] + [math.nan] * gaps)
    return torch.tensor(named), torch.tensor(logprobs)


def _refuse_gaps(logprobs: Tensor) -> Tensor:
    """Let a few places without a number pass, [R, ...]; they are left out of the update."""
    known = logprobs.isfinite().reshape(len(logprobs), -1).all(1)
    missing = len(known) - int(known.sum())
    if missing > MAX_MISSING * len(known):
        raise UnusableAnswerError(f"{missing} of {len(known)} places have no number")
    return logprobs
