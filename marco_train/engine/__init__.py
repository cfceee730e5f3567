"""The optimizer side of training; the only package that knows DeepSpeed."""

import logging
import os
import warnings

from marco_train.distributed import device

# Read at DeepSpeed's import; unset, it warns that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", device().type)

import deepspeed  # noqa: F401

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19 calls collectives under names that torch 2.13 is about to drop.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
