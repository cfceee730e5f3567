"""The shared MoE model: one flow on CPU and GPU, Hugging Face names at the boundary."""

from marco_train.models.hf_io import load_model, save_model
from marco_train.models.qwen3_moe import Qwen3Moe

__all__ = ["Qwen3Moe", "load_model", "save_model"]
