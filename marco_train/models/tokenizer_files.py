"""What the files of a tokenizer say: which ids a text gets, whatever the spelling of the file."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from marco_train.errors import InputError

# What turns text into ids. The post-processor adds only what chat templates write themselves.
MEANING = ("added_tokens", "normalizer", "pre_tokenizer", "model")


def read_tokenizer(path: str | Path, owner: str) -> dict[str, Any]:
    """Read the tokenizer.json of a directory.

    Raises:
        InputError: There is none, or it is no JSON of a tokenizer.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{owner}: there is no tokenizer at {str(file)!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{owner}: {file} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{owner}: {file} describes no tokenizer; fetch it again")
    return content


def tokenizer_meaning(content: dict[str, Any]) -> dict[str, Any]:
    """Bring what decides the ids of a text into one spelling.

    Versions of the tokenizers library write merges as pairs or as strings, and leave out options of
    the model that are off. Added tokens and merges are named by id and by place, so that a
    difference names the one token or merge.
    """
    meaning = {key: content.get(key) for key in MEANING}
    meaning["added_tokens"] = {
        str(token["id"]): token for token in content.get("added_tokens") or []
    }
    model = {key: value for key, value in content["model"].items() if not _is_off(value)}
    merges = content["model"].get("merges") or []
    model["merges"] = {
        str(place): merge if isinstance(merge, str) else " ".join(merge)
        for place, merge in enumerate(merges)
    }
    return meaning | {"model": model}


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == ""


def tokenizer_digest(path: str | Path, owner: str) -> str:
    """Digest all of a tokenizer that decides tokens and where they begin in the text."""
    content = read_tokenizer(path, owner)
    decisive = tokenizer_meaning(content) | {"post_processor": content.get("post_processor")}
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def load_fast_tokenizer(path: str | Path, owner: str) -> Any:
    """Open a tokenizer of transformers.

    Raises:
        InputError: Its files are broken.
    """
    read_tokenizer(path, owner)
    # A second to import.
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises nothing more special
        said = " ".join(str(error).split())
        raise InputError(
            f"{owner}: the tokenizer in {str(path)!r} cannot be opened ({type(error).__name__}: "
            f"{said}); fetch its files again"
        ) from error
