"""A teacher in this process: any causal language model of transformers, frozen.

Legend: B rollouts of a batch, L longest of them, R tokens of a response, V vocabulary, D width.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from marco_train.config.teacher import HFTeacherConfig
from marco_train.distributed import device
from marco_train.errors import InputError
from marco_train.models.probe import probe_ids
from marco_train.models.weights import name_first, torch_dtype
from marco_train.teachers.base import ScoreSpec, Teacher, head_for_student, scores_from_hidden
from marco_train.teachers.identity import memory_identity
from marco_train.types import Rollout, ScoredRollout

# Nats by which hidden states times head may miss the model's own log-probabilities.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
PROBE_LENGTH = 16


def load_whole(path: str, dtype: torch.dtype) -> Any:
    """Load a causal language model of transformers, which draws at random what a checkpoint lacks.

    Raises:
        InputError: Names the first ten weights that are missing, unknown, misshapen or could not be
            converted; or the checkpoint cannot be read at all.
    """
    # Seconds to import.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _load_report() as report:
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
            )
        except (
            ImportError,
            KeyError,
            OSError,
            RuntimeError,
            SafetensorError,
            StrictDataclassError,
            ValueError,
        ) as error:
            rows = (line.split("|") for line in "".join(report).splitlines())
            unconverted = [row[0].strip() for row in rows if len(row) > 1 and "CONV" in row[1]]
            named = f" ({name_first(unconverted)})" if unconverted else ""
            reason = " ".join(str(error).split())
            raise InputError(
                f"teacher {path}: transformers cannot load it{named}; it says: {reason}"
            ) from error
    mistakes = {
        "are missing": sorted(found["missing_keys"]),
        "are not of this model": sorted(found["unexpected_keys"]),
        "have another shape than config.json says": [
            f"{name} {list(stored)}, not {list(expected)}"
            for name, stored, expected in sorted(found["mismatched_keys"])
        ],
    }
    said = [f"{len(bad)} {what}: {name_first(bad)}" for what, bad in mistakes.items() if bad]
    if said:
        raise InputError(
            f"teacher {path}: its weights do not fit its config.json, and what is missing would be "
            f"drawn at random; {'; '.join(said)}"
        )
    return model


@contextmanager
def _load_report() -> Iterator[list[str]]:
    """Collect the table that transformers would print of a checkpoint that does not fit."""
    report: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        report.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield report
    finally:
        logger.removeFilter(keep)


class HFTeacher(Teacher):
    """Scores this rank's rollouts with a whole copy of the teacher."""

    def __init__(self, cfg: HFTeacherConfig, spec: ScoreSpec) -> None:
        """Load a teacher whole.

        Raises:
            InputError: Names what is missing, unknown, misshapen or not finite, or what of it
                differs between ranks.
        """
        dtype = torch_dtype(cfg.dtype)
        model = load_whole(cfg.path, dtype)
        self._model = model.to(device()).eval().requires_grad_(False)
        self._spec = spec
        self._max_tokens = cfg.max_tokens_per_batch
        self.identity = memory_identity(cfg, self._model.state_dict().items())
        head: Tensor = self._model.get_output_embeddings().weight
        self._check_head(head, cfg.path, HEAD_TOLERANCE[dtype])
        self.head: Tensor = head_for_student(head, spec, cfg.stop_id)

    @torch.inference_mode()
    def _check_head(self, head: Tensor, path: str, tolerance: float) -> None:
        """Refuse a model whose logits are more than hidden states times head."""
        probe = torch.tensor([probe_ids(PROBE_LENGTH, len(head))], device=device())
        theirs = self._model(input_ids=probe).logits[0].float().log_softmax(-1)
        ours = (self._hidden(probe, torch.ones_like(probe))[0] @ head.T).float()
        difference = float((ours.log_softmax(-1) - theirs).abs().max())
        if not difference <= tolerance:
            raise InputError(
                f"teacher {path}: hidden states times head differ from the model's own "
                f"log-probabilities by {difference:.3g} nats (bound {tolerance}); its head has a "
                "bias or its logits are transformed, which is not supported"
            )

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, L, D] after the final norm."""
        decoder = self._model.base_model
        found: Tensor = decoder(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return found

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order."""
        scored: dict[int, ScoredRollout] = {}
        for members in self._batches(rollouts):
            batch = [rollouts[i] for i in members]
            for i, hidden in zip(members, self._predicting_states(batch), strict=True):
                scored[i] = self._scores(rollouts[i], hidden)
        return [scored[i] for i in range(len(rollouts))]

    def _batches(self, rollouts: Sequence[Rollout]) -> Iterator[list[int]]:
        """Group rollouts of similar length under the budget of padded tokens."""
        members: list[int] = []
        for i in sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].input_ids)):
            longest = len(rollouts[i].input_ids)
            if members and longest * (len(members) + 1) > self._max_tokens:
                yield members
                members = []
            members.append(i)
        if members:
            yield members

    def _predicting_states(self, batch: Sequence[Rollout]) -> Iterator[Tensor]:
        """Yield the hidden states [R, D] that predict each response."""
        longest = max(len(r.input_ids) for r in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, rollout in enumerate(batch):
            ids = rollout.input_ids
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        hidden = self._hidden(input_ids.to(device()), mask.to(device()))
        for row, rollout in enumerate(batch):
            yield hidden[row, rollout.predicting]

    def _scores(self, rollout: Rollout, hidden: Tensor) -> ScoredRollout:
        return ScoredRollout(rollout, scores_from_hidden(rollout, hidden, self.head, self._spec))
