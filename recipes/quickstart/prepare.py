"""Make the quickstart's data: rows of every task in three splits, raw text, and a tokenizer.

    python recipes/quickstart/prepare.py --out DIR [--rows 30000] [--seed 0]

    DIR/{train,development,test}/<category>.jsonl   conversations with their verifiers
    DIR/base/text.jsonl                             text without answers, for the base model
    DIR/tokenizer/                                  byte-level BPE, 1536 tokens, chat template
    DIR/manifest.json                               arguments, versions, counts, digests

A prompt's own digest decides its split, so no prompt is in two. The directory appears only when it
is complete; when it already holds what would be written, nothing is done.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random

from tasks import TASKS, WORDS, Row, name_lists

# Percent of the training rows, as in the published mixture.
SHARES: Mapping[str, int] = {
    "instruction_following": 25,
    "knowledge_reasoning": 25,
    "alignment": 10,
    "math": 10,
    "multilingual": 30,
}
SPLITS = ("train", "development", "test")
# A generator that repeats itself this often in a row has nothing new left.
PATIENCE = 300
RAW_LINES = 9000
# Fewer leave categories without held-out rows.
FEWEST_ROWS = 1000

VOCABULARY = 1536
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As Qwen splits text, with marks beside letters so that a Thai or Bengali word stays whole.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = Path(__file__).parents[2] / "marco_train" / "data" / "chat_template.jinja"
SOURCES = (Path(__file__), Path(__file__).with_name("tasks.py"), CHAT_TEMPLATE)
PACKAGES = ("babel", "reasoning-gym", "tokenizers", "transformers")
OWN_ENTRIES = (*SPLITS, "base", "tokenizer", "manifest.json")

Data = dict[str, dict[str, list[Row]]]  # split -> category -> rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the directory, unless it is there already."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description="Make the quickstart's data.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--rows", type=int, default=30_000, help="training rows (30000)")
    parser.add_argument("--seed", type=int, default=0, help="draws and orders the rows (0)")
    options = parser.parse_args(arguments)
    made_from = provenance(options.rows, options.seed)
    if is_complete(options.out, made_from):
        print(f"{options.out} is complete already: nothing to do")
        return
    try:
        if options.rows < FEWEST_ROWS:
            raise ValueError(f"--rows is {options.rows}, and at least {FEWEST_ROWS} are needed")
        refuse_foreign_files(options.out)
        data = draw_data(options.rows, options.seed)
        write_directory(options.out, data, made_from, options.seed)
    except ValueError as error:
        sys.exit(f"prepare.py: {error}")
    print(table(data))
    print(f"wrote {options.out} in {time.perf_counter() - started:.1f} s")


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, whatever the seed and the number of rows."""
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "development"}.get(bucket, "train")


def draw_data(rows: int, seed: int) -> Data:
    """Draw distinct rows until each category has its share of training rows or no more.

    Held-out rows whose fact no training row states are dropped.
    """
    data: Data = {split: {category: [] for category in SHARES} for split in SPLITS}
    answers: dict[str, str] = {}
    for category, percent in SHARES.items():
        drawn = draw_category(category, rows * percent // 100, seed, answers)
        for row in drawn:
            data[split_of(row.prompt)][category].append(row)
    known = {(row.task, row.fact) for row in each_row(data["train"])}
    for split in SPLITS:
        for category, found in data[split].items():
            answerable = [row for row in found if row.fact is None or (row.task, row.fact) in known]
            order = Random(f"{seed}/{split}/{category}")
            data[split][category] = spread(answerable, order)
    return data


def draw_category(category: str, train_rows: int, seed: int, answers: dict[str, str]) -> list[Row]:
    """Take one training row from each task in turn, and the held-out rows met on the way.

    Args:
        category: The tasks to draw from.
        train_rows: How many training rows to draw; a task that runs dry is made up by the others.
        seed: Seed of the tasks' generators.
        answers: The answer of every prompt drawn so far; grows.
    """
    live = {
        name: task.rows(Random(f"{seed}/{name}"))
        for name, task in TASKS.items()
        if task.category == category
    }
    drawn: list[Row] = []
    count = 0
    while live and count < train_rows:
        for name in list(live):
            if count == train_rows:
                break
            found = until_train_row(live[name], answers)
            drawn += found
            if found and split_of(found[-1].prompt) == "train":
                count += 1
            else:
                del live[name]
    return drawn


def until_train_row(rows: Iterator[Row], answers: dict[str, str]) -> list[Row]:
    """New rows up to and including the first that belongs to the training split."""
    found: list[Row] = []
    repeats = 0
    for row in rows:
        if row.prompt in answers:
            assert answers[row.prompt] == row.answer, f"two answers to {row.prompt!r}"
            repeats += 1
            if repeats == PATIENCE:
                break
            continue
        repeats = 0
        answers[row.prompt] = row.answer
        found.append(row)
        if split_of(row.prompt) == "train":
            break
    return found


def spread(rows: Sequence[Row], rng: Random) -> list[Row]:
    """Shuffle so that every prefix holds each task and language in its share."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.task, row.language), []).append(row)
    placed: list[tuple[float, Row]] = []
    for cell in cells.values():
        rng.shuffle(cell)
        placed += [((i + rng.random()) / len(cell), row) for i, row in enumerate(cell)]
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def each_row(categories: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """The rows of a split, category by category."""
    for rows in categories.values():
        yield from rows


def raw_lines(rng: Random) -> Iterator[tuple[str, str]]:
    """Language and text: names of one list, or words, over and over, to learn copying from."""
    lists = name_lists()
    for _ in range(RAW_LINES // 2):
        code, names = rng.choice(lists)
        yield code, "\n".join(rng.sample(names, rng.randint(2, 3)) * 3)
        yield "en", "\n".join([" ".join(rng.sample(WORDS, rng.randint(2, 4)))] * 3)


def write_directory(out: Path, data: Data, made_from: Mapping[str, object], seed: int) -> None:
    """Write everything beside `out`, then put it in place."""
    partial = out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a dead process with our number
    partial.mkdir(parents=True)
    try:
        for split in SPLITS:
            for category, rows in data[split].items():
                write_jsonl(partial / split / f"{category}.jsonl", map(conversation, rows))
        lines = base_lines(data, seed)
        write_jsonl(partial / "base" / "text.jsonl", map(base_text, lines))
        texts = [text for _, _, text in lines] + [row.answer for row in each_row(data["train"])]
        ids = write_tokenizer(partial / "tokenizer", texts)
        manifest = {
            **made_from,
            "counts": counts(data),
            "special_tokens": ids,
            "files": digests(partial),
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        (partial / "manifest.json").write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_jsonl(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")


def conversation(row: Row) -> dict[str, object]:
    """A row as it is written."""
    return {
        "messages": [
            {"role": "user", "content": row.prompt},
            {"role": "assistant", "content": row.answer},
        ],
        "category": TASKS[row.task].category,
        "language": row.language,
        "task": row.task,
        "verifier": row.verifier,
    }


def base_lines(data: Data, seed: int) -> list[tuple[str, str, str]]:
    """Category, language and text: training prompts and raw lines, no answer to anything asked."""
    rng = Random(f"{seed}/base")
    lines = [(TASKS[r.task].category, r.language, r.prompt) for r in each_row(data["train"])]
    lines += [("multilingual", language, text) for language, text in raw_lines(rng)]
    rng.shuffle(lines)
    return lines


def base_text(line: tuple[str, str, str]) -> dict[str, object]:
    """A line of the base text as it is written."""
    category, language, text = line
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "category": category, "language": language}


def write_tokenizer(path: Path, texts: Sequence[str]) -> dict[str, int]:
    """Train the tokenizer and write it; return the special tokens' ids."""
    # Seconds to import, and not needed when there is nothing to do.
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, "too little text for the vocabulary"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(path)
    return {token: tokenizer.get_vocab()[token] for token in (PAD, START, END)}


def provenance(rows: int, seed: int) -> dict[str, object]:
    """All that decides the contents of the files."""
    sources = {path.name: digest(path) for path in SOURCES}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "arguments": {"rows": rows, "seed": seed},
        "versions": {"python": python, **{name: version(name) for name in PACKAGES}},
        "sources": sources,
    }


def is_complete(out: Path, made_from: Mapping[str, object]) -> bool:
    """Whether `out` holds every file that its manifest names, made from the same things."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if {key: manifest.get(key) for key in made_from} != made_from:
        return False
    files = manifest["files"]
    return all((out / name).is_file() and digest(out / name) == files[name] for name in files)


def refuse_foreign_files(out: Path) -> None:
    """Refuse a directory that holds anything we would not have written: it would be deleted."""
    if not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name not in OWN_ENTRIES)
    if foreign:
        raise ValueError(
            f"{out} holds other files ({', '.join(foreign[:3])}): choose another --out"
        )


def counts(data: Data) -> dict[str, dict[str, Counter[str]]]:
    """Rows per split, category and task."""
    return {
        split: {category: Counter(row.task for row in rows) for category, rows in found.items()}
        for split, found in data.items()
    }


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below the directory, without the manifest."""
    return {
        path.relative_to(directory).as_posix(): digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(data: Data) -> str:
    """Rows per category and split, for the reader."""
    lines = [f"{'rows':<24}" + "".join(f"{split:>13}" for split in SPLITS)]
    for category in SHARES:
        sizes = "".join(f"{len(data[split][category]):>13}" for split in SPLITS)
        lines.append(f"{category:<24}{sizes}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
