"""What a plan counts does not depend on what its process has imported."""

import subprocess
import sys

# In a process of its own, as another test may have imported the compiler. `first` is what the first
# trace of a process counts.
FRESH = """
import sys
from dataclasses import asdict
import torch
from marco_train.config.model import DType
from marco_train.config.parallel import Recompute
from marco_train.planning import compiler, trace
from tests.helpers.models import architecture
assert "torch._dynamo" not in sys.modules
traced = trace.Shapes(
    architecture=tuple(asdict(architecture(num_hidden_layers=5)).items()),
    dtype=DType.bfloat16,
    is_gpu=True,
    num_tokens=256,
    longest=64,
    recompute=Recompute.attention,
)
first = trace._trace_layers(traced, 2)
assert "torch._dynamo" not in sys.modules
assert first == trace._trace_layers(traced, 2)
with trace.compiler_left_out():
    (torch.empty(2, device="meta") / 2).exp()
    told = [*compiler.StandIn.told]
    assert told and all("__dynamo_disable" in vars(function) for function in told)
    import torch._dynamo
    assert not hasattr(torch._dynamo, "no such thing")
    assert torch._dynamo.explain  # the real one's
assert torch.compile(lambda x: x / 2, backend="eager")(torch.ones(1)) == 0.5
assert not any(vars(function).get("__dynamo_disable") is function for function in told)
assert first == trace._trace_layers(traced, 2)
"""


def test_the_first_trace_of_a_process_counts_as_the_next_and_imports_no_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
