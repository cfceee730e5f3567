"""The optimizer side of training; the only package that knows DeepSpeed."""

import logging
import os
import warnings

from marco_train.distributed import device

# Read at DeepSpeed's import; unset, it warns that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", device().type)

if device().type == "cpu":
    # Nothing here is compiled, but DeepSpeed decorates an optimizer of its own with torch.compile,
    # which would import the compiler for two seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed.ops

if device().type == "cpu":
    # DeepSpeed would probe every kernel and compile one, for a minute, that only its inference
    # uses; with none compatible, all communication is gloo's.
    deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19 calls collectives under names that torch 2.13 is about to drop.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
