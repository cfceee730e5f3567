"""What would make a run fit that does not: the smallest change first, each verified by a plan."""

from collections.abc import Callable, Iterator
from copy import deepcopy

from marco_train.config import TrainConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig
from marco_train.config.parallel import Recompute
from marco_train.config.rollout import VLLMRolloutConfig
from marco_train.errors import InputError
from marco_train.planning.cards import CARDS, Card
from marco_train.planning.plan import Plan, make_plan
from marco_train.planning.seconds import Assumptions

MOST = 3
"""Sentences that are said at most."""

Change = Callable[[TrainConfig], str | None]
"""Changes a config and names the override; None: it changes nothing here."""


def advise(cfg: TrainConfig, gpus: int, card: Card, assumed: Assumptions) -> list[str]:
    """Name changes after which a run fits: one alone, else several together, else more hardware."""
    before = make_plan(cfg, gpus, card, assumed)

    def try_out(changed: TrainConfig, ranks: int, on: Card) -> Plan | None:
        try:
            plan = make_plan(changed, ranks, on, assumed)
        except InputError:
            return None
        return plan if plan.fits else None

    said: list[str] = []
    for override, changed in _alone(cfg):
        plan = try_out(changed, gpus, card)
        if plan is not None and len(said) < MOST:
            said.append(_sentence(override, plan, before))
    if not said:
        for overrides, changed in _together(cfg):
            plan = try_out(changed, gpus, card)
            if plan is not None:
                said.append(_sentence(overrides, plan, before))
                break
    if said:
        return said
    larger = [c for c in CARDS.values() if c.capacity_gib > card.capacity_gib]
    hardware = [(f"gpus={gpus * n}", gpus * n, card) for n in (2, 4, 8)]
    hardware += [(f"gpu={c.name}", gpus, c) for c in sorted(larger, key=lambda c: c.capacity_gib)]
    for name, ranks, on in hardware:
        plan = try_out(cfg, ranks, on)
        if plan is not None and len(said) < MOST:
            said.append(_sentence(name, plan, before))
    return said or ["no change that is known here makes it fit: take a smaller model"]


def _sentence(change: str, plan: Plan, before: Plan) -> str:
    return (
        f"{change} makes it fit: {plan.peak_gib:.1f} GiB of {plan.capacity_gib:.1f} in "
        f"{plan.peak_phase} instead of {before.peak_gib:.1f} in {before.peak_phase}, "
        f"{plan.step_seconds:.0f} s a step instead of {before.step_seconds:.0f}"
    )


def _alone(cfg: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    for change in CHANGES:
        changed = deepcopy(cfg)
        override = change(changed)
        if override is not None:
            yield override, changed


def _together(cfg: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    changed, overrides = deepcopy(cfg), dict[str, str]()
    for change in CHANGES:
        override = change(changed)
        if override is not None:
            name, _, value = override.partition("=")
            overrides[name] = value
            yield " ".join(f"{n}={v}" for n, v in overrides.items()), deepcopy(changed)


def _recompute_attention(cfg: TrainConfig) -> str | None:
    if cfg.parallel.recompute is not Recompute.none:
        return None
    cfg.parallel.recompute = Recompute.attention
    return "parallel.recompute=attention"


def _offload(cfg: TrainConfig) -> str | None:
    if not isinstance(cfg.stage, OPDConfig) or cfg.parallel.offload_while_sampling:
        return None
    cfg.parallel.offload_while_sampling = True
    return "parallel.offload_while_sampling=true"


def _fewer_keys(cfg: TrainConfig) -> str | None:
    rollout = cfg.stage.rollout if isinstance(cfg.stage, OPDConfig) else None
    if not isinstance(rollout, VLLMRolloutConfig) or isinstance(rollout.kv_cache_gib, str):
        return None
    rollout.kv_cache_gib = "auto"
    return "stage.rollout.kv_cache_gib=auto"


def _recompute_layers(cfg: TrainConfig) -> str | None:
    if cfg.parallel.recompute is Recompute.layer:
        return None
    cfg.parallel.recompute = Recompute.layer
    return "parallel.recompute=layer"


def _shard_gradients(cfg: TrainConfig) -> str | None:
    if cfg.parallel.zero_stage == 2:
        return None
    cfg.parallel.zero_stage = 2
    return "parallel.zero_stage=2"


def _smaller_microbatches(cfg: TrainConfig) -> str | None:
    found = longest_sequence(cfg.stage)
    if cfg.data.max_tokens_per_microbatch <= found:
        return None
    cfg.data.max_tokens_per_microbatch = found
    return f"data.max_tokens_per_microbatch={found}"


def _shorter_responses(cfg: TrainConfig) -> str | None:
    if not isinstance(cfg.stage, OPDConfig):
        return None
    cfg.stage.max_response_length = max(1, cfg.stage.max_response_length // 2)
    return f"stage.max_response_length={cfg.stage.max_response_length}"


# Those that cost least first: nothing but time, and then what is learnt.
CHANGES: tuple[Change, ...] = (
    _recompute_attention,
    _offload,
    _fewer_keys,
    _recompute_layers,
    _shard_gradients,
    _smaller_microbatches,
    _shorter_responses,
)
