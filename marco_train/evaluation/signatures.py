"""Which experts each language uses (Marco-MoE figures 9 and 10)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from marco_train.config import TrainConfig
from marco_train.distributed import device, gather_objects
from marco_train.evaluation.dendrogram import average_linkage, cut_of, families
from marco_train.models import Qwen3Moe
from marco_train.models.routing import LanguageSignatures, Routing
from marco_train.types import Rollout


@torch.no_grad()
def language_signatures(
    model: Qwen3Moe, texts: Iterable[tuple[str, Sequence[int]]], max_tokens: int
) -> LanguageSignatures:
    """Run texts through a model and add up, by language, how often each expert is taken.

    Args:
        model: An MoE model, whole on this rank.
        texts: (language, token ids) of this rank; every token counts.
        max_tokens: Of one forward pass.

    Returns:
        The signatures over the texts of all ranks.
    """
    mine = LanguageSignatures()
    for language, batch in _by_language(texts, max_tokens):
        ids = torch.tensor([token for text in batch for token in text], device=device())
        positions = torch.cat([torch.arange(len(text), device=device()) for text in batch])
        seen = Routing()
        model(ids[None], positions[None], routing=seen)
        mine.add(language, seen.load)
    joint = LanguageSignatures()
    for of_rank in gather_objects(list(zip(mine.languages, mine.loads(), strict=True))):
        for language, load in of_rank:
            joint.add(language, load)
    return joint


def _by_language(
    texts: Iterable[tuple[str, Sequence[int]]], max_tokens: int
) -> Iterable[tuple[str, list[Sequence[int]]]]:
    """Collect each language's texts into batches of at most `max_tokens`, or of one text."""
    open_batches: dict[str, list[Sequence[int]]] = {}
    for language, text in texts:
        batch = open_batches.setdefault(language, [])
        if batch and sum(map(len, batch)) + len(text) > max_tokens:
            yield language, batch
            batch = open_batches[language] = []
        batch.append(text)
    yield from open_batches.items()


def signature_report(signatures: LanguageSignatures) -> dict[str, Any]:
    """What is found, as JSON.

    Returns:
        `expert_shares` [languages, L, E]; `distances` [languages, languages], 1 - Pearson
        correlation; `linkage`, scipy's numbering of the merges by average linkage; `families`, the
        languages that are joined up to the distance `cut`.
    """
    languages, distances = signatures.languages, signatures.distances().tolist()
    merges = average_linkage(distances)
    cut = cut_of(merges)
    return {
        "languages": languages,
        "expert_shares": signatures.shares().tolist(),
        "distances": distances,
        "linkage": [list(merge) for merge in merges],
        "cut": cut,
        "families": [[languages[n] for n in family] for family in families(merges, cut)],
    }


def signatures_of(cfg: TrainConfig, model: Qwen3Moe, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Measure which experts each language of the rollouts uses; all ranks take part."""
    texts = ((r.prompt.language, r.input_ids) for r in rollouts)
    return signature_report(language_signatures(model, texts, cfg.data.max_tokens_per_microbatch))
