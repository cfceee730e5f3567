"""Configs as the command line composes them."""

from marco_train.config import TrainConfig
from marco_train.config.compose import read_run


def compose_config(experiment: str, *overrides: str) -> TrainConfig:
    """Compose and check a config as the command line does."""
    return read_run([f"experiment={experiment}", *overrides])


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
