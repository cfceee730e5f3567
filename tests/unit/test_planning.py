"""The plan's counts are the model's, the loss's and the buffers' own."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from marco_train.config import TrainConfig
from marco_train.config.model import DType
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.errors import InputError
from marco_train.losses.logprobs import token_logprobs
from marco_train.metrics import StepWork
from marco_train.models.weights import random_model
from marco_train.planning import check, trace
from marco_train.planning.advice import advise
from marco_train.planning.cards import CARDS, Card, card_of, card_of_device
from marco_train.planning.check import check_free
from marco_train.planning.memory import GIB, Memory, sizes_of
from marco_train.planning.plan import make_plan
from marco_train.planning.seconds import Assumptions, Time
from marco_train.planning.shapes import student_shape, teacher_architecture
from marco_train.planning.trace import PlannedGroup, Shapes, trace_update
from marco_train.stages import opd
from tests.helpers.configs import compose_config
from tests.helpers.models import DENSE, architecture

H100 = CARDS["h100-80"]
MINI = ("model.path=x",)


def shapes(**changes: Any) -> Shapes:
    """A microbatch of four sequences, or what the changes make of it."""
    fields: dict[str, Any] = {
        "architecture": tuple(asdict(architecture(num_hidden_layers=5)).items()),
        "dtype": DType.bfloat16,
        "is_gpu": False,
        "num_tokens": 256,
        "longest": 64,
    }
    return Shapes(**fields | changes)


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("gradients", list(trace.GradientKeeping))
@pytest.mark.parametrize("experts_over", [1, 4])
def test_few_layers_tell_what_many_hold(
    recompute: Recompute, gradients: trace.GradientKeeping, experts_over: int
) -> None:
    asked = shapes(
        recompute=recompute, gradients=gradients, expert_parallel_size=experts_over, is_gpu=True
    )
    assert trace_update(asked) == trace._trace_layers(asked, 5).traced()


def grouped_products(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Operations of grouped matrix products, of their shapes; torch's counter has none."""
    return 2 * int(torch.tensor(left).prod()) * int(right[-1])


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["moe", "dense"])
def test_planned_operations_are_those_that_a_counter_sees(changes: dict[str, Any]) -> None:
    shape = architecture(**changes)
    asked = shapes(architecture=tuple(asdict(shape).items()))
    model = random_model(shape, torch.bfloat16, seed=0)
    ids = torch.randint(10, 300, (1, 256))
    positions = torch.arange(64).repeat(4)[None]
    mapping: dict[Any, Any] = {torch.ops.aten._grouped_mm: grouped_products}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        hidden = model(ids, positions)
        logprobs, _ = token_logprobs(hidden, model.head, ids[0])
        forward = counter.get_total_flops()
        logprobs.sum().backward()
    planned = trace_update(asked)
    # Torch's counter knows attention on GPUs only.
    assert planned.forward_work.layers + planned.forward_work.head == forward
    assert planned.work.layers + planned.work.head == counter.get_total_flops()


def test_attention_counts_two_products_forward_and_five_backward() -> None:
    found = trace_update(shapes())
    # Four sequences of 64, 4 heads of 8, 5 layers.
    product = 2 * 4 * 64 * 64 * 4 * 8 * 5
    assert found.forward_work.attention == 2 * product
    assert found.work.attention == 7 * product


def test_a_layer_s_gradients_stay_where_no_buffer_takes_them() -> None:
    kept = trace_update(shapes(gradients=trace.GradientKeeping.parameter))
    taken = trace_update(shapes(gradients=trace.GradientKeeping.buffer))
    size = 2 * sizes_of(architecture(num_hidden_layers=5), 1).total
    assert (kept.after.gradients, kept.after.total) == (size, size)
    assert taken.after.total == 0


@pytest.mark.parametrize(
    ("dispatch", "imbalance", "rows"),
    [
        # 256 tokens with 2 of 8 experts over 4 ranks: 128 pairs each; a token reaches a rank
        # with 1 - (6 over 2) / (8 over 2) = 13 / 28.
        (Dispatch.all_to_all, 1.0, [[128] * 4, [128] * 4]),
        (Dispatch.all_to_all, 1.5, [[128] * 4, [192] * 4]),
        (Dispatch.deduplicated, 1.0, [[118] * 4, [118] * 4, [128] * 4]),
        (Dispatch.deduplicated, 1.5, [[118] * 4, [177] * 4, [192] * 4]),
    ],
)
def test_a_rank_gets_its_share_of_rows(
    dispatch: Dispatch, imbalance: float, rows: list[list[int]]
) -> None:
    asked = shapes(expert_parallel_size=4, dispatch=dispatch, imbalance=imbalance)
    assert PlannedGroup(asked).rows.tolist() == rows


def test_more_recomputed_is_less_held_and_more_computed() -> None:
    none, attention, layer = (
        trace_update(shapes(num_tokens=2048, longest=512, recompute=recompute))
        for recompute in (Recompute.none, Recompute.attention, Recompute.layer)
    )
    held = [found.backward.activations for found in (none, attention, layer)]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    assert none.work.total < attention.work.total < layer.work.total


def test_state_of_mini_on_eight_gpus_is_as_reckoned_by_hand() -> None:
    cfg = compose_config("marco_mini_sft", *MINI)
    assert cfg.model.architecture is not None
    memory = Memory(cfg, cfg.model.architecture, 8, H100, 1.0)
    # 28 layers of 256 experts of 3 x 1,024 x 768, over 8 ranks.
    experts = 28 * 32 * 3 * 1024 * 768
    # Embeddings; queries, keys, values and outputs; routers; norms.
    layer = 1024 * 2048 * 2 + 1024 * 1024 * 2 + 1024 * 256 + 2 * 1024 + 2 * 128
    dense = 151_936 * 1024 + 28 * layer + 1024
    assert (memory.sizes.experts, memory.sizes.dense) == (experts, dense)
    assert memory.partition == dense // 8 + experts
    train = memory.train()
    assert train["weights"] == 2 * (dense + experts)
    assert train["masters"] == 4 * memory.partition and train["moments"] == 8 * memory.partition
    assert train["gradients"] == 4 * (dense + experts)  # of stage 1 in bfloat16


def test_stage_2_keeps_a_partition_of_gradients() -> None:
    cfg = compose_config("marco_mini_sft", *MINI, "parallel.zero_stage=2")
    assert cfg.model.architecture is not None
    memory = Memory(cfg, cfg.model.architecture, 64, H100, 1.0)
    assert memory.gradient_buffer == 4 * memory.partition


def test_keys_take_what_the_trainer_the_teacher_and_the_reserve_leave() -> None:
    cfg = compose_config("marco_mini_opd", *MINI)
    plan = make_plan(cfg, 8, H100)
    sample = plan.phases["sample"].components_gib
    trainer = sample["weights"] + sample["context"] + sample["communicators"]
    others = sample["sampler_weights"] + sample["teacher"] + cfg.stage.rollout.reserve_gib
    assert sample["teacher"] > 9
    left = H100.capacity_gib - trainer - others
    assert sample["kv_cache"] == pytest.approx(left, abs=0.01)


def test_a_plan_without_keys_for_one_sequence_does_not_fit() -> None:
    stays = ["parallel.offload_while_sampling=false", "parallel.zero_stage=2"]
    plan = make_plan(compose_config("marco_mini_opd", *MINI, *stays), 8, H100)
    assert plan.peak_gib < plan.capacity_gib and not plan.fits
    assert plan.lack_of_keys is not None and "give fewer reserve_gib" in plan.lack_of_keys
    stays.append("stage.rollout.reserve_gib=4.9")
    assert make_plan(compose_config("marco_mini_opd", *MINI, *stays), 8, H100).fits


def test_a_sync_keeps_a_gathered_layer_and_lays_it_out() -> None:
    cfg = compose_config("marco_mini_opd", *MINI)
    layer = 256 * 3 * 1024 * 768 * 2
    found = make_plan(cfg, 8, H100).phases["sync"].components_gib["activations"]
    assert found == pytest.approx(2 * layer / GIB, abs=1e-3)
    cfg.parallel.expert_parallel_size = 1  # what the engine keeps is the policy's own
    assert cfg.model.architecture is not None
    alone = Memory(cfg, cfg.model.architecture, 8, H100, 1.0).sync()
    assert alone["activations"] == layer


@pytest.mark.parametrize("experiment", ["marco_mini_opd", "marco_nano_opd"])
def test_more_keys_never_make_sampling_slower(experiment: str) -> None:
    cfg = compose_config(experiment, *MINI)
    for share in (0.02, 0.2, 1.0):
        found = []
        for gib in (0.1, 1.1, 2, 5, 10, 20, 40, 80):
            cfg.stage.rollout.kv_cache_gib = gib
            found.append(seconds_of_sampling(cfg, share))
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0]


def seconds_of_sampling(cfg: TrainConfig, mean_share_of_response: float) -> float:
    """Of a step on eight cards."""
    assumed = Assumptions(mean_share_of_response=mean_share_of_response)
    return Time(Memory(cfg, student_shape(cfg), 8, H100, 1.0), assumed).sample()


def test_responses_of_one_length_end_together() -> None:
    overrides = ["stage.rollout.batch_size=32", "stage.rollout.kv_cache_gib=80"]
    found = seconds_of_sampling(compose_config("marco_mini_opd", *MINI, *overrides), 1.0)
    # Of 128 responses of 8,192 tokens on a rank, 32 at a time, to prompts of 307.2.
    dense, experts = 151_936 * 1024 + 28 * 6_555_904 + 1024, 28 * 256 * 3 * 1024 * 768
    taken = 1 - (1 - 8 / 256) ** 32
    weights = 4 * 8192 * 2 * (dense + experts * taken)
    # Of 28 layers keys and values of 8 heads of 128 in bfloat16.
    keys = 128 * 28 * 2 * 8 * 128 * 2 * 8192 * (307.2 + 8192 / 2)
    assert found == pytest.approx((weights + keys) / (3350e9 * 0.8), rel=1e-6)


def test_a_batch_shrinks_as_responses_end() -> None:
    cfg = compose_config("marco_mini_opd", *MINI, "stage.rollout.kv_cache_gib=80")
    # All 128 begin at once, and end evenly over 8,192 steps.
    dense, experts = 151_936 * 1024 + 28 * 6_555_904 + 1024, 28 * 256 * 3 * 1024 * 768
    taken = sum(1 - (1 - 8 / 256) ** n for n in range(1, 129)) / 128
    weights = 8192 * 2 * (dense + experts * taken)
    lengths = [8192 * n / 128 for n in range(1, 129)]
    tokens = sum(307.2 * length + length**2 / 2 for length in lengths)
    expected = (weights + tokens * 28 * 2 * 8 * 128 * 2) / (3350e9 * 0.8)
    assert seconds_of_sampling(cfg, 0.5) == pytest.approx(expected, rel=0.02)


def test_a_sampler_leaves_room_for_the_teachers_that_are_opened_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = compose_config("marco_mini_opd", *MINI)
    student = cfg.model.architecture
    assert student is not None
    given: list[Any] = []
    monkeypatch.setattr(opd, "build_sampler", lambda *args: given.append(args[-1]))
    monkeypatch.setattr(opd, "stop_token_ids", lambda _: [])
    opd.open_sampler(cfg, student)
    planned = make_plan(cfg, 8, H100).phases["sample"].components_gib["teacher"]
    assert given[0] / GIB == pytest.approx(planned, abs=1e-3)
    cfg.stage.cascade["first"].teacher.path = "a/model/of/another/family"
    opd.open_sampler(cfg, student)
    del cfg.stage.cascade["first"]  # the other one is on servers
    opd.open_sampler(cfg, student)
    assert given[1:] == [0, 0]


def test_offload_takes_the_optimizer_off_the_card_but_for_an_update() -> None:
    cfg = compose_config("marco_mini_opd", *MINI)
    assert cfg.parallel.offload_while_sampling
    phases = make_plan(cfg, 8, H100).phases
    for name in ("sync", "sample", "score", "checkpoint"):
        assert phases[name].components_gib["moments"] == 0
    assert phases["train"].components_gib["moments"] > 16


def test_a_plan_s_phases_add_up_and_the_largest_is_its_peak() -> None:
    plan = make_plan(compose_config("marco_mini_opd", *MINI), 8, H100)
    for phase in plan.phases.values():
        assert sum(phase.components_gib.values()) == pytest.approx(phase.total_gib, abs=0.01)
    assert plan.peak_gib == max(phase.total_gib for phase in plan.phases.values())
    assert plan.phases[plan.peak_phase].total_gib == plan.peak_gib


def test_a_plan_says_what_its_hours_are_of() -> None:
    opd = make_plan(compose_config("marco_mini_opd", *MINI), 8, H100).basis
    assert opd == (
        "3800 steps; checkpoint seconds are per save, every 100 steps; GPUs of teachers on servers "
        "are not counted; assumed: 17% of a card's peak in training, 25% in scoring, 80% of its "
        "bandwidth in sampling; responses of 1638 tokens on average and 8192 at most, the batch "
        "shrinking as they end"
    )
    sft = compose_config("marco_mini_sft", *MINI, "checkpoint.save_every=null")
    said = make_plan(sft, 8, H100, Assumptions(training_efficiency=0.3)).basis
    assert said == "4000 steps; assumed: 30% of a card's peak in training"


def test_each_advice_makes_the_run_fit() -> None:
    overrides = ["parallel.recompute=none", "data.max_tokens_per_microbatch=32768"]
    cfg = compose_config("marco_mini_sft", *MINI, *overrides)
    said = advise(cfg, 8, H100, Assumptions())
    assert not make_plan(cfg, 8, H100).fits
    assert said
    for sentence in said:
        changes = sentence.partition(" makes it fit")[0].split()
        changed = compose_config("marco_mini_sft", *MINI, *overrides, *changes)
        assert make_plan(changed, 8, H100).fits, sentence
    assert said[0].startswith("parallel.recompute=")


def test_where_no_setting_helps_other_hardware_is_named() -> None:
    cfg = compose_config("marco_mini_sft", *MINI)
    small = Card("small", 30.0, 100, 1000)
    (first, *_) = advise(cfg, 8, small, Assumptions())
    assert first.startswith(("gpus=", "gpu="))


def test_a_node_without_enough_memory_does_not_fit() -> None:
    cfg = compose_config("marco_mini_opd", *MINI)
    assert make_plan(cfg, 8, H100).fits
    assert not make_plan(cfg, 8, H100, Assumptions(host_gib_per_node=200)).fits


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: card_of("h900"), "known cards are h100-80, h200-141, b200-192, a100-80"),
        (
            lambda: make_plan(compose_config("marco_mini_sft", *MINI), 12, H100),
            "gpus is 12, and parallel.expert_parallel_size 8 does not divide it",
        ),
        (
            lambda: make_plan(
                compose_config("marco_mini_opd", *MINI, "stage.cascade.first.teacher.path=Llama-3"),
                8,
                H100,
            ),
            "the shape of 'Llama-3' is not known",
        ),
        (lambda: Assumptions(training_efficiency=-0.2), "training_efficiency is -0.2"),
        (lambda: Assumptions(training_efficiency=1.5), "must be a share up to 1"),
        (lambda: Assumptions(imbalance=0), "imbalance is 0, and must be greater than 0"),
        (
            lambda: make_plan(compose_config("quickstart_evaluate"), 1, H100),
            "this stage trains nothing",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(make: Any, says: str) -> None:
    with pytest.raises(InputError) as refused:
        make()
    assert says in str(refused.value)


def test_devices_say_which_card_they_are() -> None:
    assert card_of_device("NVIDIA H100 80GB HBM3", 79.1) is CARDS["h100-80"]
    assert card_of_device("NVIDIA H200", 139.7) is CARDS["h200-141"]
    assert card_of_device("NVIDIA A100-SXM4-40GB", 39.4) is None
    assert card_of_device("NVIDIA H100 PCIe", 79.1) is None
    assert card_of_device("NVIDIA GeForce RTX 4090", 23.6) is None


def test_shapes_of_known_models_are_found_by_their_names() -> None:
    found = teacher_architecture("/models/Qwen3-30B-A3B-Instruct-2507")
    assert sizes_of(found, 1).total == 30_532_122_624  # 30.5 B, as its card says
    nano = teacher_architecture("Marco-Nano-Base")
    assert (nano.num_experts, nano.num_hidden_layers) == (232, 28)


def test_utilization_counts_tokens_losses_and_keys() -> None:
    work = StepWork(per_token=6.0, per_loss_token=3.0, per_token_and_key=0.5, peak=100.0)
    metrics = {"data/num_tokens": 20.0, "data/num_sequences": 2.0, "data/num_loss_tokens": 4.0}
    # 20 (6 + 0.5 x 10) + 4 x 3 = 232 operations in 4 s of 100 each.
    assert work.utilization(metrics, seconds=4.0) == pytest.approx(0.58)


def test_what_is_traced_leaves_torch_as_it_was() -> None:
    functions = torch.nn.functional
    before = functions.rms_norm, functions.scaled_dot_product_attention, functions.grouped_mm
    with pytest.raises(TypeError):
        trace_update(replace(shapes(), top_k="x", objective="nonsense"))  # type: ignore[arg-type]
    after = functions.rms_norm, functions.scaled_dot_product_attention, functions.grouped_mm
    assert before == after


@pytest.fixture
def eight_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "own_card", lambda: H100)
    monkeypatch.setattr(check, "world_size", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * 2**30, 80 * 2**30))


OVER = ["parallel.recompute=none", "data.max_tokens_per_microbatch=32768"]  # 112 GiB of 79


def test_a_run_that_cannot_fit_is_refused_with_what_would_help(eight_h100: None) -> None:
    cfg = compose_config("marco_mini_sft", *MINI, *OVER)
    with pytest.raises(InputError, match=r"of a GPU in its phase 'train'.*makes it fit"):
        check.check_plan(cfg, student_shape(cfg))


def test_a_run_that_cannot_fit_starts_where_it_is_asked_to(
    eight_h100: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose_config("marco_mini_sft", *MINI, *OVER, "planning.check=warn")
    assert check.check_plan(cfg, student_shape(cfg)).work is not None
    assert "the plan does not fit: parallel.recompute=" in capsys.readouterr().out
    cfg = compose_config("marco_mini_sft", *MINI, *OVER, "planning.check=off")
    assert check.check_plan(cfg, student_shape(cfg)) == check.RunPlan()
    assert capsys.readouterr().out == ""


def test_work_of_a_token_is_six_operations_for_each_of_its_parameters(eight_h100: None) -> None:
    cfg = compose_config("marco_mini_sft", *MINI)
    work = check.check_plan(cfg, student_shape(cfg)).work
    assert work is not None
    # Of a layer's matrices: queries to outputs, the router, 8 experts; norms are no products.
    layer = 1024 * 2048 * 2 + 1024 * 1024 * 2 + 1024 * 256 + 8 * 3 * 1024 * 768
    assert work.per_token == pytest.approx(6 * 28 * layer, rel=1e-3)
    assert work.per_loss_token == 6 * 151_936 * 1024
    # Scores and values of 16 heads of 128, with backward thrice, half of them seen.
    assert work.per_token_and_key == 3 * 2 * 2 * 16 * 128 * 28 / 2
    assert work.peak == 8 * 989.4e12


def test_without_a_gpu_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose_config("marco_mini_sft", *MINI, *OVER)
    plan = check.check_plan(cfg, student_shape(cfg))
    assert plan.work is None and plan.gib is not None and plan.gib > 0
    assert "GiB a rank of weights, masters and moments" in capsys.readouterr().out


def test_a_planned_peak_is_of_a_rank_and_in_gib() -> None:
    memory = Memory(
        compose_config("quickstart_sft"), architecture(), 2, Card("cpu", 8, 1, 1, is_gpu=False), 1.0
    )
    assert sum(memory.train().values()) < GIB


def test_a_card_that_another_process_fills_is_refused() -> None:
    check_free(needed_gib=70.0, free_gib=78.2, capacity_gib=79.2)
    check_free(needed_gib=78.5, free_gib=78.2, capacity_gib=79.2)  # what is held is our own
    check_free(needed_gib=20.0, free_gib=30.0, capacity_gib=79.2)
    said = "needs 70.0 GiB of a GPU, of whose 79.2 only 30.0 are free: another process holds 49.2"
    with pytest.raises(InputError, match=said):
        check_free(needed_gib=70.0, free_gib=30.0, capacity_gib=79.2)
