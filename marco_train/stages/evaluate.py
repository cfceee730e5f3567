"""Sampled accuracy of exported models, and their reverse KL to each teacher."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from marco_train.config import TrainConfig
from marco_train.config.architecture import read_architecture
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import check_positions, longest_sequence
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.resumption import observed
from marco_train.config.rollout import NativeRolloutConfig
from marco_train.config.teacher import TeacherConfig
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import Question, held_out_questions
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import barrier, device, is_main, rank, reduce_sums, world_size
from marco_train.errors import InputError, require
from marco_train.evaluation.accuracy import accuracy_by_category
from marco_train.evaluation.signatures import language_signatures, signature_report
from marco_train.evaluation.verifiers import check_verifier, verify
from marco_train.losses.distillation import FullReverseKL
from marco_train.models import Qwen3Moe, load_model
from marco_train.models.hf_io import (
    check_teacher_positions,
    stop_token_ids,
    stored_weights,
)
from marco_train.models.weights import torch_dtype
from marco_train.rollout.base import in_order
from marco_train.rollout.native import NativeSampler
from marco_train.run import begin, mark_finished
from marco_train.teachers.base import ScoreSpec, Teacher
from marco_train.teachers.build import build_teacher
from marco_train.teachers.preflight import check_files, check_scores, probe_rollouts
from marco_train.teachers.vocab import check_head_rows, check_vocabulary
from marco_train.tracking import format_seconds, log_line
from marco_train.types import PolicyOutput, Rollout

Answers = list[tuple[Question, Rollout, str]]


def run_evaluate(cfg: TrainConfig) -> None:
    """Sample answers of every model at temperature 1, check them, and let the teachers score them.

    Writes evaluation.json: per cent of accepted answers by category (`avg_at_n`), reverse KL to
    each teacher in nats a token, and some answers to read; and signatures.json, if asked for:
    which experts each language used.
    """
    stage: EvaluateConfig = cfg.stage
    tokenizer = load_tokenizer(cfg.model)
    measured = measured_models(cfg)
    vocab_size = check_models(cfg, tokenizer)
    questions = checked_questions(cfg, tokenizer)
    mine = questions[rank() :: world_size()]
    content = observed(cfg, digests={})
    if is_main():
        begin(cfg)
    teachers = open_teachers(cfg, vocab_size)
    report: dict[str, Any] = {
        "num_questions": len(questions),
        "num_dropped": stage.num_prompts - len(questions),  # over the limit, or control tokens
        "models": {},
        "teachers": {},
        "answers": {},
    }
    signatures: dict[str, Any] = {}

    for kind, name, path in measured:
        start = time.perf_counter()
        model = load_model(path, torch_dtype(cfg.model.dtype))
        answers = sample_answers(cfg, model, mine, tokenizer)
        found = report[kind][name] = {"avg_at_n": accuracy_of(answers)}
        if kind == "models":
            scored = [r for _, r, _ in answers if r.sample_index < stage.num_kl_responses]
            found["reverse_kl"] = {
                each: mean_reverse_kl(cfg, model, scored, teacher)
                for each, teacher in teachers.items()
            }
            if stage.signatures and model.architecture.is_moe:
                signatures[name] = signatures_of(cfg, model, scored)
        if is_main():
            report["answers"][name] = shown_answers(answers, stage.num_examples_shown)
            spent = format_seconds(time.perf_counter() - start)
            accuracy = found["avg_at_n"]["all"]
            log_line(f"{name}: avg@{stage.responses_per_prompt} {accuracy:.1f} %, {spent}")

    for teacher in teachers.values():
        teacher.close()
    if is_main():
        write_reports(cfg, report, signatures)
        mark_finished(cfg, content)
    barrier()


def measured_models(cfg: TrainConfig) -> list[tuple[str, str, str]]:
    """List what is measured: its kind, name and directory."""
    stage: EvaluateConfig = cfg.stage
    return [
        *(("models", name, path) for name, path in stage.models.items()),
        *(("teachers", name, teacher.path) for name, teacher in stage.teachers.items()),
    ]


def check_models(cfg: TrainConfig, tokenizer: Tokenizer) -> int:
    """Give the vocabulary that all models share; none is loaded.

    Raises:
        InputError: There are none, or one does not fit the others.
    """
    measured = measured_models(cfg)
    vocab_size = shared_vocabulary(measured)
    for kind, name, path in measured:
        check_model(cfg, tokenizer, vocab_size, kind, name, path)
    return vocab_size


def shared_vocabulary(measured: Sequence[tuple[str, str, str]]) -> int:
    """Tokens of the first model, which all others have to share."""
    require(bool(measured), "stage.models and stage.teachers are both empty: name a model")
    return read_architecture(measured[0][2]).vocab_size


def check_model(
    cfg: TrainConfig, tokenizer: Tokenizer, vocab_size: int, kind: str, name: str, path: str
) -> None:
    """Check the files of what is measured.

    Raises:
        InputError: It cannot be loaded, has other tokens, turns or stops, a head of another size,
            or too few positions.
    """
    found = read_architecture(path)  # our own model samples the teachers' answers too
    stored_weights(path, found)
    check_positions(cfg.stage, found.max_position_embeddings, f"{name} ({path})")
    if kind == "models":
        check_vocabulary(cfg.model.tokenizer, path, name)
        check_head_rows(vocab_size, path, name)
        return
    teacher = cfg.stage.teachers[name]
    template = (tokenizer.chat_template, vocab_size, teacher, name, tokenizer.template_kwargs)
    check_files(cfg.model.tokenizer, *template)
    check_teacher_positions(cfg.stage, teacher, name)


def checked_questions(cfg: TrainConfig, tokenizer: Tokenizer) -> list[Question]:
    """Read the held-out questions whose answers can be checked; others are left out and named.

    Raises:
        InputError: There are none.
    """
    stage: EvaluateConfig = cfg.stage
    if cfg.data.held_out is None:
        raise InputError("an evaluation asks held-out prompts: set data.held_out")
    questions = held_out_questions(
        cfg.data.held_out, stage.num_prompts, stage.max_prompt_length, tokenizer
    )
    usable, reasons = [], Counter[str]()
    for question in questions:
        try:
            check_verifier(question.verifier)
            usable.append(question)
        except InputError as error:
            reasons[f"{question.prompt.source}: {error}"] += 1
    said = [f"{count} of source {reason}" for reason, count in reasons.items()]
    require(bool(usable), f"no held-out question can be checked ({'; '.join(said)})")
    if said and is_main():
        log_line(f"left out questions that cannot be checked: {'; '.join(said)}")
    return usable


def open_teachers(cfg: TrainConfig, vocab_size: int) -> dict[str, Teacher]:
    """Open all teachers, for their hidden states, and check their numbers."""
    return {
        name: open_teacher(cfg, vocab_size, name, teacher)
        for name, teacher in cfg.stage.teachers.items()
    }


def open_teacher(
    cfg: TrainConfig, vocab_size: int, name: str, teacher_cfg: TeacherConfig
) -> Teacher:
    """Open a teacher, for its hidden states, and check its numbers.

    Raises:
        InputError: They cannot be trusted.
    """
    states = ScoreSpec(
        Objective.full,
        top_k=0,
        top_k_source=TopKSource.teacher,
        vocab_size=vocab_size,
        max_length=longest_sequence(cfg.stage),
        stop_id=stop_token_ids(cfg.model.tokenizer)[0],
    )
    teacher = build_teacher(teacher_cfg, states)
    probes = probe_rollouts(cfg.model.tokenizer, states)
    check_scores(teacher, probes, vocab_size, teacher_cfg.dtype, f"{name} ({teacher_cfg.path})")
    return teacher


def sample_answers(
    cfg: TrainConfig, model: Qwen3Moe, questions: Sequence[Question], tokenizer: Tokenizer
) -> Answers:
    """Sample every question's responses; the text ends before the stop token."""
    stage: EvaluateConfig = cfg.stage
    assert isinstance(stage.rollout, NativeRolloutConfig)  # any other was refused
    stop_ids = stop_token_ids(cfg.model.tokenizer)
    sampler = NativeSampler(
        stage.rollout,
        model,
        stop_ids,
        stage.max_response_length,
        num_topk=0,
        seed=cfg.seed,
        weight_version=0,
    )
    rollouts = in_order(sampler.sample([q.prompt for q in questions], stage.responses_per_prompt))
    by_index = {q.prompt.index: q for q in questions}
    return [
        (by_index[r.prompt.index], r, tokenizer.decode(r.response_ids, skip_special_tokens=True))
        for r in rollouts
    ]


def accuracy_of(answers: Answers) -> dict[str, float]:
    """Per cent of accepted answers by category; all ranks take part."""
    return accuracy_by_category(
        [(q.prompt.category, verify(text, q.reference, q.verifier)) for q, _, text in answers]
    )


@torch.no_grad()
def mean_reverse_kl(
    cfg: TrainConfig, model: Qwen3Moe, rollouts: Sequence[Rollout], teacher: Teacher
) -> float:
    """Exact reverse KL over the vocabulary, mean over the sampled tokens of all ranks."""
    assert teacher.head is not None
    objective = FullReverseKL(teacher.head)
    total, num_tokens = 0.0, 0
    scored = teacher.score(rollouts)
    for packed in pack_rollouts(scored, Objective.full, cfg.data.max_tokens_per_microbatch):
        microbatch = packed.to(device())
        hidden = model(microbatch.input_ids, microbatch.position_ids)
        output = objective(PolicyOutput(hidden, model.head), microbatch)  # type: ignore[arg-type]
        total += float(output.values["kl/reverse"].sum())
        num_tokens += microbatch.num_loss_tokens
    all_kl, all_tokens = reduce_sums([total, num_tokens])
    return all_kl / all_tokens


def signatures_of(cfg: TrainConfig, model: Qwen3Moe, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Which experts each language of the rollouts uses; all ranks take part."""
    texts = ((r.prompt.language, r.input_ids) for r in rollouts)
    return signature_report(language_signatures(model, texts, cfg.data.max_tokens_per_microbatch))


def shown_answers(answers: Answers, count: int) -> list[dict[str, Any]]:
    """Answers to read: one question of each category, then a second one, until there are enough."""
    turn_of_category: Counter[str] = Counter()
    turns: list[tuple[int, Question, str]] = []
    for question, rollout, answer in answers:
        if rollout.sample_index == 0:
            turns.append((turn_of_category[question.prompt.category], question, answer))
            turn_of_category[question.prompt.category] += 1
    return [
        {
            "category": question.prompt.category,
            "language": question.prompt.language,
            "prompt": question.text,
            "reference": question.reference,
            "answer": answer,
            "accepted": verify(answer, question.reference, question.verifier),
        }
        for _, question, answer in sorted(turns, key=lambda turn: turn[0])[:count]
    ]


def write_reports(cfg: TrainConfig, report: dict[str, Any], signatures: dict[str, Any]) -> None:
    """Write evaluation.json, and signatures.json where there are any."""
    directory = Path(cfg.output_dir)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (directory / "evaluation.json").write_text(text, encoding="utf-8")
    if signatures:
        (directory / "signatures.json").write_text(json.dumps(signatures))
