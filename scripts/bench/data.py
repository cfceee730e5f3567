"""Time what happens to rows before a step: judging, duplicates, packing, finding the place.

    python scripts/bench/data.py --json data.json

Rows are of made-up words; the tokenizer is trained on them.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness import Bench, parser_of, span

from marco_train.config.data import DataConfig, SourceConfig
from marco_train.config.model import ModelConfig
from marco_train.config.sft import LossTokens
from marco_train.data.chat import CHATML, load_tokenizer
from marco_train.data.conversations import Source
from marco_train.data.drops import Dropped
from marco_train.data.gate import judge_structure, judge_tokens
from marco_train.data.mixture import Mixture
from marco_train.data.packing import pack_examples
from marco_train.data.render import ExampleRenderer
from marco_train.types import Example

# Words of a question and of an answer.
SHAPES = {"short": (20, 60), "long": (200, 1500)}
NUM_ROWS = {"short": 100_000, "long": 5_000}
NUM_RENDERED = {"short": 20_000, "long": 1_000}
# DAPO-Math-17k: so many rows of so many prompts.
DAPO = (1_791_700, 17_398)


def text_of(words: list[str], count: int) -> str:
    """Words in a random order."""
    return " ".join(random.choices(words, k=count))


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Let nothing be known of earlier rounds."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["MARCO_TRAIN_CACHE"] = directory
        yield


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write_rows(file: Path, shape: str) -> None:
    """Write conversations of one question and one answer."""
    words = [
        "".join(random.choices("abcdefghijklmnop", k=random.randint(2, 9))) for _ in range(4000)
    ]
    asked, answered = SHAPES[shape]
    with file.open("w") as lines:
        for _ in range(NUM_ROWS[shape]):
            turns = [
                {"role": "user", "content": text_of(words, asked)},
                {"role": "assistant", "content": text_of(words, answered)},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")


def train_tokenizer(path: Path, file: Path) -> None:
    """Train a byte-level tokenizer with ChatML on some of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=specials, show_progress=False)
    with file.open() as lines:
        rules.train_from_iterator(islice(lines, 2_000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|im_end|>")
    fast.chat_template = CHATML.read_text()
    fast.save_pretrained(path)


def bench_judging(bench: Bench) -> None:
    """Both passes of the gate, first and when they are known, in one process."""
    for shape in bench.args.shapes:
        with tempfile.TemporaryDirectory() as directory:
            file, tokenizer = Path(directory, "rows.jsonl"), Path(directory, "tokenizer")
            write_rows(file, shape)
            tokenizer.mkdir()
            train_tokenizer(tokenizer, file)
            judging_case(bench, shape, file, tokenizer)


def judging_case(bench: Bench, shape: str, file: Path, tokenizer: Path) -> None:
    """Judge the rows of a file."""
    cfg = DataConfig()
    opened = load_tokenizer(ModelConfig(tokenizer=str(tokenizer)))
    render = ExampleRenderer.of(opened, cfg, LossTokens.assistant, 1_000_000)
    found: dict[str, list[float]] = {"structure": [], "tokens": [], "known": []}
    num_tokens = 0
    for _ in range(bench.repeats):
        with fresh_cache():
            source = Source("rows", SourceConfig(path=str(file)))
            found["structure"].append(seconds(partial(judge_structure, source, cfg)))
            source.keep_first(NUM_RENDERED[shape])

            tokens = partial(judge_tokens, source, cfg, render, render.identity())
            found["tokens"].append(seconds(tokens))
            found["known"].append(seconds(tokens))
            files, _ = tokens()
            assert files is not None
            read = [files[row] for row in range(len(source))]
            num_tokens = sum(len(x[1].input_ids) for x in read if not isinstance(x, Dropped))
    minute = [60 * NUM_RENDERED[shape] / took for took in found["tokens"]]
    cells = {
        "rows": shape,
        "structure, s": span(found["structure"]),
        "of rows": NUM_ROWS[shape],
        "rendered a minute": span(minute),
        "tokens a row": num_tokens / NUM_RENDERED[shape],
        "known, s": span(found["known"]),
    }
    bench.add("judging", cells, found)


def bench_distinct(bench: Bench) -> None:
    """Keep one row of each prompt of a set like DAPO-Math-17k."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows, num_prompts = DAPO
    prompts = [
        f"Solve it step by step.\n\nNo. {n}: {random.random()} + 1?\n\n" for n in range(num_prompts)
    ]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        chosen = random.choices(range(num_prompts), k=num_rows)
        rows = {
            "prompt": [[{"role": "user", "content": prompts[n]}] for n in chosen],
            "reward_model": [{"ground_truth": str(n), "style": "rule"} for n in chosen],
            "extra_info": [{"index": str(n)} for n in range(num_rows)],
        }
        pq.write_table(pa.table(rows), f"{directory}/rows.parquet")
        cfg = SourceConfig(path=f"{directory}/rows.parquet", unique_prompts=True)
        took = []
        for _ in range(bench.repeats):
            with fresh_cache():
                Source("rows", SourceConfig(path=cfg.path))  # a table of Arrow, and its digest
                took.append(seconds(partial(Source, "rows", cfg)))
                kept = len(Source("rows", cfg))
    bench.add("distinct", {"rows": num_rows, "kept": kept, "s": span(took)}, took)


def bench_packing(bench: Bench) -> None:
    """Share of the token budget that packed sequences fill, at lengths of a log-normal law."""
    for sequences, budget in ((512, 16_384), (512, 8_192), (64, 8_192)):
        filled = []
        for _ in range(20):
            lengths = [
                min(8_192, max(16, int(random.lognormvariate(6.6, 1.0)))) for _ in range(sequences)
            ]
            examples = [Example([1] * n, [True] * n) for n in lengths]
            packed = pack_examples(examples, budget)
            filled.append(sum(batch.num_tokens for batch in packed) / (len(packed) * budget))
        cells = {
            "sequences a rank": sequences,
            "budget": budget,
            "filled": sum(filled) / len(filled),
            "range": span(filled),
        }
        bench.add("packing", cells, filled)


def bench_position(bench: Bench) -> None:
    """Find the sample that a resumed run draws first."""
    sizes = {f"source_{n}": 100_000 for n in range(10)}
    weights = {name: Fraction(1, 10) for name in sizes}
    for index in (10**6, 10**9, 10**12):
        took = [
            seconds(partial(Mixture(sizes, weights, 0).sample, index)) for _ in range(bench.repeats)
        ]
        bench.add("position", {"sample": index, "s": span(took)}, took)


PARTS = {
    "judging": bench_judging,
    "distinct": bench_distinct,
    "packing": bench_packing,
    "position": bench_position,
}


def main() -> None:
    """Run the parts that are asked for."""
    random.seed(0)
    args = parser_of(__doc__ or "", PARTS, SHAPES, ["short"]).parse_args()
    Bench(args, torch.device("cpu")).run(PARTS)


if __name__ == "__main__":
    main()
