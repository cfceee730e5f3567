"""A teacher behind servers of vLLM: token ids go out, log-probabilities come back.

    Rollout -request-> [server, server, ...] -answer, checked-> TokenScores | TopKScores

A rollout is asked for as soon as it is sampled, so that scoring overlaps sampling. Every sampling
field is sent, since a server fills the others in from the model's generation_config.json. A server
that scores given token ids (vLLM on a GPU) answers with an array of the response's places alone;
another one with JSON of every place.

Legend: R tokens of a response, K tokens that are told apart.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import VLLMServerTeacherConfig
from marco_train.distributed import is_main, reduce_sums
from marco_train.errors import (
    InputError,
    RejectedError,
    UntrustedServerError,
    UnusableAnswerError,
    require,
)
from marco_train.inference import protocol
from marco_train.inference.engine import neutral_sampling
from marco_train.inference.pool import SaveEarly, Server, ServerPool
from marco_train.models.agreement import spread_of
from marco_train.models.probe import probe_ids
from marco_train.teachers.base import (
    ScoreSpec,
    Submitted,
    Teacher,
    answer_bound,
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
        self, cfg: VLLMServerTeacherConfig, spec: ScoreSpec, save_early: SaveEarly
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
        self._cfg = cfg
        self._spec = spec
        self._model: str | None = None  # the name under which all servers serve it
        self._probe_scores: Tensor | None = None  # what the first server said of the probe
        self._scores_given: dict[str, bool] = {}  # by server; whether it scores given token ids
        self._answer_bound = answer_bound(cfg)
        self._is_open = False
        self._pool = ServerPool(cfg.servers, "teacher", self._health_check, save_early)
        try:
            self._pool.check(self._pool.servers)
        except BaseException:
            self._pool.close()
            raise
        self._is_open = True
        self.identity = files_identity(cfg, self._model)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Ask for all rollouts, and wait for their answers; every rank takes part."""
        return self.collect(self.submit(rollouts))

    def submit(self, rollouts: Iterable[Rollout]) -> Submitted:
        """Ask for each rollout as it comes, of servers that have scored the probe as before.

        A server may have been started again with other weights, between two requests.
        """
        self._pool.check_again()
        asked_at = time.perf_counter()
        pairs = [(each, self._pool.submit(partial(self._score, each))) for each in rollouts]
        return Submitted([r for r, _ in pairs], (asked_at, [future for _, future in pairs]))

    def collect(self, submitted: Submitted) -> list[ScoredRollout]:
        """Wait for all answers; every rank takes part.

        Raises:
            ServersUnavailable: No server has answered for long.
            InputError: A server serves another model, refuses a request, or too many rollouts had
                no usable score.
        """
        asked_at, futures = submitted.asked or self.submit(submitted.rollouts).asked
        list(self._pool.as_answered(futures, may_reject=True))
        scored = []
        for rollout, future in zip(submitted.rollouts, futures, strict=True):
            try:
                scored.append(ScoredRollout(rollout, future.result()))
            except RejectedError as error:
                log_line(f"left out a rollout of {rollout.prompt.source}: {error}")
        num_rejected = len(futures) - len(scored)
        self._pool.counts += Counter(
            rejected=num_rejected,
            missing_tokens=sum(int((~known_places(s.scores)).sum()) for s in scored),
            milliseconds=int(1e3 * (time.perf_counter() - asked_at)),
        )
        all_rejected, all_asked = reduce_sums([num_rejected, len(futures)])
        share, bound = all_rejected / max(1.0, all_asked), self._cfg.servers.max_rejected
        require(
            share <= bound,
            f"{all_rejected:.0f} of {all_asked:.0f} rollouts had no usable score ({share:.1%}, "
            f"more than teacher.servers.max_rejected {bound:.1%}); the last one: "
            f"{self._pool.last_error}",
        )
        return scored

    def take_counts(self) -> Counter[str]:
        """Rejected rollouts, missing tokens, repeated requests and milliseconds of scoring."""
        counts, self._pool.counts = self._pool.counts, Counter()
        return counts

    def close(self) -> None:
        """Drop the connections."""
        self._pool.close()

    async def _health_check(self, server: Server) -> None:
        """Check a server before its first answer, and when it was away.

        Raises:
            InputError: It serves another model than the others or than before; or, while the
                teacher is opened, it says of the probe what others do not.
            UntrustedServerError: It does so later, as one that came back while it still loads.
        """
        listed = await self._pool.ask(server, "/v1/models")
        served = protocol.served_model(server.url, listed, self._spec.max_length + 1)
        self._model = self._model or served
        require(
            served == self._model,
            f"{server.url} serves {served!r}, and the teacher is {self._model!r}: give "
            "teacher.servers.urls servers of one model, under one --served-model-name",
        )
        probe = probe_ids(PROBE_LENGTH, self._spec.vocab_size)
        await self._see_whether_it_scores_given(server, probe)
        found = await self._score_tokens(server, probe, 1)
        if self._probe_scores is None:
            self._probe_scores = found
        apart = spread_of(found, self._probe_scores)
        if not apart.within(self._answer_bound):
            said = (
                f"{server.url} scores a probe {apart} away from what the teacher said at first "
                f"(bound: {self._answer_bound}): its weights are others, or broken"
            )
            raise UntrustedServerError(said) if self._is_open else InputError(said)

    async def _see_whether_it_scores_given(self, server: Server, probe: list[int]) -> None:
        """Find out by asking; likeliest tokens of the student cannot be scored otherwise."""
        topk = self._spec.objective is Objective.topk
        if topk and self._spec.top_k_source is TopKSource.teacher:
            return
        num_ids = self._spec.top_k if topk else 1
        rows = [list(range(num_ids))] * (len(probe) - 1)
        try:
            await self._pool.ask(server, *protocol.scoring(probe, 1, rows, None))
            self._scores_given[server.url] = True
        except InputError as error:
            if topk:
                raise InputError(
                    f"{server.url} does not score given token ids ({error}): vLLM does on a GPU, "
                    "started with --enable-scale-out and --max-logprobs -1; else set "
                    "stage.top_k_source=teacher"
                ) from error
            if is_main() and server.url not in self._scores_given:
                log_line(f"{server.url} does not score given token ids: its answers are JSON")
            self._scores_given[server.url] = False

    async def _score(self, rollout: Rollout, server: Server) -> Scores:
        """Have a server score one rollout; an empty response has nothing to ask for."""
        objective, top_k = self._spec.objective, self._spec.top_k
        if not rollout.response_ids:
            none = torch.zeros(0, top_k)
            topk = TopKScores(none.long(), none, none.sum(1))
            return TokenScores(none.sum(1)) if objective is Objective.sampled else topk
        first = len(rollout.prompt.input_ids)
        swap = partial(ids_for_teacher, spec=self._spec, stop_id=self._cfg.stop_id)
        ids = rollout.prompt.input_ids + swap(rollout.response_ids)
        if objective is Objective.sampled:
            return TokenScores(_refuse_gaps(await self._score_tokens(server, ids, first)))
        if self._spec.top_k_source is TopKSource.teacher:
            choice = await self._complete(server, ids, top_k)
            named, logprobs = protocol.read_likeliest(choice, ids, first, top_k)
            named = swap_ids(named, self._spec.stop_id, self._cfg.stop_id)
            return TopKScores(named, _refuse_gaps(logprobs), torch.ones(len(named)))
        given = [swap(row) for row in rollout.topk_ids]
        # The likeliest are for the overlap.
        answer = await self._pool.ask(server, *protocol.scoring(ids, first, given, top_k))
        likeliest, _ = protocol.read_likeliest(answer, ids, first, top_k)
        found = protocol.read_given(answer, *likeliest.shape)
        overlap = overlap_with(likeliest, torch.tensor(given))
        return TopKScores(torch.tensor(rollout.topk_ids), _refuse_gaps(found), overlap)

    async def _score_tokens(self, server: Server, ids: list[int], first: int) -> Tensor:
        """Have a server score the tokens from `first` on, [R]; not a number where it has none."""
        if not self._scores_given.get(server.url, False):
            return protocol.read_tokens(await self._complete(server, ids, 0), ids, first)
        answer = await self._pool.ask(server, *protocol.scoring(ids, first, None, None))
        return protocol.read_given(answer, len(ids) - first, 1)[:, 0]

    async def _complete(self, server: Server, ids: list[int], num_topk: int) -> Any:
        """Ask for log-probabilities of ids and of the likeliest tokens in each place."""
        wanted = {"model": self._model, "prompt": ids, "prompt_logprobs": num_topk}
        body = neutral_sampling(max_tokens=1) | wanted | {"return_token_ids": True}
        return (await self._pool.ask(server, "/v1/completions", body))["choices"][0]


def _refuse_gaps(logprobs: Tensor) -> Tensor:
    """Let a few places without a number pass, [R, ...]; they are left out of the update."""
    known = logprobs.isfinite().reshape(len(logprobs), -1).all(1)
    missing = len(known) - int(known.sum())
    if missing > MAX_MISSING * len(known):
        raise UnusableAnswerError(f"{missing} of {len(known)} places have no number")
    return logprobs
