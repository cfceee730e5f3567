"""Talk to a model in the terminal: its own chat template, and the sampler of a run.

Without --prompt each line of stdin is a question that goes on from those before it; an empty line
begins anew.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path

from marco_train.commands.model import add_model_arguments
from marco_train.commands.source import escape_unprintable
from marco_train.config.lengths import positions_of
from marco_train.config.model import ChatTemplate, DType, ModelConfig
from marco_train.config.rollout import NativeRolloutConfig
from marco_train.data.chat import load_tokenizer
from marco_train.distributed import device
from marco_train.errors import InputError, require
from marco_train.hub import fetch, is_hub_id
from marco_train.types import Message, Prompt


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and answer what is asked; ends with 1 where a question cannot be."""
    args = _parser().parse_args(arguments)
    escape_unprintable()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        chat = Chat(args)
        for question in _questions() if args.prompt is None else [args.prompt]:
            if not question.strip():
                chat.turns.clear()
                continue
            print(chat.answer(question), flush=True)
    except InputError as error:
        said = str(error).replace("model.chat_template=", "--chat-template ")
        print(f"error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marco-train chat", description=__doc__)
    parser.add_argument("path", help="directory of a model, or org/name[@revision] of the hub")
    parser.add_argument("--prompt", help="a question that is answered, and no other")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="of an answer, thinking included (512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest tokens (1, as a run)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    add_model_arguments(parser)
    return parser


def _questions() -> Iterator[str]:
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(shown)
        except EOFError:
            return


class Chat:
    """A conversation with a model."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load a model and its tokenizer.

        Raises:
            InputError: They are not there, or are of no use; or an argument is out of its bounds.
        """
        require(
            args.max_tokens > 0, f"--max-tokens is {args.max_tokens}, and must be greater than 0"
        )
        require(
            0 <= args.temperature < float("inf"),
            f"--temperature is {args.temperature}, and must be 0 or more",
        )
        require(
            args.prompt is None or args.prompt.strip() != "", "--prompt is empty: ask something"
        )
        path = str(fetch(args.path)) if is_hub_id(args.path) else args.path
        require(Path(path).is_dir(), f"there is no directory {path!r}: name a model, as an export/")
        template = ChatTemplate(args.chat_template)
        cfg = ModelConfig(path=path, tokenizer=path, chat_template=template)
        self._tokenizer = load_tokenizer(cfg)
        self._positions = positions_of(Path(path))
        self._args = args
        self.turns: list[Message] = []
        # Seconds to import.
        from marco_train.models import load_model
        from marco_train.models.hf_io import stop_token_ids
        from marco_train.models.weights import torch_dtype

        self._stop_ids = stop_token_ids(path)
        self._model = load_model(path, torch_dtype(DType(args.dtype))).to(device())

    def answer(self, question: str) -> str:
        """Answer a question, in view of those before it.

        Raises:
            InputError: With them it leaves no position for an answer.
        """
        from marco_train.rollout.native import NativeSampler

        # Half of a surrogate pair is what Python makes of an argument in another encoding.
        asked = Message("user", question.encode("utf-8", "replace").decode())
        text = self._tokenizer.render([*self.turns, asked], open_answer=True).text
        ids = self._tokenizer.encoder.encode(text)[0]
        room = self._args.max_tokens
        if self._positions is not None:
            require(
                len(ids) < self._positions,
                f"the chat has {len(ids)} tokens, and the model {self._positions} positions: ask "
                "in fewer words, or begin anew",
            )
            room = min(room, self._positions - len(ids))
        is_greedy = self._args.temperature == 0
        sampler = NativeSampler(
            NativeRolloutConfig(),
            self._model,
            self._stop_ids,
            room,
            num_topk=0,
            seed=self._args.seed,
            weight_version=0,
            temperature=1.0 if is_greedy else self._args.temperature,
        )
        prompt = Prompt(len(self.turns), ids, "chat", "", "")
        (rollout,) = sampler.sample([prompt], 1, greedy=is_greedy)
        said = self._tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        self.turns += [asked, Message("assistant", said)]
        # No model writes to the terminal what a terminal obeys.
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in said)
