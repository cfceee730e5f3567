"""Configs as the command line composes them."""

from hydra import compose, initialize_config_dir

from marco_train.config import TrainConfig, to_run
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.run import register_schemas

register_schemas()


def compose_config(experiment: str, *overrides: str) -> TrainConfig:
    """Compose and check a config as the command line does."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        composed = compose("train", overrides=[f"experiment={experiment}", *overrides])
    return to_run(composed)


# What makes AdamW plain gradient descent with rate 1: Adam's own scaling would hide a gradient
# that is wrong by a factor. m = g, v = g^2, and g / (|g| + eps) * eps = g for a large eps.
GRADIENT_DESCENT = [
    "optim.learning_rate=1e6",
    "optim.min_learning_rate=1e6",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "optim.eps=1e6",
    "optim.beta1=0.0",
    "optim.beta2=0.0",
    "optim.weight_decay=0.0",
    "optim.clip_norm=1e9",
]
