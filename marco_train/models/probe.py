"""Fixed token ids at which two holders of one model's weights are compared."""

STRIDE = 7919  # a prime, so that the ids spread over a vocabulary that is no multiple of it
FIRST = 7


def probe_ids(count: int, vocab_size: int) -> list[int]:
    """The same ids each time, spread over the vocabulary."""
    return [(FIRST + STRIDE * place) % vocab_size for place in range(count)]
