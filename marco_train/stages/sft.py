"""Supervised fine-tuning."""

from marco_train.config import TrainConfig
from marco_train.config.resumption import schedule_steps
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import SFTLoader
from marco_train.engine.policy import build_policy
from marco_train.evaluation.held_out import evaluate
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.models.hf_io import student_architecture
from marco_train.run import Run, due
from marco_train.teachers.vocab import check_student_vocabulary


def run_sft(cfg: TrainConfig) -> None:
    """Fine-tune on conversations: packed sequences, loss on assistant tokens only."""
    check_student_vocabulary(cfg.model)
    tokenizer = load_tokenizer(cfg.model)
    student_architecture(cfg)  # refuses files that are no student, or of too few positions
    train_data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    held_out = train_data.held_out()
    policy = build_policy(
        cfg.model,
        cfg.optim,
        cfg.parallel,
        schedule_steps(cfg, train_data.epoch_rows),
        cfg.seed,
        tokenizer.chat_template,
    )
    # A fresh run, or the last checkpoint's.
    run = Run.open(cfg, policy, train_data, epoch_rows=train_data.epoch_rows)
    train_data.log_plan(train_data.num_steps)

    for step in run.steps(train_data):
        microbatches = next(train_data)  # this rank's share of the global batch
        metrics = policy.train_step(microbatches, cross_entropy)
        if due(step, cfg.stage.eval_every):
            metrics |= evaluate(policy, held_out, cross_entropy)
        run.log(step, metrics | train_data.metrics())
        run.save_if_due(step)

    train_data.log_epochs()
    run.finish()  # exports Hugging Face weights with the tokenizer
