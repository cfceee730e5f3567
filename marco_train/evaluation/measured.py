"""The models that an evaluation measures, checked by their files."""

from collections.abc import Sequence
from dataclasses import dataclass

from marco_train.config import TrainConfig
from marco_train.config.architecture import read_architecture
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import check_positions
from marco_train.data.chat import Tokenizer
from marco_train.errors import require
from marco_train.models import Qwen3Moe, load_model
from marco_train.models.hf_io import check_teacher_positions, stored_weights
from marco_train.models.weights import torch_dtype
from marco_train.teachers.preflight import check_files
from marco_train.teachers.vocab import check_head_rows, check_vocabulary


@dataclass(frozen=True)
class Measured:
    """A model to be measured."""

    kind: str
    """`models`, whose KL to each teacher is measured too, or `teachers`; a key of the report."""
    name: str
    path: str

    def load(self, cfg: TrainConfig) -> Qwen3Moe:
        """Load it whole on every rank."""
        return load_model(self.path, torch_dtype(cfg.model.dtype))


def measured_models(cfg: TrainConfig) -> list[Measured]:
    """List what is measured.

    Raises:
        InputError: Nothing is.
    """
    stage: EvaluateConfig = cfg.stage
    models = [Measured("models", name, path) for name, path in stage.models.items()]
    teachers = [Measured("teachers", name, cfg.path) for name, cfg in stage.teachers.items()]
    require(bool(models + teachers), "stage.models and stage.teachers are both empty: name a model")
    return models + teachers


def shared_vocabulary(measured: Sequence[Measured]) -> int:
    """Output rows of the first model, which all others have to have too."""
    return read_architecture(measured[0].path).vocab_size


def check_measured(
    cfg: TrainConfig, tokenizer: Tokenizer, vocab_size: int, measured: Measured
) -> Measured:
    """Check the files of a model; it is not loaded.

    Args:
        cfg: The run.
        tokenizer: The run's.
        vocab_size: Output rows that all models have to have.
        measured: The model.

    Returns:
        The model.

    Raises:
        InputError: It cannot be loaded, has other tokens, turns or stops, a head of another size,
            or too few positions.
    """
    name, path = measured.name, measured.path
    found = read_architecture(path)  # our own model samples the teachers' answers too
    stored_weights(path, found)
    check_positions(cfg.stage, found.max_position_embeddings, f"{name} ({path})")
    if measured.kind == "teachers":
        teacher = cfg.stage.teachers[name]
        turns = tokenizer.chat_template, teacher, name, tokenizer.template_kwargs
        check_files(cfg.model.tokenizer, *turns)
        check_teacher_positions(cfg.stage, teacher, name)
    else:
        check_vocabulary(cfg.model.tokenizer, path, name)
    check_head_rows(vocab_size, path, name)
    return measured
