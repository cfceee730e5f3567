"""TRL's side of `opd.py` and `sft.py`; runs in an environment of its own, which has no marco_train.

For `opd.py` the trainer is TRL's `DistillationTrainer`: reverse KL over the whole vocabulary on the
student's own samples, which TRL recommends over `GKDTrainer` for such runs. It has no number of
responses a prompt, so prompts are repeated. For `sft.py` it is `SFTTrainer`. Nothing is saved.
"""

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import do_job, linux_bytes
from torch import Tensor, tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ends, how many tokens TRL has counted until then, and its parts."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int]] = []
        self.parts: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the first step."""
        self.ends.append((time.perf_counter(), int(state.num_input_tokens_seen)))
        self.parts.append({"time/sample": 0.0, "time/score": 0.0})

    # After the update: all that TRL does lies between two of these.
    on_step_end = on_train_begin

    def timed(self, part: str, call: Any, counts: Callable[..., bool]) -> Any:
        """Wrap a method whose seconds are added to a part of the step that is being made."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if counts(*args):
                self.parts[-1][part] += time.perf_counter() - began
            return result

        return wrapped

    def steps(self) -> list[dict[str, float]]:
        """What each step took, by the names that our runs log it by."""
        found = []
        pairs = zip(pairwise(self.ends), self.parts, strict=False)  # the last begins no step
        for ((began, before), (ended, after)), parts in pairs:
            train = ended - began - sum(parts.values())
            whole = {"time/step": ended - began, "data/num_tokens": after - before}
            found.append(whole | parts | {"time/train": train})
        return found


def build_trainer(setup: dict[str, Any], output_dir: str, clock: Clock) -> Any:
    """Make TRL's trainer of the models and prompts of `trl_case`."""
    loaded = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    student = AutoModelForCausalLM.from_pretrained(
        setup["student"], **loaded, experts_implementation=setup["experts"]
    )
    rows = [{"prompt": text} for text in setup["texts"] for _ in range(setup["responses"])]
    batch, optim = setup["batch"] * setup["responses"], setup["optim"]
    config = DistillationConfig(
        output_dir=output_dir,
        max_steps=len(rows) // batch,
        per_device_train_batch_size=batch // setup["microbatches"],
        gradient_accumulation_steps=setup["microbatches"],
        max_completion_length=setup["max_response_length"],
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
        gradient_checkpointing=setup["recompute"],
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return DistillationTrainer(
        model=student,
        teacher_model=AutoModelForCausalLM.from_pretrained(setup["teacher"], **loaded),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(
            setup["student"], padding_side="left", truncation_side="left"
        ),
        callbacks=[clock],
    )


def padded(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of sequences, filled up to the longest on one side."""
    ids = [tensor(sequence) for sequence in sequences]
    rows = (ids, [torch.ones_like(sequence) for sequence in ids])
    filled, mask = (pad_sequence(row, batch_first=True, padding_side=side) for row in rows)
    return filled, mask


def check(setup: dict[str, Any], prompts: list[str], responses: list[list[int]]) -> dict[str, Any]:
    """Job: loss and gradient norm of given responses, through the trainer's own loss."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(setup, directory, Clock())
    prompt_ids, prompt_mask = padded(trainer.processing_class(text=prompts)["input_ids"], "left")
    completion_ids, completion_mask = padded(responses, "right")
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    trainer.model.train()
    loss = trainer.compute_loss(
        trainer.model, inputs | {"num_items_in_batch": completion_mask.sum()}
    )
    loss.backward()
    # In float64: on a CPU torch's norm of 40 million float32 numbers is off by up to 3 in 1,000.
    grads = [p.grad.double().norm() for p in trainer.model.parameters() if p.grad is not None]
    names = ("trl", "transformers", "torch")
    found = {"version": ", ".join(f"{name} {version(name)}" for name in names)}
    return found | {"kl": loss.item(), "|grad|": torch.stack(grads).norm().item()}


def train(setup: dict[str, Any]) -> list[dict[str, float]]:
    """Job: make a step of every batch of prompts; each says the whole process's peak memory."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(setup, directory, clock)
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        # The two methods that sample and that run a backbone, the student's or the teacher's.
        sample, run = trainer._generate_single_turn, trainer._get_last_hidden_state
        trainer._generate_single_turn = clock.timed("time/sample", sample, lambda *_: True)
        trainer._get_last_hidden_state = clock.timed("time/score", run, lambda m, *_: m is teacher)
        trainer.train()
    return [step | {"memory/peak_gib": linux_bytes("VmHWM") / 2**30} for step in clock.steps()]


def fine_tune(setup: dict[str, Any]) -> dict[str, Any]:
    """Job: make steps of all rows with TRL's `SFTTrainer`, one epoch each.

    Returns:
        Seconds of each step, loss of the first, and the process's peak memory.
    """
    clock = Clock()
    lines = Path(setup["rows"]).read_text().splitlines()
    rows = [{"input_ids": json.loads(line)["input_ids"]} for line in lines]
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=setup["microbatch"],
            # More than there are: an epoch's last step takes the rows that are left.
            gradient_accumulation_steps=-(-len(rows) // setup["microbatch"]),
            num_train_epochs=setup["steps"],
            max_length=1024,
            packing=setup["packing"],
            gradient_checkpointing=setup["recompute"],
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                setup["model"],
                dtype=torch.float32,
                attn_implementation="sdpa",
                experts_implementation=setup["experts"],
            ),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast.from_pretrained(setup["model"]),
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": [step["time/step"] for step in clock.steps()],
        "loss": losses[0],
        "peak": linux_bytes("VmHWM"),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    do_job({"check": check, "train": train, "fine_tune": fine_tune})
