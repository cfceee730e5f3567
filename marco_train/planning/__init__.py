"""What a run needs before it starts: memory by rank and component, time, cost.

    config, card -> trace (meta device) -> memory of each phase -> seconds -> plan -> advice

Bytes come from the model, the loss and the buffers that the code itself makes, shapes only; seconds
from arithmetic with factors that are stated in each plan. Nothing is loaded and no GPU is needed.
"""
