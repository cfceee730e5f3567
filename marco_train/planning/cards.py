"""What accelerators can hold and do.

Capacity is what CUDA gives a process (`torch.cuda.mem_get_info`), in GiB; products are dense, in
bfloat16 with sums in float32, as the makers state them:

h100-80   989.4 TFLOP/s and 3.35 TB/s: NVIDIA H100 Tensor Core GPU data sheet, SXM; its 1,979 are
          with sparsity
h200-141  the same products and 4.8 TB/s: NVIDIA H200 Tensor Core GPU data sheet, SXM
b200-192  2,250 TFLOP/s and 8 TB/s: NVIDIA DGX B200 data sheet, an eighth of a system's 72 PFLOP/s
          in FP8 with sparsity, a quarter of that without sparsity in bfloat16, and of its 64 TB/s
a100-80   312 TFLOP/s and 2.039 TB/s: NVIDIA A100 Tensor Core GPU data sheet, SXM
"""

from dataclasses import dataclass

from marco_train.errors import InputError


@dataclass(frozen=True)
class Card:
    """An accelerator, or the memory of a machine without one."""

    name: str
    capacity_gib: float
    tflops: float
    """Of dense products in bfloat16."""
    bandwidth_gb: float
    """Of its memory, 10^9 bytes a second."""
    is_gpu: bool = True


CARDS = {
    card.name: card
    for card in (
        Card("h100-80", 79.2, 989.4, 3350),
        Card("h200-141", 139.8, 989.4, 4800),
        Card("b200-192", 178.4, 2250, 8000),
        Card("a100-80", 79.2, 312, 2039),
    )
}
# What a card's own name has to hold, and GiB that it has at least.
DEVICES = {"h100-80": ("H100", 75), "h200-141": ("H200", 130), "b200-192": ("B200", 170)}
DEVICES |= {"a100-80": ("A100", 75)}


def card_of(name: str) -> Card:
    """Find a card by its name.

    Raises:
        InputError: It is unknown; lists those that are known.
    """
    if name not in CARDS:
        raise InputError(f"gpu is {name!r}, and known cards are {', '.join(CARDS)}: choose one")
    return CARDS[name]


def card_of_device(device_name: str, capacity_gib: float) -> Card | None:
    """Find the card that a device says it is. None: it is unknown, and so is what it can do.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        capacity_gib: Of its memory.
    """
    for name, (word, least_gib) in DEVICES.items():
        if word in device_name and "PCIe" not in device_name and capacity_gib >= least_gib:
            return CARDS[name]
    return None
