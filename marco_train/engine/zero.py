"""The DeepSpeed dictionary of a run, every value that touches the numbers written out."""

from typing import Any

from marco_train.config.model import DType
from marco_train.config.optim import OptimConfig
from marco_train.config.parallel import REDUCE_BUCKET_ELEMENTS, ParallelConfig


def deepspeed_config(optim: OptimConfig, parallel: ParallelConfig, dtype: DType) -> dict[str, Any]:
    """Build the dictionary that `deepspeed.initialize` takes."""
    bfloat16 = dtype is DType.bfloat16
    return {
        # Batches are ours: DeepSpeed sees one backward per microbatch and one step per update.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.clip_norm,  # unset, DeepSpeed would clip at 1.0
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": False,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_scatter": True,  # required with experts
            "contiguous_gradients": True,  # required in stage 2
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
        },
        "fp16": {"enabled": False},
        # Else stage 1 keeps a bfloat16 gradient of everything beside the float32 one.
        "bf16": {"enabled": bfloat16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }
