"""One response to read, as every place that shows it takes it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A response with its prompt."""

    facts: dict[str, Any]
    """As JSON: step, source, category, language, prompt, tokens, kl, finish_reason. `tokens` are
    texts whose concatenation is the response, `kl` the reverse KL of each in nats, or null where it
    has no loss. Of an answer to a suite's question also reference, answer, as it was read, and
    right, null of a translation."""
    html: str
    """The response as a page of its own, each token coloured by its KL."""

    @property
    def response(self) -> str:
        """Its text."""
        return "".join(self.facts["tokens"])

    @property
    def is_answer(self) -> bool:
        """Whether it answers a suite's question, and is judged."""
        return "reference" in self.facts

    @property
    def mean_kl(self) -> float | None:
        """Of the tokens that have loss, nats; None where none has."""
        known = [value for value in self.facts["kl"] if value is not None]
        return sum(known) / len(known) if known else None
