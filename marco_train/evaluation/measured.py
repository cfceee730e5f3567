"""The models that an evaluation measures, checked by their files."""

from collections.abc import Sequence

from marco_train.config import TrainConfig
from marco_train.config.architecture import read_architecture
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import check_positions
from marco_train.data.chat import Tokenizer
from marco_train.errors import require
from marco_train.models.hf_io import check_teacher_positions, stored_weights
from marco_train.teachers.preflight import check_files
from marco_train.teachers.vocab import check_head_rows, check_vocabulary


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
