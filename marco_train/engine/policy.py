"""The model being trained: weights, optimizer and schedule in a DeepSpeed engine."""

import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import deepspeed
import torch

from marco_train.checkpoint import StateSource, TrainingState
from marco_train.config.model import ModelConfig
from marco_train.config.optim import OptimConfig
from marco_train.config.parallel import ParallelConfig
from marco_train.distributed import device, limit_waits, reduce_sums, world_size
from marco_train.engine.expert_groups import mark_experts
from marco_train.engine.guard import NON_FINITE, SPIKE, Skipped, UpdateGuard
from marco_train.engine.optim import LearningRate, build_schedule, parameter_groups
from marco_train.engine.optimizer_state import OptimizerState
from marco_train.engine.routing import UpdateRouting
from marco_train.engine.student import Student, layout_of, load_student, routing_of
from marco_train.engine.zero import deepspeed_config
from marco_train.errors import InputError
from marco_train.metrics import Metrics, MetricSums
from marco_train.models.hf_io import save_model
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.types import LossFn, Microbatch


class Policy(Student):
    """A model, its optimizer and its schedule; `train_step` makes one update."""

    def __init__(
        self,
        model: Qwen3Moe,
        model_cfg: ModelConfig,
        optim: OptimConfig,
        parallel: ParallelConfig,
        schedule_steps: int,
        chat_template: str,
    ) -> None:
        self._tokenizer_dir = model_cfg.tokenizer
        self._chat_template = chat_template
        self._optim = optim
        self._learning_rate: LearningRate = build_schedule(optim, schedule_steps)
        self.schedule_steps = schedule_steps
        self.num_updates = 0
        model.recompute = parallel.recompute
        model.set_dispatch(parallel.dispatch)
        mark_experts(model, parallel.expert_parallel_size)
        adamw = torch.optim.AdamW(
            parameter_groups(model, optim.weight_decay, parallel.expert_parallel_size),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,  # the default makes a second copy of a moment in each update
        )
        with redirect_stdout(StringIO()):  # stage 1 in bfloat16 prints the memory in use, ten times
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw,
                config=deepspeed_config(optim, parallel, model_cfg.dtype),
            )
        limit_waits()
        self._state = OptimizerState(self._optimizer, parallel.offload_while_sampling)
        self.guard = UpdateGuard(optim, adamw, lambda: float(self._optimizer._global_grad_norm))
        self.skipped: Skipped | None = None
        """What is known of the last update, where it was not made."""
        super().__init__(self._engine.module, self._engine)

    @property
    def learning_rate(self) -> float:
        """Rate of the coming update."""
        return self._learning_rate(self.num_updates)

    def train_step(self, microbatches: Sequence[Microbatch], loss_fn: LossFn) -> Metrics:
        """Make one update from this rank's microbatches of the global batch.

        Every rank passes the same number of microbatches, empty ones included. Where the loss or
        the gradient is not finite, or a spike, weights and optimizer stay as they were; the update
        counts as made, and `skipped` tells of it.

        Returns:
            What was measured, over all ranks, but for what is not finite.

        Raises:
            InputError: No token of the global batch is to be learnt.

        After an error this policy is for no further update: gradients of the failed one may lie in
        DeepSpeed's buffers, and stage 2 refuses any after a backward pass that did not end.
        """
        self._engine.train()
        self.guard.begin()
        self._state.reload_gradients()
        # Every loss token of the global batch weighs the same, whichever rank or microbatch
        # holds it.
        num_tokens, num_inputs = reduce_sums(
            [
                sum(mb.num_loss_tokens for mb in microbatches),
                sum(mb.num_tokens for mb in microbatches),
            ]
        )
        if num_tokens == 0:
            # A loader hands over no batch without a token to learn, so the scores are missing.
            raise InputError(
                f"update {self.num_updates}: no token of the global batch is to be learnt: the "
                "teacher gave no usable score for any of its responses; look at its servers"
            )
        totals = MetricSums()
        routers = UpdateRouting(self._optim, num_inputs)
        for microbatch in microbatches:
            layout, on_device = layout_of(microbatch), microbatch.to(device())
            routing = routing_of(on_device)
            output = loss_fn(self.forward(on_device, layout, routing), on_device)
            loss = output.loss / num_tokens + routers.loss(routing, microbatch.num_tokens)
            self.guard.watch(loss, microbatch)
            # DeepSpeed averages gradients over ranks; undo that.
            self._engine.backward(loss * world_size(), scale_wrt_gas=False)
            totals.add(output, on_device)
        metrics, of_routers = totals.mean_beside(num_tokens, routers.sums)
        metrics |= routers.metrics(of_routers)
        self.guard.judge_loss(metrics)
        metrics |= {"data/num_loss_tokens": num_tokens, "data/num_tokens": num_inputs}
        metrics["optim/lr"] = self.learning_rate
        metrics["optim/grad_norm"] = self._update()
        for name in (NON_FINITE, SPIKE):
            metrics[name] = float(self.skipped is not None and self.skipped.metric == name)
        metrics |= self._state.offload()
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _update(self) -> float:
        """Clip, step unless the guard withholds it, and zero the gradients.

        Returns:
            The global gradient norm before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        with self._state.lock:  # a checkpoint may still be copied
            self._state.reload()
            self._engine.step()  # where the norm is not finite, it makes none and asks nobody
        grad_norm = self.guard.judge_gradient()
        self.skipped = self.guard.end(self.num_updates)
        self.num_updates += 1
        return grad_norm

    def export(self, path: Path) -> None:
        """Write a Hugging Face directory with the tokenizer; all ranks take part."""
        save_model(self.model, path, self._tokenizer_dir, self._chat_template)

    def state(self) -> TrainingState:
        """What this rank's share of the optimizer holds; the weights are its masters, rounded."""
        return self._state.state(self.model)

    def load_state(self, source: StateSource, num_updates: int) -> None:
        """Take up the state of a policy of as many parameters on any ranks; all ranks take part."""
        self._state.load(self.model, source)
        self.num_updates = num_updates


def build_policy(
    model_cfg: ModelConfig,
    optim: OptimConfig,
    parallel: ParallelConfig,
    schedule_steps: int,
    seed: int,
    chat_template: str,
) -> Policy:
    """Load or initialise the student and give it an optimizer.

    Args:
        model_cfg: Which weights.
        optim: How they are updated.
        parallel: How they are spread over the ranks.
        schedule_steps: Updates that the learning rate's course spans.
        seed: Draws random weights, where none are loaded.
        chat_template: What the run renders conversations with; exports carry it.

    Raises:
        InputError: The weights are not those the config describes, or cannot be shared over
            the ranks; before the model is built.
    """
    model = load_student(model_cfg, parallel, seed)
    return Policy(model, model_cfg, optim, parallel, schedule_steps, chat_template)
