"""Is this teacher fit to teach this student? Checked by its files, and by numbers once it is open.

Files, before any model is loaded: the same ids for the same text, the same way to open and to end a
turn. Numbers, whenever a teacher is opened: the same answer to the same question, one finite number
for each token that was asked, and not near-uniform, as a model without loaded weights is; what the
student says is likelier to it than to a uniform guess.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marco_train.config.architecture import read_architecture, read_config, read_json
from marco_train.config.teacher import TeacherBackend, TeacherConfig
from marco_train.distributed import is_main, reduce_sums
from marco_train.errors import InputError, require
from marco_train.losses.logprobs import token_logprobs
from marco_train.models.agreement import Spread, spread_of
from marco_train.models.chat_template import Encoder, render_turns
from marco_train.models.hf_io import (
    check_checkpoint,
    decoder_config,
    stop_token_ids,
    stored_weights,
)
from marco_train.models.tokenizer_files import load_fast_tokenizer
from marco_train.teachers.base import ScoreSpec, Teacher
from marco_train.teachers.vocab import check_vocabulary
from marco_train.tracking import log_line
from marco_train.types import (
    Conversation,
    FinishReason,
    HiddenScores,
    Message,
    Prompt,
    Rollout,
    ScoredRollout,
    TokenScores,
    TopKScores,
)

# One sentence in each of the paper's 29 languages.
PROBES = {
    "en": "The river was quiet in the morning.",
    "zh": "清晨的河水很安静。",
    "ar": "كان النهر هادئا في الصباح.",
    "de": "Der Fluss war am Morgen ruhig.",
    "es": "El río estaba tranquilo por la mañana.",
    "fr": "La rivière était calme le matin.",
    "ko": "아침에 강은 조용했다.",
    "ja": "朝の川は静かだった。",
    "pt": "O rio estava calmo de manhã.",
    "tr": "Nehir sabahleyin sakindi.",
    "id": "Sungai itu tenang di pagi hari.",
    "it": "Il fiume era tranquillo al mattino.",
    "nl": "De rivier was 's ochtends rustig.",
    "pl": "Rano rzeka była spokojna.",
    "ru": "Утром река была спокойной.",
    "vi": "Dòng sông yên tĩnh vào buổi sáng.",
    "th": "แม่น้ำเงียบสงบในตอนเช้า",
    "he": "הנהר היה שקט בבוקר.",
    "uk": "Вранці річка була спокійною.",
    "ms": "Sungai itu tenang pada waktu pagi.",
    "bn": "সকালে নদীটি শান্ত ছিল।",
    "cs": "Řeka byla ráno klidná.",
    "ur": "صبح کے وقت دریا پرسکون تھا۔",
    "kk": "Таңертең өзен тыныш болды.",
    "el": "Το ποτάμι ήταν ήσυχο το πρωί.",
    "ro": "Râul era liniștit dimineața.",
    "hu": "A folyó reggel csendes volt.",
    "ne": "बिहान नदी शान्त थियो।",
    "az": "Səhər çay sakit idi.",
}
# A model whose log-probabilities all lie this near to those of a uniform guess has no opinion.
UNIFORM_SPREAD = 0.05
# A mean log-probability this many times worse than a uniform guess is of no language model.
WORST_GUESSES = 3.0
# Prompts, the run's first, whose answers by the student every teacher is asked about.
NUM_ANSWERED = 64
# A student can write once its own words are, to itself, likelier than a uniform guess by half of
# what there is to be gained, log V. A language model gains four fifths and more at temperature 1.
# What a random student writes is noise, which a good teacher finds less likely than a guess.
CAN_WRITE = 0.5
# A teacher has read something if it gains a tenth of what such a student gains. Weights drawn at
# random gain nothing; a teacher 5 nats from its student still gains a half, at V = 150,000.
HAS_READ = 0.1


# Prompts of the run that each teacher's template renders; beyond these, the first of each kind.
NUM_COMPARED = 256
# Tokens before and after the first difference that a message shows.
SHOWN_BEFORE, SHOWN_AFTER = 8, 16


def check_files(
    student_tokenizer: str,
    chat_template: str,
    cfg: TeacherConfig,
    name: str,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a teacher that is no whole model, or has other tokens, turns or stops.

    How many rows its head has is compared by `check_head_rows`.

    Args:
        student_tokenizer: Directory of the student's tokenizer.
        chat_template: What the run renders conversations with.
        cfg: The teacher.
        name: What the message calls it.
        template_kwargs: Arguments of both templates. None: there are none.

    Raises:
        InputError: Says what was expected, what came and what to do.
    """
    path = cfg.path
    if cfg.backend is TeacherBackend.native:
        stored_weights(path, read_architecture(path))
    else:
        check_checkpoint(path, cfg.backend)
    check_vocabulary(student_tokenizer, path, name)
    ours = load_fast_tokenizer(student_tokenizer, "the student")
    theirs = load_fast_tokenizer(path, name)
    for language, text in PROBES.items():
        expected, found = ours(text)["input_ids"], theirs(text)["input_ids"]
        require(
            expected == found,
            f"{name} ({path}) gives {text!r} ({language}) the ids {found}, and the student "
            f"{expected}: take a teacher with the student's tokenizer",
        )
    ours.chat_template = chat_template
    _check_template(ours, theirs, template_kwargs or {}, f"{name} ({path})")
    _check_stop_ids(stop_token_ids(student_tokenizer)[0], cfg, name)


def _check_template(ours: Any, theirs: Any, template_kwargs: Mapping[str, Any], owner: str) -> None:
    """Refuse a teacher that opens a turn with other tokens."""
    require(
        bool(theirs.chat_template),
        f"{owner} has no chat template, so it never saw the turns that the student is asked in: "
        "take an instruct model, or give it the template it was trained with",
    )
    asked = Conversation(
        messages=(Message("user", PROBES["en"]),), source="", category="", language="", row=0
    )
    expected = _rendered(ours, asked, template_kwargs, "the student, asked a plain question")
    found = _rendered(theirs, asked, template_kwargs, f"{owner}, asked a plain question")
    require(
        expected == found,
        f"{owner} opens a turn with {found!r}, and the student with {expected!r}: {SAME_TEMPLATE}",
    )


SAME_TEMPLATE = (
    "train the student with the teacher's template (model.tokenizer=<directory of the teacher> "
    "model.chat_template=tokenizer), or choose with model.chat_template_kwargs what both open a "
    "turn with"
)


def _rendered(
    tokenizer: Any, conversation: Conversation, template_kwargs: Mapping[str, Any], owner: str
) -> str:
    """The text of a prompt, with the turn of its answer opened."""
    asked, tools = conversation.asked, conversation.tools
    try:
        return render_turns(tokenizer, asked, template_kwargs, tools, open_answer=True).text
    except InputError as error:
        raise InputError(f"{owner}: {error}; {SAME_TEMPLATE}") from error


class FirstOfEachKind:
    """Chooses a run's first conversations, and of those that follow the first of each kind."""

    def __init__(self) -> None:
        self._num_chosen = 0
        self._kinds: set[str] = set()

    def __call__(self, conversation: Conversation) -> bool:
        """Whether the prompt of a conversation is to be compared."""
        kinds = kinds_of(conversation)
        if self._num_chosen >= NUM_COMPARED and kinds <= self._kinds:
            return False
        self._num_chosen += 1
        self._kinds |= kinds
        return True


def kinds_of(conversation: Conversation) -> set[str]:
    """Say what a prompt holds beside one question, of what templates are known to render apart."""
    asked = conversation.asked
    roles = [message.role for message in asked]
    answers = [message for message in asked if message.role == "assistant"]
    found = {
        "a system turn": "system" in roles,
        "a tool turn": "tool" in roles,
        "several turns": roles.count("user") > 1,
        "an earlier answer with <think>": any(
            "<think>" in answer.content or answer.reasoning_content for answer in answers
        ),
        "tools": bool(conversation.tools),
        "a call of a tool": any(answer.tool_calls for answer in answers),
    }
    return {kind for kind, holds in found.items() if holds}


def check_turns(
    prompts: Iterable[tuple[Conversation, Prompt]],
    path: str,
    template_kwargs: Mapping[str, Any],
    name: str,
) -> str:
    """Refuse a teacher whose own template renders prompts of the run otherwise than the run does.

    It would score its answers to turns that it never saw.

    Args:
        prompts: Of the run's data, with the conversations that they were rendered from.
        path: Directory of the teacher.
        template_kwargs: Arguments of the template.
        name: What the message calls the teacher.

    Returns:
        The template.

    Raises:
        InputError: Shows the first difference.
    """
    theirs = load_fast_tokenizer(path, name)
    encoder = Encoder(theirs)
    for conversation, prompt in prompts:
        kinds = ", ".join(sorted(kinds_of(conversation))) or "one question"
        where = f"source {conversation.source!r}, row {conversation.row} (from 0; {kinds})"
        owner = f"{name} ({path}), given the prompt of {where}"
        text, expected = _rendered(theirs, conversation, template_kwargs, owner), prompt.input_ids
        found, _ = encoder.encode(text)
        # The run cuts tokens where an answer begins, which this template may not mark.
        if found == expected or theirs.decode(expected) == text:
            continue
        pairs = enumerate(zip(expected, found, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
        window = slice(max(0, place - SHOWN_BEFORE), place + SHOWN_AFTER)
        raise InputError(
            f"{name} ({path}) renders the prompt of {where} otherwise than the run: at token "
            f"{place} it has {theirs.decode(found[window])!r}, and the run "
            f"{theirs.decode(expected[window])!r}; it would score answers to turns that it was not "
            f"trained on: {SAME_TEMPLATE}"
        )
    return str(theirs.get_chat_template())


def _check_stop_ids(student: int, cfg: TeacherConfig, name: str) -> None:
    """Refuse a teacher that ends a turn with another token: responses would grow without end."""
    vocab_size = decoder_config(cfg.path).get("vocab_size", 0)
    require(
        cfg.stop_id is None or 0 <= cfg.stop_id < vocab_size,
        f"{name}: stop_id is {cfg.stop_id}, and must be one of the {vocab_size} ids",
    )
    generation = Path(cfg.path) / "generation_config.json"
    if generation.is_file():
        file, found = generation, read_json(generation).get("eos_token_id")
    else:  # the decoder's part of a config says it where the whole does not
        file, found = Path(cfg.path) / "config.json", read_config(cfg.path).get("eos_token_id")
        found = decoder_config(cfg.path).get("eos_token_id") if found is None else found
    stops = found if isinstance(found, list) else [] if found is None else [found]
    require(
        cfg.stop_id is None or cfg.stop_id in stops,
        f"{name} stops at {stops} ({file}), and its stop_id is {cfg.stop_id}: give one of these, "
        "or null where it ends a turn as the student does",
    )
    require(
        cfg.stop_id is not None or student in stops,
        f"{name} stops at {stops} ({file}), and the student ends a turn with {student}: a "
        "student that stops elsewhere than its teacher makes responses grow without end; take a "
        "chat teacher of the student's family, correct the teacher's eos_token_id, or say with "
        "stop_id which token ends its turns",
    )


def probe_rollouts(tokenizer_dir: str, spec: ScoreSpec) -> list[Rollout]:
    """The probe sentences as rollouts: the second half answers the first."""
    tokenizer = load_fast_tokenizer(tokenizer_dir, "the student")
    rollouts = []
    for index, (language, text) in enumerate(PROBES.items()):
        ids: list[int] = tokenizer(text)["input_ids"]
        middle = max(1, len(ids) // 2)
        response = ids[middle:]
        rollouts.append(
            Rollout(
                prompt=Prompt(index, ids[:middle], "preflight", "preflight", language),
                sample_index=0,
                response_ids=response,
                sampler_logprobs=[0.0] * len(response),
                topk_ids=[list(range(spec.top_k))] * len(response),
                finish_reason=FinishReason.length,
                weight_version=0,
            )
        )
    return rollouts


def check_scores(
    teacher: Teacher, rollouts: Sequence[Rollout], vocab_size: int, bound: Spread, name: str
) -> list[float]:
    """Refuse a teacher whose numbers cannot be trusted; every rank takes part.

    Args:
        teacher: Just opened.
        rollouts: Probe sentences, as `probe_rollouts` makes them.
        vocab_size: V.
        bound: How far two answers to one question may be apart.
        name: What the message calls the teacher.

    Returns:
        What it said: one number for each token of the responses, in nats.

    Raises:
        InputError: Says what was expected, what came and what to do.
    """
    once, again = teacher.score(rollouts), teacher.score(rollouts)
    require(
        len(once) == len(rollouts),
        f"{name} answered {len(once)} of {len(rollouts)} rollouts; it is broken or overloaded",
    )
    logprobs = []
    probe_logprobs: list[float] = []
    for rollout, scored in zip(rollouts, once, strict=True):
        expected = len(rollout.response_ids)
        echoed = scored.rollout.input_ids == rollout.input_ids
        require(echoed, f"{name} scored other tokens than it was sent")
        for field, value in vars(scored.scores).items():
            require(
                len(value) == expected,
                f"{name} gave {len(value)} {field} for {expected} tokens of a response: its scores "
                "stand at other tokens than they belong to",
            )
            require(
                bool(value.isfinite().all()),
                f"{name} gave {field} that are not finite: its weights or its type are broken",
            )
        logprobs.append(_token_logprobs(teacher, scored))
        probe_logprobs += logprobs[-1].view(expected, -1).mean(1).tolist()
    repeated = [_token_logprobs(teacher, scored) for scored in again]
    apart = spread_of(torch.cat(logprobs), torch.cat(repeated))
    require(
        apart.within(bound),
        f"{name} answered one question twice with log-probabilities that differ by {apart} "
        f"(bound: {bound}): scores depend on what else it computes; switch that off",
    )
    _check_opinion(torch.cat(logprobs), vocab_size, name)
    return probe_logprobs


def same_answers(known: Sequence[float], found: Sequence[float], bound: Spread) -> bool:
    """Whether two openings of a teacher said the same of the probe sentences."""
    if len(known) != len(found) or not known:
        return len(known) == len(found)
    return spread_of(torch.tensor(known), torch.tensor(found)).within(bound)


def compare_with_student(
    teacher: Teacher, answers: Sequence[Rollout], vocab_size: int, name: str
) -> None:
    """Say how likely a teacher finds the student's answers; every rank takes part.

    Args:
        teacher: Just opened.
        answers: This rank's share of the student's answers; without any, nothing is said.
        vocab_size: V.
        name: What the message calls the teacher.

    Raises:
        InputError: On every rank, where the student can write and the teacher is no better at it
            than a uniform guess. Gives the three figures, nats a token in the mean.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # of the teacher, of the student, tokens
    for scored in teacher.score(answers):
        theirs = _answer_logprobs(teacher, scored, vocab_size)
        own = torch.tensor(scored.rollout.sampler_logprobs)
        known = theirs.isfinite()
        sums += torch.stack([theirs[known].sum(), own[known].sum(), known.sum()])
    of_teacher, of_student, num_tokens, num_answers = reduce_sums([*sums.tolist(), len(answers)])
    if not num_tokens:
        return
    of_teacher, of_student = of_teacher / num_tokens, of_student / num_tokens
    uniform = -math.log(vocab_size)
    figures = (
        f"{name} gives the student's answers to {num_answers:.0f} prompts {of_teacher:.2f} nats a "
        f"token; the student itself {of_student:.2f}, a uniform guess {uniform:.2f}"
    )
    gained = of_student - uniform
    require(
        gained < CAN_WRITE * -uniform or of_teacher - uniform >= HAS_READ * gained,
        f"{figures}: over a guess the teacher gains less than a tenth of what the student gains; "
        "its weights did not arrive, or it never saw such text: fetch it anew, or take another",
    )
    if is_main():
        log_line(figures)


def _answer_logprobs(teacher: Teacher, scored: ScoredRollout, vocab_size: int) -> Tensor:
    """The teacher's log-probability of each token of a response, [R] float32.

    Of a token beyond the K that are told apart, it is taken to be an even share of what is left.
    """
    scores = scored.scores
    if not isinstance(scores, TopKScores):
        return _token_logprobs(teacher, scored)
    logprobs = scores.teacher_topk_logprobs
    num_others = vocab_size - logprobs.shape[1]
    left = (1 - logprobs.exp().sum(1)).clamp_min(torch.finfo(torch.float32).eps)
    others = left.log() - math.log(max(1, num_others))
    found = scores.topk_ids == torch.tensor(scored.rollout.response_ids)[:, None]
    return torch.where(found.any(1), torch.where(found, logprobs, 0.0).sum(1), others)


def _token_logprobs(teacher: Teacher, scored: ScoredRollout) -> Tensor:
    """Log-probabilities that the scores tell of, whichever kind they are, [n] float32."""
    if isinstance(scored.scores, TokenScores):
        return scored.scores.teacher_logprobs
    if isinstance(scored.scores, HiddenScores):
        assert teacher.head is not None
        hidden = scored.scores.teacher_hidden.to(teacher.head.device)
        targets = torch.tensor(scored.rollout.response_ids, device=hidden.device)
        return token_logprobs(hidden, teacher.head, targets)[0].cpu()
    return scored.scores.teacher_topk_logprobs.flatten()


def _check_opinion(logprobs: Tensor, vocab_size: int, name: str) -> None:
    uniform = -math.log(vocab_size)
    spread = float((logprobs - uniform).abs().max())
    require(
        spread >= UNIFORM_SPREAD,
        f"{name} finds all tokens alike (log-probabilities within {spread:.3g} nats of a uniform "
        f"guess over {vocab_size} tokens): its weights did not arrive; open it anew",
    )
    mean = float(logprobs.mean())
    require(
        mean >= WORST_GUESSES * uniform,
        f"{name} gives plain sentences {mean:.3g} nats a token, and a uniform guess {uniform:.3g}: "
        "no language model is that wrong; its weights or its vocabulary are not what they seem",
    )
