"""A tokenizer of a few words, and a run's."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from marco_train.config.model import ChatTemplate, DType, ModelConfig
from marco_train.data.chat import CHATML, load_tokenizer
from marco_train.data.chat import Tokenizer as ChatTokenizer
from tests.helpers.models import VOCAB_SIZE

TEMPLATE = CHATML.read_text()


def make_tokenizer(path: Path, corpus: list[str], vocab_size: int = VOCAB_SIZE) -> None:
    """Train a byte-level tokenizer with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML.read_text()
    fast.save_pretrained(path)


def tokenizer_of(
    path: str | Path, template: ChatTemplate = ChatTemplate.tokenizer, **template_kwargs: Any
) -> ChatTokenizer:
    """A run's tokenizer, without a run."""
    cfg = ModelConfig(
        path="weights",
        tokenizer=str(path),
        chat_template=template,
        chat_template_kwargs=template_kwargs,
        dtype=DType.float32,
    )
    return load_tokenizer(cfg)
