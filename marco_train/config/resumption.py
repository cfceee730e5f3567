"""Whether a run is another's continuation: what may change, what was finished, what to go on from.

    config, resume -> newest checkpoint's config -> what changed -> free | allowed | refused

Imports no tensor library, as these are the first questions of a launch.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.config.data import OnChange
from marco_train.config.manifest import MANIFEST, STATE, fault_of
from marco_train.config.opd import OPDConfig
from marco_train.config.resume import ChangedSchedule, ResumeChange
from marco_train.config.run import TrainConfig
from marco_train.config.secrets import redacted
from marco_train.config.stage import UntrainedStageConfig, steps_of
from marco_train.content import Content, is_same, look
from marco_train.errors import InputError, require

FINISHED = "finished.json"
"""The note in a run's directory by which a second launch knows that nothing is left to do."""
NOTED = {
    STATE: {
        "config",
        "phases",
        "epoch_rows",
        "architecture",
        "content",
        "num_updates",
        "schedule_steps",
        "kept",
    },
    FINISHED: {"config", "phases", "epoch_rows", "content", "export"},
}
"""What these files say at least."""
STEP_NAME = re.compile(r"step_(\d{6,})$")
MOST_LISTED = 5
"""Checkpoints that a refusal offers."""

# What a change of each field takes. `*` stands for any one name, `**` for all that lies below; the
# first row that fits counts.
#
# free: the same is learnt, or the field only measures, places or bounds.
# length: how many steps; said, and refused where fewer are left than were made.
# layout: a checkpoint cannot be loaded in another one; nothing allows it yet.
# Any other row is named after the group that on_resume.allow has to name.
KINDS: dict[str, tuple[str, ...]] = {
    "free": (
        "name",
        "root",
        "output_dir",
        "resume",
        "deterministic",
        "compile_losses",
        "on_resume.**",
        "logging.**",
        "checkpoint.**",
        "export.**",
        "planning.**",
        "hub.**",  # what the files hold counts
        "teacher.**",  # as the cascade has it
        "data.sources.*.licence",
        "data.held_out.sources.*.licence",
        "data.path",  # as the sources have it
        "profile.**",
        "data.max_tokens_per_microbatch",
        "data.max_bad_rows",
        "data.max_lost_rows",
        "data.judge_rows",
        "data.on_change",
        "parallel.dispatch",
        "parallel.expert_parallel_size",
        "parallel.recompute",
        "parallel.timeout_seconds",
        "parallel.hang_seconds",
        "parallel.offload_while_sampling",
        "parallel.zero_stage",
        "optim.max_skipped_in_a_row",
        "stage.eval_every",
        "stage.num_eval_examples",
        "stage.eval.**",
        "stage.max_sampler_mismatch",
        "stage.identify_languages",
        "stage.plan",
        "stage.plan_gpus",
        "stage.plan_gpu",
        "stage.score_cache.**",
        "stage.rollout.batch_size",
        "stage.rollout.canary_tolerance",
        "stage.rollout.max_tokens_per_batch",
        "stage.rollout.kv_cache_gib",
        "stage.rollout.reserve_gib",
        "stage.rollout.expert_parallel",
        "stage.rollout.servers.**",
        "stage.rollout.sync_path",
        "stage.rollout.weights_by",
        *(
            f"{teacher}.{name}"
            for teacher in (
                "stage.cascade.*.teacher",
                "stage.cascade.*.teachers_by_group.*",
                "stage.teachers.*",
            )
            for name in ("max_tokens_per_batch", "expert_parallel_size", "kv_cache_gib")
        ),
        "stage.cascade.*.teacher.servers.**",
        "stage.cascade.*.teachers_by_group.*.servers.**",
        "stage.teachers.*.servers.**",
    ),
    "length": (
        "stage.max_steps",
        "stage.num_steps",
        "stage.num_epochs",
        "stage.cascade.*.num_steps",
        "stage.cascade.*.num_epochs",
    ),
    "layout": (
        "stage.kind",
        "model.dtype",
        *(
            f"model.architecture.{name}"
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "intermediate_size",
                "num_experts",
                "moe_intermediate_size",
                "tie_word_embeddings",
            )
        ),
    ),
    "model": ("model.path", "model.architecture.**", "stage.models.**"),
    "data": (
        "seed",
        "model.tokenizer",
        "model.chat_template",
        "model.chat_template_kwargs.**",
        "data.sources.**",
        "data.held_out.**",  # free where nothing is decided by it
        "data.num_rows",
        "data.thinking",
        "data.keep_empty_answers",
        "data.overlong",
        "stage.global_batch_size",
        "stage.max_length",
        "stage.responses_per_prompt",
        "stage.max_prompt_length",
        "stage.max_response_length",
        "stage.num_prompts",
        "stage.num_kl_responses",
        "stage.num_examples_shown",
        "stage.signatures",
        "stage.temperature",
        "stage.suite",
        "stage.data_dir",
        "stage.data_dirs.**",
        "stage.languages",
        "stage.own.**",
        "stage.max_items",
        "stage.greedy",
    ),
    "objective": (
        "stage.loss_tokens",
        "stage.objective",
        "stage.max_importance_ratio",
        "stage.max_advantage",
        "stage.top_k",
        "stage.top_k_source",
        "stage.drop_repetitive",
        "stage.cascade.*.early_switch.**",
    ),
    "optim": ("optim.**",),
    "teacher": (
        "stage.cascade.*.teacher.**",
        "stage.cascade.*.teachers_by_group.**",
        "stage.teachers.**",
    ),
    "rollout": (
        "stage.rollout.backend",
        "stage.rollout.replay_routing",
        "stage.rollout.max_staleness",
    ),
}
# Fields that this version does not know, of a checkpoint of another: by where they stand; what
# stands elsewhere may not change.
KIND_BELOW = {"model": "model", "data": "data", "stage": "objective", "optim": "optim"}
# Files and directories that may move: what they hold counts, not where they lie.
CONTENT = (
    "model.path",
    "model.tokenizer",
    "data.sources.*.path",
    "data.held_out.sources.*.path",
    "stage.cascade.*.teacher.path",
    "stage.cascade.*.teachers_by_group.*.path",
    "stage.models.*",
    "stage.teachers.*.path",
    "stage.own.path",
)
# The part of them that a checkpoint keeps a digest of; the loader and the cascade keep the others'.
NOTED_CONTENT = ("model.path", "data.held_out.sources.*.path")


def noted_content(cfg: TrainConfig, opened: Collection[str] = ()) -> tuple[str, ...]:
    """Fields of which a checkpoint keeps a digest, as no part of the run has looked at them.

    Args:
        cfg: The run.
        opened: Phases whose teachers the cascade has opened, and knows.
    """
    coming = [name for name in phases_of(cfg)[1:] if name not in opened]
    teachers = [f"stage.cascade.{name}.teacher" for name in coming]
    others = [f"stage.cascade.{name}.teachers_by_group.*" for name in coming]
    return (*NOTED_CONTENT, *(f"{owner}.path" for owner in teachers + others))


Keys = tuple[str, ...]


def fits(pattern: str, path: Keys) -> bool:
    """Whether a row of a table is about a field."""
    parts = pattern.split(".")
    if parts[-1] == "**":
        parts.pop()
        path = path[: len(parts)]
    return len(parts) == len(path) and all(a in ("*", b) for a, b in zip(parts, path, strict=True))


def kind_of(path: Keys) -> str | None:
    """Find what a change of a field takes; None: this version has no such field."""
    for kind, patterns in KINDS.items():
        if any(fits(pattern, path) for pattern in patterns):
            return kind
    return None


def leaves(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Walk through the fields of a plain config."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, (*path, key))


def field_difference(old: Any, new: Any, where: str = "") -> list[str]:
    """Name the leaves in which two nested dictionaries differ, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys(), key=str):
            path = f"{where}.{key}" if where else str(key)
            found += field_difference(old.get(key), new.get(key), path)
        return found
    return [] if old == new else [f"{where}: {old} -> {new}"]


def plain(value: Any) -> Any:
    """Turn enums into their values, through all dictionaries and lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def plain_config(cfg: TrainConfig) -> dict[str, Any]:
    """Turn the config into JSON values, secrets included: for this process alone."""
    return dict(plain(asdict(cfg)))


def saved_config(cfg: TrainConfig) -> dict[str, Any]:
    """Turn the config into JSON values without secrets, for files and for comparing with them."""
    return dict(redacted(plain_config(cfg)))


def describe(cfg: TrainConfig, epoch_rows: int | None = None) -> dict[str, Any]:
    """What a checkpoint keeps of a config: what it says, and what it does not say by itself.

    Args:
        cfg: The run.
        epoch_rows: Samples of an epoch, by which steps are counted. None in an evaluation.
    """
    return {
        "config": saved_config(cfg),
        "phases": phases_of(cfg),  # JSON is written with its keys sorted
        "epoch_rows": epoch_rows,
        "architecture": asdict(_student_shape(cfg)),
    }


def _student_shape(cfg: TrainConfig) -> ArchitectureConfig:
    if cfg.model.path is not None:
        return read_architecture(cfg.model.path)
    assert cfg.model.architecture is not None
    return cfg.model.architecture


def phases_of(cfg: TrainConfig) -> list[str]:
    """Names of a cascade's phases, in their order; none in any other stage."""
    return list(cfg.stage.cascade) if isinstance(cfg.stage, OPDConfig) else []


def with_defaults(then: Any, now: Any) -> Any:
    """Give what an older plain config lacks the schema's default, where there is one."""
    if not isinstance(then, dict):
        return then
    if isinstance(now, dict):
        return {key: with_defaults(item, now.get(key)) for key, item in then.items()}
    if not is_dataclass(now):
        return then
    filled = dict(then)
    for each in fields(now):
        if each.name in then:
            filled[each.name] = with_defaults(then[each.name], getattr(now, each.name))
        elif each.default_factory is not NO_DEFAULT:
            made = each.default_factory()
            filled[each.name] = plain(asdict(made) if is_dataclass(made) else made)  # type: ignore[arg-type]
        elif each.default is not NO_DEFAULT and each.default != MISSING:
            filled[each.name] = plain(each.default)
    return filled


@dataclass(frozen=True)
class Change:
    """A field of the config, or the content of a path, that is another than before."""

    name: str
    then: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        """Both values, in a few words."""
        if self.then == self.now:
            return f"{self.name}: {self.now} holds something else than before"
        then, now = ("{...}" if isinstance(v, dict) else v for v in (self.then, self.now))
        return f"{self.name}: {then} -> {now}"


def changes_of(noted: Mapping[str, Any], cfg: TrainConfig) -> list[Change]:
    """What is neither free nor a length, and differs from what was noted.

    Where files lie is left to those who compare what they hold.
    """
    then, now = with_defaults(noted["config"], cfg), saved_config(cfg)
    if not isinstance(cfg.stage, UntrainedStageConfig):
        shapes = (
            noted.get("architecture") or then["model"]["architecture"],
            asdict(_student_shape(cfg)),
        )
        # What an older checkpoint does not know of its student is not held against this one.
        then["model"]["architecture"], now["model"]["architecture"] = (
            (with_defaults(shapes[0], _student_shape(cfg)), shapes[1])
            if shapes[0]
            else (shapes[1], shapes[1])
        )
    if isinstance(cfg.stage, OPDConfig):  # phases that come or go are a matter of the order
        both = then["stage"]["cascade"].keys() & now["stage"]["cascade"].keys()
        for each in (then, now):
            cascade = each["stage"]["cascade"]
            each["stage"]["cascade"] = {name: cascade[name] for name in both}
    found = [*_differences(then, now, (), held_out_decides(now) or held_out_decides(then))]
    return [change for change in found if change.kind not in {"free", "length"}]


def _differences(then: Any, now: Any, path: Keys, held_out: bool) -> Iterator[Change]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), (*path, key), held_out)
        return
    moved = isinstance(then, str) and isinstance(now, str) and _is_content(path, CONTENT)
    if then == now or moved:
        return
    kind = kind_of(path) or KIND_BELOW.get(path[0], "layout")
    if path[:2] == ("data", "held_out") and not held_out and path[-1] != "share":
        kind = "free"
    yield Change(".".join(path), then, now, kind)


def held_out_decides(config: Mapping[str, Any]) -> bool:
    """Whether anything but a measure depends on the held-out rows."""
    stage = config["stage"]
    phases = stage.get("cascade", {}).values()
    measured = any(phase.get("early_switch", {}).get("measure_every") for phase in phases)
    return measured or stage["kind"] == "evaluate"


def _is_content(path: Keys, patterns: Iterable[str]) -> bool:
    return any(fits(pattern, path) for pattern in patterns)


def content_paths(config: Mapping[str, Any], patterns: Iterable[str]) -> dict[str, str]:
    """Where the files and directories lie that decide what a run learns or measures, by field."""
    return {
        ".".join(path): value
        for path, value in leaves(config)
        if isinstance(value, str)
        and value
        and _is_content(path, patterns)
        and (path[:2] != ("data", "held_out") or held_out_decides(config))
    }


def observed(cfg: TrainConfig, digests: Mapping[str, str | None]) -> dict[str, Content]:
    """Note how the files look that a run reads, by the field that names them.

    Args:
        cfg: The run.
        digests: Of what they hold, where it is known.
    """
    found = content_paths(plain_config(cfg), CONTENT)
    return {name: {"files": look(p), "digest": digests.get(name)} for name, p in found.items()}


def changed_content(
    noted: Mapping[str, Any], cfg: TrainConfig, patterns: Iterable[str]
) -> list[Change]:
    """What holds something else than was noted.

    Args:
        noted: With `config`, and the `content` of its paths.
        cfg: What is asked for now.
        patterns: Which fields.
    """
    then = {".".join(path): value for path, value in leaves(noted["config"])}
    found = []
    for name, path in content_paths(plain_config(cfg), patterns).items():
        if not isinstance(then.get(name), str):
            continue  # a field that came anew is a change of the config
        known = noted["content"].get(name)
        unseen = known is None or not (known["files"] or look(path))  # of a hub, say
        if (then[name] != redacted(path)) if unseen else not is_same(known, path):
            kind = kind_of(tuple(name.split("."))) or "data"
            found.append(Change(name, then[name], redacted(path), kind))
    return found


def checkpoints_of(cfg: TrainConfig) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(cfg.output_dir) / "checkpoints"


def complete_checkpoints(directory: Path) -> list[Path]:
    """List the complete checkpoints of a run, newest first."""
    found = [p for p in directory.glob("step_*") if STEP_NAME.match(p.name)]
    complete = (p for p in found if (p / MANIFEST).is_file())
    return sorted(complete, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Updates after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(cfg: TrainConfig) -> Path | None:
    """Choose where to resume from: `auto`, `never`, or the path of a checkpoint.

    As far as sizes and the state tell; all files are digested before the student is loaded. That a
    path is a complete checkpoint was checked with the config.

    Raises:
        InputError: All checkpoints of the run are damaged.
    """
    if cfg.resume == "never":
        return None
    if cfg.resume != "auto":
        return Path(cfg.resume)
    faults = []
    for path in complete_checkpoints(checkpoints_of(cfg)):
        fault = fault_of(path)
        if fault is None:
            return path
        faults.append(fault)
    refuse_all(faults, cfg)
    return None


def refuse_all(faults: Sequence[str], cfg: TrainConfig) -> None:
    """Refuse to start over where there are checkpoints, and none can be used.

    Args:
        faults: Of each; none where there is no checkpoint.
        cfg: The run.

    Raises:
        InputError: Lists the faults.
    """
    require(
        not faults,
        f"no checkpoint in {checkpoints_of(cfg)} can be resumed: {'; '.join(faults)}. Resume from "
        "another run's with resume=<path> and an output_dir of its own, or start over with "
        "resume=never, which keeps them aside",
    )


def check_resume(cfg: TrainConfig) -> None:
    """Refuse a `resume` that is neither auto, never nor a complete checkpoint to go on from.

    Raises:
        InputError: Lists checkpoints near the path that can be resumed, or names the other run that
            lies where this one is to begin.
    """
    if cfg.resume in {"auto", "never"}:
        return
    path = Path(cfg.resume)
    meant = {"true": "auto", "yes": "auto", "1": "auto", "false": "never", "no": "never"}
    word = meant.get(cfg.resume.lower())
    hint = f" (did you mean {word}?)" if word else ""
    require(
        (path / MANIFEST).is_file(),
        f"resume={cfg.resume} is no complete checkpoint, nor auto or never{hint}; complete ones: "
        f"{others_than(path, cfg)}",
    )
    refuse_damaged(path, fault_of(path), cfg)
    own = path.resolve().parent == checkpoints_of(cfg).resolve()
    complete = complete_checkpoints(checkpoints_of(cfg))
    require(
        own or not (complete or (Path(cfg.output_dir) / FINISHED).is_file()),
        f"resume={cfg.resume} begins another run, and {cfg.output_dir} holds one already: choose "
        "an output_dir of its own, or go on with the one that lies there with resume=auto",
    )


def refuse_damaged(path: Path, fault: str | None, cfg: TrainConfig) -> None:
    """Refuse the checkpoint that was asked for, where something is wrong with it.

    Raises:
        InputError: Says what, and names others.
    """
    require(
        fault is None,
        f"resume={cfg.resume}: {fault}; others that can be resumed: {others_than(path, cfg)}",
    )


def others_than(path: Path, cfg: TrainConfig) -> str:
    """List sound checkpoints of the run and near a path, those of the likest names first."""
    near = path.absolute()
    while not near.is_dir():
        near = near.parent
    places = [checkpoints_of(cfg), near, near.parent, near / "checkpoints"]
    places += near.glob("*/checkpoints")
    found = {each.resolve() for place in places for each in complete_checkpoints(place)}
    sound = [each for each in found - {path.resolve()} if fault_of(each) is None]

    def unlikeness(each: Path) -> tuple[float, int]:
        return -SequenceMatcher(None, str(path), str(each)).ratio(), -step_of(each)

    return ", ".join(map(str, sorted(sound, key=unlikeness)[:MOST_LISTED])) or "none"


@dataclass(frozen=True)
class Continuation:
    """How a run goes on from a checkpoint."""

    checkpoint: Path
    num_updates: int
    schedule_steps: int
    """Which the learning rate's course spans."""
    sentences: list[str] = field(default_factory=list)
    """What is another than before, by choice."""


def continuation(cfg: TrainConfig, epoch_rows: int | None = None) -> Continuation | None:
    """Decide how a run goes on from the checkpoint that it is to resume; None: from the start.

    A function of the config and of the checkpoint's files, so the same on every rank. What files
    hold is compared by those who open them.

    Args:
        cfg: The run.
        epoch_rows: Samples of an epoch. None, before the data are open: as many as the
            checkpoint's.

    Raises:
        InputError: Something changed that is not allowed to, or a choice has to be made.
    """
    checkpoint = None if isinstance(cfg.stage, UntrainedStageConfig) else find_checkpoint(cfg)
    if checkpoint is None:
        return None
    state = read_note(checkpoint / STATE)
    what = f"{checkpoint} is of a run with another config"
    refuse_other_stage(state, cfg, what)
    lengths = Lengths(state, cfg, epoch_rows)
    changes = [*changes_of(state, cfg), *lengths.changes_of_order()]
    refuse_changes(changes, cfg, what)
    lengths.refuse_rewriting(checkpoint)
    steps, course = _choose_schedule(cfg, state, lengths)
    sentences = [*map(said_of_allowed, changes), *lengths.sentences(), *course]
    return Continuation(checkpoint, state["num_updates"], steps, sentences)


def said_of_allowed(change: Change) -> str:
    """Say what changed by choice."""
    return f"{change} (allowed by on_resume.allow=[{change.kind}])"


def read_note(file: Path) -> dict[str, Any]:
    """Read what an earlier launch left behind.

    Raises:
        InputError: It is torn, or of a version that noted other things.
    """
    instead = "resume from another checkpoint with resume=<path>, or start with resume=never"
    try:
        found = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); {instead}") from error
    missing = NOTED[file.name] - found.keys()
    require(
        not missing,
        f"{file} was written by another version of marco_train (it lacks "
        f"{', '.join(sorted(missing))}); {instead}",
    )
    return found


def refuse_other_stage(noted: Mapping[str, Any], cfg: TrainConfig, what: str) -> None:
    """Refuse to make a run of one stage from another's.

    Raises:
        InputError: Names both.
    """
    then, now = noted["config"]["stage"]["kind"], cfg.stage.kind.value
    require(
        then == now,
        f"{what} (then -> now): stage.kind: {then} -> {now}, and nothing allows that: choose "
        "another root or output_dir, or resume=never to replace it",
    )


def refuse_changes(changes: Sequence[Change], cfg: TrainConfig, what: str) -> None:
    """Refuse what was not allowed to change, with the override that would allow it.

    Raises:
        InputError: Lists the fields by their group, then -> now.
    """
    allowed = {group.value for group in cfg.on_resume.allow}
    wrong = [change for change in changes if change.kind not in allowed]
    if not wrong:
        return
    fixed = [str(change) for change in wrong if change.kind == "layout"]
    groups = [g.value for g in ResumeChange if any(change.kind == g.value for change in wrong)]
    listed = [
        f"{group}: {', '.join(str(change) for change in wrong if change.kind == group)}"
        for group in groups
    ]
    says = f"{what} (then -> now): "
    if listed:
        needed = sorted(allowed | set(groups))
        says += (
            f"{'; '.join(listed)}; on_resume.allow=[{','.join(needed)}] goes on with the new "
            "values. "
        )
    if fixed:
        says += (
            f"{', '.join(fixed)}: the checkpoint cannot be loaded so, and nothing allows it yet: "
            "set it back. "
        )
    raise InputError(f"{says}Or choose another output_dir, or resume=never")


class Lengths:
    """How many steps a checkpoint's run was to make, and this one, phase by phase."""

    def __init__(
        self, noted: Mapping[str, Any], cfg: TrainConfig, epoch_rows: int | None = None
    ) -> None:
        """Compare lengths.

        Args:
            noted: What is kept of the earlier run.
            cfg: What is asked for now.
            epoch_rows: Samples of an epoch now. None: as many as then.
        """
        then, now = with_defaults(noted["config"], cfg), plain_config(cfg)
        rows_then = noted["epoch_rows"]
        self._phases_now = phases_of(cfg)
        self._phases_then = list(noted["phases"])
        self._converged = noted.get("cascade", {}).get("converged", {})
        self._made = noted.get("num_updates", 0)
        owners = {name: now["stage"]["cascade"][name] for name in self._phases_now}
        self._epochs = {n: o.get("num_epochs") for n, o in (owners or {"": now["stage"]}).items()}
        self.then = _lengths(then, self._phases_then, rows_then)
        self.now = _lengths(now, self._phases_now, epoch_rows or rows_then)

    @property
    def planned(self) -> tuple[int, int]:
        """Steps of the whole run, then and now, if no phase converges."""
        return sum(self.then.values()), sum(self.now.values())

    @property
    def num_steps(self) -> int:
        """Steps that this run has in the end, with the phases that have converged."""
        return self._spans(self.now)[-1][2]

    def _spans(self, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
        """Phases with the step of each before which it begins and ends."""
        found, first = [], 0
        for name, length in lengths.items():
            end = self._converged.get(name, first + length)
            found.append((name, first, end))
            first = end
        return found

    def _taught(self, lengths: Mapping[str, int]) -> list[tuple[str, int]]:
        """Phases that have begun, with the steps that were made of each."""
        begun = [span for span in self._spans(lengths) if span[1] < self._made]
        return [(name, min(end, self._made) - first) for name, first, end in begun]

    def refuse_rewriting(self, checkpoint: Path) -> None:
        """Refuse lengths by which the steps that were made would be other steps.

        Raises:
            InputError: Gives both numbers.
        """
        then, now = self._taught(self.then), self._taught(self.now)
        other = "or resume from an earlier checkpoint with resume=<path>"
        for index, (name, made) in enumerate(then):
            name_now, steps = now[index] if index < len(now) else (None, 0)
            if name != name_now:
                raise InputError(
                    f"stage.cascade has the phases {', '.join(self._phases_now)}, and {checkpoint} "
                    f"has made {made} steps of {name!r} as phase {index + 1}: keep the phases that "
                    f"have taught as they were, {other}"
                )
            require(
                steps >= made,
                f"{self._given(name)} is fewer than the {made} steps that {checkpoint} has made: "
                f"give {made} steps or more (stage.max_steps caps it too), {other}",
            )
            require(
                steps == made,
                f"{self._given(name)}, but that phase ended after {made} steps and the next "
                f"has begun in {checkpoint}: set it to {made} and give the steps to a phase to "
                f"come, {other}",
            )

    def _given(self, name: str) -> str:
        """The field that says how long a phase is, and its steps."""
        owner, epochs = f"stage.cascade.{name}" if name else "stage", self._epochs[name]
        if epochs is None:
            return f"{owner}.num_steps={self.now[name]}"
        return f"{owner}.num_epochs={epochs} makes {self.now[name]} steps, which"

    def changes_of_order(self) -> list[Change]:
        """Coming phases in another order, or with others between them."""
        then, now = self._phases_then, self._phases_now
        shared = min(len(then), len(now))
        if then[:shared] == now[:shared]:
            return []
        return [Change("stage.cascade", ", ".join(then), ", ".join(now), "teacher")]

    def sentences(self) -> list[str]:
        """Say what became longer or shorter."""
        found = []
        for name in [*self.now, *(gone for gone in self.then if gone not in self.now)]:
            owner = f"stage.cascade.{name}" if name else "stage"
            if name not in self.then:
                found.append(f"{owner}: a phase of {self.now[name]} steps is added")
            elif name not in self.now:
                found.append(f"{owner}: a phase of {self.then[name]} steps is left out")
            elif self.then[name] != self.now[name]:
                field = "num_steps" if self._epochs[name] is None else "num_epochs"
                found.append(f"{owner}.{field}: {self.then[name]} -> {self.now[name]} steps")
        return found


def _lengths(
    config: Mapping[str, Any], phases: Sequence[str], epoch_rows: int | None
) -> dict[str, int]:
    """Steps of each phase; of SFT, which has none, under the empty name."""
    stage, cap = config["stage"], config["stage"]["max_steps"]
    owners = {name: stage["cascade"][name] for name in phases} or {"": stage}
    size = stage["global_batch_size"]
    numbers = {
        name: steps_of(owner["num_steps"], owner.get("num_epochs"), size, epoch_rows)
        for name, owner in owners.items()
    }
    return {name: n if cap is None else min(n, cap) for name, n in numbers.items()}


def _choose_schedule(
    cfg: TrainConfig, state: Mapping[str, Any], lengths: Lengths
) -> tuple[int, list[str]]:
    """Say how many steps the learning rate's course spans, and how that differs from before.

    Raises:
        InputError: The old and the new course differ, and none was chosen.
    """
    planned_then, planned_now = lengths.planned
    old = state["schedule_steps"]
    choice, coming = cfg.on_resume.schedule, state["num_updates"]
    same_length = planned_then == planned_now

    def rates(step: int) -> tuple[float, float]:
        return cfg.optim.rate_at(step, old), cfg.optim.rate_at(step, planned_now)

    steps = range(coming, max(coming + 1, planned_now))
    differing = [step for step in steps if rates(step)[0] != rates(step)[1]]
    if not differing or (same_length and choice is not ChangedSchedule.stretch):
        return old if same_length else planned_now, []
    shown = coming if coming in differing else differing[0]
    before, after = rates(shown)
    says = (
        f"the learning rate of step {shown} is {before:.4g} on the course of {old} steps and "
        f"{after:.4g} on that of {planned_now}"
    )
    if choice is None:
        raise InputError(
            f"{'; '.join(lengths.sentences())}: {says}; choose on_resume.schedule=keep (the old "
            f"course, which stays at {cfg.optim.rate_at(old, old):.4g} from step {old} on) or "
            "on_resume.schedule=stretch (the new course)"
        )
    chosen = old if choice is ChangedSchedule.keep else planned_now
    return chosen, [f"{says}; on_resume.schedule={choice.value} takes that of {chosen}"]


def schedule_steps(cfg: TrainConfig, epoch_rows: int | None = None) -> int:
    """Updates that the learning rate's course spans; a checkpoint may decide it.

    Args:
        cfg: The run.
        epoch_rows: Samples of an epoch. None in an evaluation.
    """
    found = continuation(cfg, epoch_rows)
    if found is not None:
        return found.schedule_steps
    return sum(_lengths(plain_config(cfg), phases_of(cfg), epoch_rows).values())


def lost_since_finished(cfg: TrainConfig) -> str | None:
    """Say what of a finished run's end is damaged or gone; None: nothing, or it is not finished."""
    directory = Path(cfg.output_dir)
    file = directory / FINISHED
    if cfg.resume != "auto" or not file.is_file():
        return None
    try:
        exported = json.loads(file.read_bytes()).get("export", {}).items()
    except (AttributeError, OSError, ValueError) as error:
        return f"{file} is damaged ({error})"
    for name, size in exported:
        exports = directory / "export" / name
        if not exports.is_file() or exports.stat().st_size != size:
            return f"{exports} is not what the finished run exported"
    return None


def is_finished(cfg: TrainConfig) -> bool:
    """Whether this very run was finished before, with nothing left to do.

    Raises:
        InputError: The directory holds a finished run of another config or of other models, or
            one that cannot go on as is asked.
    """
    file = Path(cfg.output_dir) / FINISHED
    if cfg.resume != "auto" or not file.is_file():
        return False
    lost = lost_since_finished(cfg)
    if lost is not None:  # the last checkpoint gives it again
        require(
            bool(complete_checkpoints(checkpoints_of(cfg))),
            f"{lost}, and no checkpoint is left to export again: start over with resume=never",
        )
        return False
    noted = read_note(file)
    replace = "choose another root or output_dir, or resume=never to replace it"
    what = f"{cfg.output_dir} holds a finished run of another config"
    refuse_other_stage(noted, cfg, what)
    changes = changes_of(noted, cfg)
    anew = changed_content(noted, cfg, CONTENT)
    if isinstance(cfg.stage, UntrainedStageConfig):
        listed = "; ".join(str(change) for change in (changes + anew)[:5])
        for change in anew:
            _refuse_made_anew(change, cfg.output_dir, replace)
        require(not listed, f"{what} (then -> now): {listed}; {replace}")
        return True
    lengths = Lengths(noted, cfg)
    longer = lengths.then != lengths.now or lengths.changes_of_order()
    if not longer:
        groups = sorted({f"{change.kind}: {change}" for change in [*changes, *anew]})
        for change in anew:
            _refuse_made_anew(change, cfg.output_dir, f"{replace}, or give it more steps")
        require(
            not groups,
            f"{what} (then -> now): {'; '.join(groups)}; it has no steps left to make with other "
            f"values: give more steps, or {replace}",
        )
    if longer and cfg.data.on_change is OnChange["continue"]:  # the loader says what changed
        rows = {f"data.sources.{name}.path" for name in cfg.data.sources}
        anew = [change for change in anew if change.name not in rows]
    refuse_changes([*changes, *anew], cfg, what)
    return not (longer and _steps_left(cfg, lengths))


def _refuse_made_anew(change: Change, output_dir: str, fix: str) -> None:
    require(
        change.then != change.now,
        f"{output_dir} was finished before {change.now} was made anew; {fix}",
    )


def _steps_left(cfg: TrainConfig, lengths: Lengths) -> bool:
    """Whether a finished run that was given other lengths has steps left to make.

    Raises:
        InputError: It has made more, or left no checkpoint to go on from.
    """
    for name, made in lengths.then.items():
        now = lengths.now.get(name, 0)
        require(
            now >= made,
            f"{cfg.output_dir} holds a finished run of {made} steps"
            f"{f' of phase {name!r}' if name else ''}, and {now} are fewer than were made; choose "
            "another root or output_dir, resume from an earlier checkpoint with resume=<path>, or "
            "resume=never to replace it",
        )
    found = continuation(cfg)
    if found is None:
        raise InputError(
            f"{cfg.output_dir} holds a finished run of {sum(lengths.then.values())} steps that "
            "left no checkpoint to go on from (checkpoint.save_every was null): choose another "
            "root or output_dir, or resume=never to replace it"
        )
    return Lengths(read_note(found.checkpoint / STATE), cfg).num_steps > found.num_updates
