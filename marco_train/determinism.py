"""Settings of the process by which a GPU gives the same numbers each time.

A CPU does so by itself, and computes the same with them as without.
"""

import os

import torch

# Read once, when a process makes its first matrix product: for torch's deterministic algorithms a
# cuBLAS workspace of a fixed size, and the two values with which no product is split over its inner
# dimension, which depends on the number of rows. vLLM sets the same, too late in the trainer's
# process.
# Source: vLLM 0.32.0, model_executor/determinism/batch_invariant.py, enable_batch_invariant_mode.
PRODUCTS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
# Makes vLLM's numbers independent of what is computed beside them, in this process and in servers
# that inherit it. Not on a CPU: there it would put kernels for GPUs in place of this process's
# softmax, mean and batched product.
BATCH_INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}


def compute_deterministically() -> None:
    """Have torch and vLLM repeat their numbers; comes before the first product and vLLM's import.

    An operation that has no deterministic form goes on, with a warning that names it.
    """
    os.environ.update(PRODUCTS)
    if torch.cuda.is_available():
        os.environ.update(BATCH_INVARIANT)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Would fill all new memory with NaN, for programs that read what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
