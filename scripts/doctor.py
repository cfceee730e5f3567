"""Check a run without training: `python scripts/doctor.py experiment=quickstart_opd [overrides]`.

The config, the data, the student's files, and every teacher of the cascade: its files, and its
numbers once it is open. Stops at the first thing that is wrong.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MissingMandatoryValue
from omegaconf.errors import OmegaConfBaseException

from marco_train.config import StageKind, TrainConfig, to_run
from marco_train.errors import AwayError, InputError
from marco_train.train import CONFIG_DIR

T = TypeVar("T")


def main() -> None:
    """Run all checks and say how each went."""
    start = time.perf_counter()
    try:
        cfg = checked("config", lambda: composed(sys.argv[1:]))
        check_stage(cfg)
    except (
        AwayError,
        InputError,
        MissingMandatoryValue,
        HydraException,
        OmegaConfBaseException,
    ) as error:
        sys.exit(f"error: {error}")
    print(f"all is well, {time.perf_counter() - start:.0f} s")


REFUSALS = (AwayError, InputError, MissingMandatoryValue, HydraException, OmegaConfBaseException)


def composed(overrides: list[str]) -> TrainConfig:
    """Compose and check a config as the command line does."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_run(compose("train", overrides=overrides))


def checked(what: str, check: Callable[[], T]) -> T:
    """Run one check and print its time."""
    start = time.perf_counter()
    print(f"{what} ...", end=" ", flush=True)
    found = check()
    print(f"fine, {time.perf_counter() - start:.1f} s", flush=True)
    return found


def check_stage(cfg: TrainConfig) -> None:
    """Open what a run would open; heavy libraries are imported from here on."""
    from marco_train import distributed
    from marco_train.data.chat import load_tokenizer
    from marco_train.data.loader import PromptLoader, SFTLoader
    from marco_train.models.hf_io import stored_weights, student_architecture
    from marco_train.rollout.build import check_sampler
    from marco_train.teachers.cascade import Cascade
    from marco_train.teachers.vocab import check_student_vocabulary

    distributed.start()
    stage = cfg.stage
    if stage.kind is StageKind.evaluate:
        return
    student = checked("student's shape", lambda: student_architecture(cfg))
    path = cfg.model.path
    if path is not None:
        checked("student's weights", lambda: stored_weights(path, student))
    checked("student's vocabulary", lambda: check_student_vocabulary(cfg.model))
    tokenizer = load_tokenizer(cfg.model)
    if stage.kind is StageKind.sft:
        checked("data", lambda: SFTLoader(cfg.data, stage, tokenizer, cfg.seed))
    else:
        prompts = checked("data", lambda: PromptLoader(cfg.data, stage, tokenizer, cfg.seed))
        template, kwargs = tokenizer.chat_template, tokenizer.template_kwargs
        cascade = checked(
            "teachers' files",
            lambda: Cascade(stage, cfg.model.tokenizer, template, student.vocab_size, kwargs),
        )
        cascade.check_groups(prompts.groups())
        checked("teachers' turns", lambda: cascade.check_turns(prompts.first_prompts()))
        prompts.held_out(cascade.num_held_out)
        check_sampler(stage.rollout, student)
        for phase in cascade.phases:  # compared with no answers: there is no student to ask
            checked(f"teacher {phase.name!r}", partial(cascade.teacher_at, phase.first, list))
        cascade.close()
    distributed.stop()


if __name__ == "__main__":
    main()
