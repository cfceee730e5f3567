"""TRL's side of `opd.py`; runs in an environment of its own, which has no marco_train.

    PYTHON scripts/bench/trl_side.py TASK.json OUT.json

The trainer is TRL's `DistillationTrainer`: reverse KL over the whole vocabulary on the student's
own samples, which TRL recommends over `GKDTrainer` for such runs. It has no number of responses a
prompt, so prompts are repeated. Nothing is logged or saved.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ends, and how many tokens TRL has counted until then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.parts: dict[str, list[float]] = {"sample": [], "score": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the first step."""
        self.ends.append(time.perf_counter())
        self.tokens.append(int(state.num_input_tokens_seen))
        for seconds in self.parts.values():
            seconds.append(0.0)

    # After the update: all that TRL does lies between two of these.
    on_step_end = on_train_begin

    def timed(self, part: str, call: Any, counts: Callable[..., bool]) -> Any:
        """Wrap a method whose seconds are added to a part of the step that is being made."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if counts(*args):
                self.parts[part][-1] += time.perf_counter() - began
            return result

        return wrapped


def build_trainer(task: dict[str, Any], clock: Clock) -> Any:
    """Make TRL's trainer of the task's models and prompts."""
    directory = Path(task["directory"])
    student = AutoModelForCausalLM.from_pretrained(
        directory / "student",
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=task["experts"],
    )
    teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        directory / "tokenizer", padding_side="left", truncation_side="left"
    )
    prompts = json.loads((directory / "prompts.json").read_text())
    rows = [{"prompt": text} for text in prompts for _ in range(task["responses"])]
    optim = task["optim"]
    config = DistillationConfig(
        output_dir=str(directory / "trl"),
        max_steps=task["warm_ups"] + task["steps"],
        per_device_train_batch_size=task["batch"] * task["responses"] // task["microbatches"],
        gradient_accumulation_steps=task["microbatches"],
        max_completion_length=task["max_response_length"],
        beta=1.0,
        temperature=1.0,
        learning_rate=optim["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=optim["beta1"],
        adam_beta2=optim["beta2"],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["clip_norm"],
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=task["recompute"],
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )


def padded(sequences: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of sequences, filled up to the longest on one side."""
    longest = max(map(len, sequences))
    ids, masks = [], []
    for sequence in sequences:
        fill, ones = [0] * (longest - len(sequence)), [1] * len(sequence)
        ids.append(fill + sequence if left else sequence + fill)
        masks.append(fill + ones if left else ones + fill)
    return torch.tensor(ids), torch.tensor(masks)


def check(trainer: Any, directory: Path) -> dict[str, Any]:
    """Loss and gradient norm of given sequences, through the trainer's own loss."""
    sequences = json.loads((directory / "check.json").read_text())
    texts = [sequence["text"] for sequence in sequences]
    prompts = trainer.processing_class(text=texts)["input_ids"]
    prompt_ids, prompt_mask = padded(prompts, left=True)
    completion_ids, completion_mask = padded([s["response"] for s in sequences], left=False)
    trainer.model.train()
    loss = trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "num_items_in_batch": completion_mask.sum(),
        },
    )
    loss.backward()
    grads = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    return {"prompts": prompts, "kl": loss.item(), "grad_norm": torch.stack(grads).norm().item()}


def train(trainer: Any, clock: Clock, warm_ups: int) -> dict[str, Any]:
    """Make all steps; seconds and tokens of each, but for the first ones."""
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    # The two methods that sample and that run a backbone, the student's or the teacher's.
    trainer._generate_single_turn = clock.timed(
        "sample", trainer._generate_single_turn, lambda *_: True
    )
    trainer._get_last_hidden_state = clock.timed(
        "score", trainer._get_last_hidden_state, lambda model, *_: model is teacher
    )
    trainer.train()
    seconds = [end - start for start, end in zip(clock.ends[:-1], clock.ends[1:], strict=True)]
    tokens = [end - start for start, end in zip(clock.tokens[:-1], clock.tokens[1:], strict=True)]
    parts = {part: spent[:-1] for part, spent in clock.parts.items()}
    parts["train"] = [
        whole - sum(others) for whole, *others in zip(seconds, *parts.values(), strict=True)
    ]
    return {
        "seconds": seconds[warm_ups:],
        "tokens": tokens[warm_ups:],
        "parts": {part: spent[warm_ups:] for part, spent in parts.items()},
    }


def main() -> None:
    """Do the task and write what was found."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = json.loads(Path(sys.argv[1]).read_text())
    clock = Clock()
    trainer = build_trainer(task, clock)
    if task["check"]:
        result = check(trainer, Path(task["directory"]))
    else:
        result = train(trainer, clock, task["warm_ups"])
    names = ("trl", "transformers", "torch")
    result["version"] = ", ".join(f"{name} {version(name)}" for name in names)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
