"""How alike the two sides of a pair are to an embedding model."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marco_train.config.curation import EmbeddingConfig
from marco_train.curation.frame import Cost, Outcome, Row, Shard, Shards, Transform
from marco_train.errors import InputError, require
from marco_train.files import replaces

DIMENSION = "dimension.json"


@dataclass(frozen=True)
class Similarity:
    """Adds the column `similarity`: the cosine of the embeddings of two texts, -1 to 1."""

    cfg: EmbeddingConfig
    texts: Callable[[Row], tuple[str, str]]
    name: str = "similarity"

    def identity(self) -> Any:
        """Return the model."""
        return [self.cfg.model, self.cfg.revision]

    def plan(self, rows: float) -> Cost:
        """Estimate batches and time."""
        return Cost(
            rows,
            embedding_batches=2 * rows / self.cfg.batch_size,
            seconds=2 * rows / self.cfg.texts_per_second,
        )

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Load the model.

        Raises:
            InputError: The package or the model cannot be loaded, or the model is of another
                dimension than that of the rows before.
        """
        embed = embedder(self.cfg)
        dimension = int(embed(["one"]).shape[1])
        known = scratch / DIMENSION
        before_it = json.loads(known.read_text()) if known.is_file() else dimension
        require(
            before_it == dimension,
            f"embedding.model {self.cfg.model!r} gives {dimension} numbers a text, and gave "
            f"{before_it} for earlier rows of this output_dir: put that model back, or choose "
            "another output_dir",
        )
        with replaces(known) as partial:
            partial.write_text(json.dumps(dimension))

        def transform(shard: Shard) -> Iterator[Outcome]:
            pairs = [self.texts(row) for row in shard.rows]
            if not pairs:
                return
            vectors = embed([text for pair in pairs for text in pair])
            cosines = (vectors[0::2] * vectors[1::2]).sum(axis=1)
            for row, cosine in zip(shard.rows, cosines, strict=True):
                yield row | {"similarity": round(float(cosine), 6)}

        yield transform


def embedder(cfg: EmbeddingConfig) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Open an embedding model; it makes vectors of length 1, [N, D], of N texts.

    Raises:
        InputError: The package or the model cannot be loaded, or it takes no texts together.
    """
    model = load_model(cfg)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = model.encode(
            list(texts),
            batch_size=cfg.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors

    return embed


def load_model(cfg: EmbeddingConfig) -> Any:
    """Load a model of sentence-transformers.

    Raises:
        InputError: The package or the model cannot be loaded, or it takes no texts together.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "embedding.model needs the package sentence-transformers: pip install "
            "'marco-train[embeddings]'; without a model LASER's score ranks"
        ) from error
    try:
        model = SentenceTransformer(cfg.model, revision=cfg.revision, device=cfg.device)
    except (OSError, ValueError) as error:
        raise InputError(
            f"embedding.model {cfg.model!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    require(
        getattr(model.tokenizer, "pad_token", "") is not None,
        f"embedding.model {cfg.model!r} has no pad token, so it cannot take texts together, and is "
        "hardly made for embeddings: name a model of sentence-transformers",
    )
    return model
