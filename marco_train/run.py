"""One execution of a stage: its directory, tracker, checkpoints and timers."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch.profiler import record_function

from marco_train.checkpoint import (
    BackgroundSaves,
    BestSoFar,
    Retention,
    StateSource,
    TrainingState,
    check_writable,
    checkpoint_path,
    generator_tensors,
    held,
    load_checkpoint,
    load_generators,
    read_state,
    refuse_other_shapes,
    save_checkpoint,
    set_aside_newer,
    sweep,
    verify,
)
from marco_train.config import TrainConfig
from marco_train.config.resume import ResumeChange
from marco_train.config.resumption import (
    CONTENT,
    FINISHED,
    Change,
    Continuation,
    changed_content,
    checkpoints_of,
    content_paths,
    continuation,
    describe,
    noted_content,
    observed,
    phases_of,
    plain_config,
    refuse_changes,
    said_of_allowed,
    saved_config,
)
from marco_train.config.run import OnError
from marco_train.config.stage import UntrainedStageConfig
from marco_train.content import Content, digest, with_digests
from marco_train.distributed import (
    barrier,
    gather_objects,
    is_main,
    peak_bytes,
    rank,
    reduce_maxima,
    seed_everything,
    sharing_errors,
    world_size,
)
from marco_train.errors import (
    EXIT_STATUS,
    TOLD_TO_END,
    TRY_AGAIN_LATER,
    CheckpointError,
    InputError,
    RunInterrupted,
)
from marco_train.files import link_directory, replaces
from marco_train.interruption import Interruption, Wish
from marco_train.metrics import Metrics, StepWork
from marco_train.profiling import StepProfiler
from marco_train.tracking import Sample, Tracker, log_line

BEST_EXPORT = "export-best"


class Trainable(Protocol):
    """The part of a policy that a run needs."""

    num_updates: int
    schedule_steps: int
    """Updates that the learning rate's course spans."""

    def state(self) -> TrainingState:
        """What this rank's share of the optimizer holds."""

    def load_state(self, source: StateSource, num_updates: int) -> None:
        """Take up a state of as many updates, weights included; all ranks take part."""

    def export(self, path: Path) -> None:
        """Write a Hugging Face directory; all ranks take part."""


class Resumable(Protocol):
    """A part whose state at a step goes into the checkpoint."""

    name: str

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` updates keeps; JSON."""

    def resume(
        self, step: int, state: dict[str, Any], allowed: Collection[ResumeChange] = ()
    ) -> None:
        """Go on at a step, or refuse what changed and is not allowed to."""


class Plan(Protocol):
    """Says how long a run is."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, those behind it included."""


class Run:
    """Tracker, checkpoints and timers of one execution."""

    def __init__(
        self,
        cfg: TrainConfig,
        policy: Trainable,
        parts: Sequence[Resumable],
        resumed: bool,
        noted: Mapping[str, Any] | None = None,
        work: StepWork | None = None,
    ) -> None:
        """Begin to record.

        Args:
            cfg: What runs.
            policy: At the step that the run begins with.
            parts: What else goes into checkpoints.
            resumed: Whether they come from a checkpoint.
            noted: Facts of the run that its checkpoints keep, as JSON. None: those of its config.
            work: What a step computes. None: the cards' peak is not known.
        """
        self._cfg = cfg
        self._policy = policy
        self._parts = parts
        self._noted = describe(cfg) if noted is None else noted
        self._kept: list[int] = list(self._noted.get("kept", ()))
        self._best = best_of(cfg)
        self._is_best = False
        """Whether the last step's measure is."""
        if "best" in self._noted and not self._best.resume(self._noted["best"]) and is_main():
            log_line("  the best so far was measured otherwise, and counts no more")
        self._work = work
        self._directory = Path(cfg.output_dir)
        self._profiler = StepProfiler(cfg.profile.bounds, self._directory)
        self._timers: dict[str, float] = {}
        self._first = policy.num_updates
        self._until = self._first
        self._started = time.perf_counter()
        self._step_started = self._started
        self._saved: int | None = None
        self._background: BackgroundSaves | None = None
        if cfg.checkpoint.asynchronous:
            self._background = BackgroundSaves(checkpoints_of(cfg))
        self._failures = 0
        self._failures_in_a_row = 0
        self._interruption = Interruption(self._directory, cfg.checkpoint.seconds)
        self._asked = Wish.go_on, ""
        self._tracker: Tracker | None = None
        if is_main():
            saved = saved_config(cfg)
            self._tracker = Tracker(cfg.logging, self._directory, cfg.name, saved, resumed)

    @classmethod
    def open(
        cls,
        cfg: TrainConfig,
        policy: Trainable,
        *parts: Resumable,
        epoch_rows: int | None = None,
        work: StepWork | None = None,
    ) -> "Run":
        """Start afresh, or where the chosen checkpoint stands.

        Args:
            cfg: What runs.
            policy: As it was built.
            parts: What else goes into checkpoints.
            epoch_rows: Samples of an epoch. None in an evaluation.
            work: What a step computes. None: the cards' peak is not known.

        Raises:
            InputError: The checkpoint is damaged, or is another run's.
        """
        # Drawn from by nothing that is trained, but part of the state all the same.
        seed_everything(cfg.seed + rank())
        # One file system may lag behind another.
        found = gather_objects(continuation(cfg, epoch_rows))[0]
        noted = describe(cfg, epoch_rows)
        if found is None:
            noted |= {"content": digests_at_start(cfg, {}), "resumed_from": []}
        else:
            noted |= resume_from(found, cfg, policy, parts)
        barrier()  # nothing is moved before all have loaded
        if is_main():
            begin(cfg, noted["content"])
            set_aside_newer(checkpoints_of(cfg), policy.num_updates)
        barrier()
        run = cls(cfg, policy, parts, found is not None, noted, work)
        if found is not None:
            if found.checkpoint.parent.resolve() == checkpoints_of(cfg).resolve():
                run._saved = found.num_updates
            elif cfg.checkpoint.save_every is not None:
                run._save(found.num_updates)  # a later launch need not look elsewhere
        return run

    def steps(self, plan: Plan) -> Iterator[int]:
        """Yield the steps still to make, counted from 0; the plan may become shorter meanwhile."""
        if self._tracker is not None:
            self._tracker.start(self._first, plan.num_steps)
            self._say_if_never_measured(plan.num_steps)
        self._started = time.perf_counter()
        step = self._first
        while step < plan.num_steps:
            self._until = plan.num_steps
            self._timers = {}
            self._step_started = time.perf_counter()
            with self._profiler.step(step + 1):
                yield step
            step += 1

    def _say_if_never_measured(self, num_steps: int) -> None:
        """Say where what is to be measured meanwhile is due after no step that is still to make."""
        stage, has_held_out = self._cfg.stage, self._cfg.data.held_out is not None
        if not stage.eval_metrics(has_held_out=has_held_out) or self._first >= num_steps:
            return
        if num_steps // stage.eval_every == self._first // stage.eval_every:
            log_line(
                f"nothing will be measured: stage.eval_every is {stage.eval_every}, and this run "
                f"goes from step {self._first + 1} to {num_steps}; give at most "
                f"stage.eval_every={num_steps - self._first}"
            )

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the time of a block to this step's `time/<name>`, in seconds."""
        start = time.perf_counter()
        with record_function(name):
            yield
        self._timers[name] = self._timers.get(name, 0.0) + time.perf_counter() - start

    def log(self, step: int, metrics: Metrics, phase: str | None = None) -> None:
        """Record what a step measured, with its times."""
        now = time.perf_counter()
        seconds = now - self._step_started
        timed = {f"time/{name}": spent for name, spent in self._timers.items()}
        metrics = metrics | timed | {"time/step": seconds}
        rate = metrics["data/num_tokens"] / seconds
        metrics["perf/tokens_per_second"] = rate
        metrics["perf/tokens_per_second_per_gpu"] = rate / world_size()
        metrics["memory/peak_gib"] = self._agree() / 2**30
        metrics["checkpoint/failures"] = float(self._failures)
        if self._work is not None:
            updating = self._timers.get("train", seconds)
            metrics["perf/mfu"] = self._work.utilization(metrics, updating)
        self._is_best = self._best.note(step + 1, metrics)
        made = step + 1 - self._first
        eta = (now - self._started) / made * (self._until - step - 1)
        if self._tracker is not None:
            self._tracker.log(step + 1, self._until, phase, metrics, eta)

    def _agree(self) -> int:
        """Agree on what the run is asked, in the exchange that finds the peak bytes of a rank."""
        wish, why = self._interruption.asked_here()
        peak, strongest = reduce_maxima([peak_bytes(), wish])
        self._asked = self._interruption.agreed(Wish(strongest), wish, why)
        return peak

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record responses of a step, before what it measured is."""
        if self._tracker is not None and samples:
            self._tracker.log_samples(step + 1, samples)

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint every `checkpoint.save_every` updates, if asked, or if it is the best.

        All ranks take part. What the run is asked was agreed on when the step was logged.

        Raises:
            RunInterrupted: The run was asked to end; it is saved.
            CheckpointError: It could not be, and is not to go on.
        """
        self._publish(wait=False)
        wish, reason = self._asked
        is_due = due(step, self._cfg.checkpoint.save_every) or self._is_best
        if is_due or wish >= Wish.save:
            self._save(step + 1)
        if wish >= Wish.end:
            self._end_early(step + 1, wish, reason)

    def _end_early(self, num_updates: int, wish: Wish, reason: str) -> NoReturn:
        self._publish(wait=True)
        if self._tracker is not None:
            self._tracker.close()
        says = f"{self._cfg.name}: ends after step {num_updates}, as {reason} asks; "
        path = None
        if self._saved is not None:
            path = checkpoint_path(checkpoints_of(self._cfg), self._saved)
            says += f"saved in {path}, from which the same command goes on"
        if self._saved != num_updates:
            says += "; the steps since were not saved" if path else "it was not saved"
        raise RunInterrupted(
            says,
            reason=reason,
            code=TRY_AGAIN_LATER if wish is Wish.end_for_time else TOLD_TO_END,
            step=num_updates,
            checkpoint=None if path is None else str(path),
        )

    def save_early(self) -> bool:
        """Save a checkpoint in the middle of a step, as a pool asks; all ranks take part.

        Returns:
            False where nothing was learnt since the run was opened, or it could not be saved.
        """
        learnt = self._policy.num_updates > self._first
        if learnt:
            self._save(self._policy.num_updates)
            self._publish(wait=True)
        return learnt and self._saved == self._policy.num_updates

    def keep(self, num_updates: int) -> None:
        """Save a checkpoint that stays, as the end of a phase; all ranks take part."""
        checkpoint = self._cfg.checkpoint
        if checkpoint.keep_phase_ends and checkpoint.save_every is not None:
            self._kept.append(num_updates)
            self._save(num_updates)

    def _save(self, num_updates: int) -> None:
        """Save a checkpoint, unless there is one of so many updates; all ranks take part.

        Raises:
            CheckpointError: It could not be saved, and the run is not to go on.
        """
        self._publish(wait=True)  # one at a time
        if self._saved == num_updates:
            return
        state: dict[str, Any] = {part.name: part.state_at(num_updates) for part in self._parts}
        state |= self._noted
        state |= {"num_updates": num_updates, "schedule_steps": self._policy.schedule_steps}
        state |= {"kept": list(self._kept), "best": self._best.state()}
        cfg = self._cfg.checkpoint
        retention = Retention(
            cfg.keep_last, tuple(self._kept), cfg.keep_every, tuple(self._best.steps)
        )
        what = self._policy.state(), generator_tensors(), state, retention
        try:
            if self._background is not None:
                self._background.start(num_updates, *what)
                return
            save_checkpoint(checkpoints_of(self._cfg), num_updates, *what)
        except CheckpointError as error:
            self._count_failure(error)
        else:
            self._count_success(num_updates)

    def _publish(self, wait: bool) -> None:
        """Let a checkpoint appear that was written beside training; all ranks take part.

        Raises:
            CheckpointError: It could not be written, and the run is not to go on.
        """
        if self._background is None:
            return
        try:
            published = self._background.publish(wait)
        except CheckpointError as error:
            self._count_failure(error)
        else:
            if published is not None:
                self._count_success(published)

    def _count_success(self, num_updates: int) -> None:
        self._saved = num_updates
        self._failures_in_a_row = 0

    def _count_failure(self, error: CheckpointError) -> None:
        """Go on after a save that failed, unless it was one too many.

        Raises:
            CheckpointError: It was.
        """
        self._failures += 1
        self._failures_in_a_row += 1
        cfg = self._cfg.checkpoint
        if cfg.on_error is OnError["stop"]:
            raise CheckpointError(f"{error}; checkpoint.on_error=stop ends the run") from error
        count = f"failure {self._failures_in_a_row} of checkpoint.max_failures={cfg.max_failures}"
        if self._failures_in_a_row >= cfg.max_failures:
            raise CheckpointError(f"{error}; {count} in a row ends the run") from error
        if is_main():
            log_line(f"{error}; {count} in a row, and the run goes on")

    def export(self, name: str) -> None:
        """Write the policy as a Hugging Face directory under the run's; all ranks take part."""
        self._policy.export(self._directory / name)

    def _export_best(self) -> None:
        """Write the best checkpoint as a Hugging Face directory; the policy is its then."""
        for step in self._best.steps:
            path = checkpoint_path(checkpoints_of(self._cfg), step)
            if verify(path) is not None:
                continue
            if step != self._policy.num_updates:
                stored, _ = load_checkpoint(path)
                self._policy.load_state(stored, step)
            self.export(BEST_EXPORT)
            if is_main():
                log_line(f"best: {self._directory / BEST_EXPORT}, after {step} updates")
            return
        if is_main():
            why = "no checkpoint that was measured is still there and sound"
            if not self._best.steps:
                metric, every = self._cfg.checkpoint.best.metric, self._cfg.stage.eval_every
                why = f"{metric} was never measured (stage.eval_every={every})"
            log_line(f"no {BEST_EXPORT}: {why}")

    def finish(self, last_phase: str | None = None) -> None:
        """Save, export the policy and mark the run as finished; with more steps it can go on.

        Args:
            last_phase: Of a cascade: its export has that name too, and `export` stands for it.
        """
        if self._cfg.checkpoint.save_every is not None:
            self._save(self._policy.num_updates)
            self._publish(wait=True)
        name = "export" if last_phase is None else phase_export(last_phase)
        self.export(name)
        if is_main() and last_phase is not None:
            link_directory(self._directory / "export", self._directory / name)
        if self._cfg.checkpoint.best.export:
            self._export_best()
        barrier()  # what follows may take long, and no rank has to wait for it
        if self._tracker is not None:
            self._tracker.close()
            mark_finished(self._cfg, self._noted["content"], self._noted["epoch_rows"])
            log_line(f"{self._cfg.name}: finished, {self._directory / 'export'}")


def best_of(cfg: TrainConfig) -> BestSoFar:
    """Begin to look for the best checkpoint of a run, if it asks for one."""
    best = cfg.checkpoint.best
    how = {}
    if best.metric is not None:
        config = saved_config(cfg)
        stage = config["stage"]
        how = {"eval": stage["eval"], "num_eval_examples": stage["num_eval_examples"]}
        how |= {"held_out": config["data"]["held_out"]}
    return BestSoFar(best.metric, how, is_max=best.is_max)


def phase_export(phase: str) -> str:
    """Name of the directory in which the policy lies at the end of a phase."""
    return f"export-{phase}"


@contextmanager
def directory_held(cfg: TrainConfig) -> Iterator[None]:
    """Keep other launches out of the run's directory, in which this one can save.

    What launches that were killed left incomplete is removed. All ranks take part.

    Raises:
        DirectoryInUseError: Another launch is in it.
        InputError: It cannot be written.
    """
    with held(Path(cfg.output_dir)):
        if cfg.checkpoint.save_every is not None and not isinstance(
            cfg.stage, UntrainedStageConfig
        ):
            check_writable(checkpoints_of(cfg))
            if is_main():
                sweep(checkpoints_of(cfg))
        yield


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many updates is due after a step; None is never."""
    return every is not None and (step + 1) % every == 0


def resume_from(
    found: Continuation, cfg: TrainConfig, policy: Trainable, parts: Sequence[Resumable]
) -> dict[str, Any]:
    """Put policy, data, cascade and generators where a checkpoint left them.

    Returns:
        What the run's own checkpoints keep of the one it goes on from.

    Raises:
        InputError: The checkpoint is damaged, or is another run's.
    """
    path, step = found.checkpoint, found.num_updates
    with sharing_errors(InputError, InputError, OSError):
        stored, state = load_checkpoint(path)
    changed = resume_parts(found, cfg, parts, state)
    with sharing_errors(InputError, InputError):
        refuse_other_shapes(path, stored, policy.state())
    policy.load_state(stored, step)
    if generators := stored.generators(rank()):  # of a new rank they stay as it was seeded
        load_generators(generators)
    if is_main():
        log_line(f"resumed from {path}")
        for sentence in (*found.sentences, *map(said_of_allowed, changed)):
            log_line(f"  {sentence}")
        if (old := path.parent.parent).resolve() != Path(cfg.output_dir).resolve():
            log_line(
                f"  {cfg.output_dir}/metrics.jsonl begins with step {step + 1}, as a run of its "
                f"own on W&B; the steps before are in {old}/metrics.jsonl"
            )
    anew = {change.name for change in changed}
    known = {name: c["digest"] for name, c in state["content"].items() if name not in anew}
    noted = {
        "content": digests_at_start(cfg, known),
        "resumed_from": [*state["resumed_from"], str(path)],
        "kept": state["kept"],
    }
    if path.parent.resolve() == checkpoints_of(cfg).resolve() and "best" in state:
        noted["best"] = state["best"]  # of another run, the checkpoint lies elsewhere
    return noted


def resume_parts(
    found: Continuation, cfg: TrainConfig, parts: Sequence[Resumable], state: dict[str, Any]
) -> list[Change]:
    """Put the parts where a checkpoint left them.

    Returns:
        What changed in the run's files, as `on_resume.allow` allows.

    Raises:
        InputError: The checkpoint is of other data, teachers or files.
    """
    opened = state.get("cascade", {}).get("teachers", {})
    # Compared by one rank, for all of them: these files may be large.
    mine = changed_content(state, cfg, noted_content(cfg, opened)) if is_main() else []
    changed = gather_objects(mine)[0]
    refuse_changes(changed, cfg, f"{found.checkpoint} is of a run that began with other files")
    for part in parts:
        part.resume(found.num_updates, state.get(part.name, {}), cfg.on_resume.allow)
    return changed


def check_resumption(
    cfg: TrainConfig, parts: Sequence[Resumable], epoch_rows: int | None = None
) -> None:
    """Refuse what the run would refuse of the checkpoint that it goes on from.

    Tensors are not compared.

    Raises:
        InputError: Says what is wrong with it.
    """
    found = continuation(cfg, epoch_rows)
    if found is not None:
        resume_parts(found, cfg, parts, read_state(found.checkpoint))


def digests_at_start(cfg: TrainConfig, known: Mapping[str, str | None]) -> dict[str, Content]:
    """Note sizes and times of the run's files, and digest those that the checkpoint did not.

    Args:
        cfg: The run.
        known: Digests that need not be made again.
    """
    mine: dict[str, Content] = {}
    if is_main():
        paths = content_paths(plain_config(cfg), noted_content(cfg))
        digests = {name: known.get(name) or digest(path) for name, path in paths.items()}
        mine = observed(cfg, digests)
    return gather_objects(mine)[0]


def begin(cfg: TrainConfig, content: Mapping[str, Content]) -> None:
    """Write config.json, and delete what an earlier launch left of its end.

    Args:
        cfg: The run.
        content: What its files hold, as `observed` notes it; config.json keeps the digests.
    """
    directory = Path(cfg.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for told in (FINISHED, EXIT_STATUS):
        (directory / told).unlink(missing_ok=True)
    digests = {name: each["digest"] for name, each in content.items() if each["digest"]}
    written = saved_config(cfg) | {"digests": digests}
    (directory / "config.json").write_text(json.dumps(written, indent=2))


def mark_finished(
    cfg: TrainConfig, content: Mapping[str, Content], epoch_rows: int | None = None
) -> None:
    """Leave the note that `is_finished` reads; complete or not there.

    Args:
        cfg: The run.
        content: What its files held when it began, as `observed` notes it.
        epoch_rows: Samples of an epoch. None in an evaluation.
    """
    note = Path(cfg.output_dir) / FINISHED
    noted = {
        "config": saved_config(cfg),
        "phases": phases_of(cfg),
        "epoch_rows": epoch_rows,
        "content": with_digests(content, content_paths(plain_config(cfg), CONTENT)),
        "export": {file.name: file.stat().st_size for file in (note.parent / "export").glob("*")},
    }
    with replaces(note) as partial:
        partial.write_text(json.dumps(noted, indent=2, sort_keys=True))
