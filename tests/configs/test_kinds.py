"""Samplers and teachers are one of several kinds, each with fields of its own and no others."""

from dataclasses import fields

import pytest

from marco_train.config.rollout import (
    NativeRolloutConfig,
    RolloutConfig,
    VLLMRolloutConfig,
    VLLMServerRolloutConfig,
)
from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.errors import InputError
from tests.helpers.configs import compose_config

SHARED = {
    "rollout": {"backend", "canary_tolerance", "replay_routing"},
    "teacher": {"backend", "path", "dtype", "stop_id"},
}
OWN = {
    ("rollout", "native"): {"batch_size"},
    ("rollout", "vllm"): {
        *("batch_size", "max_tokens_per_batch", "kv_cache_gib", "reserve_gib", "expert_parallel")
    },
    ("rollout", "vllm_server"): {"servers", "sync_path", "weights_by", "max_staleness"},
    ("teacher", "hf"): {"max_tokens_per_batch"},
    ("teacher", "native"): {"max_tokens_per_batch", "expert_parallel_size"},
    ("teacher", "vllm"): {"max_tokens_per_batch", "kv_cache_gib"},
    ("teacher", "vllm_server"): {"servers"},
}
CLASSES: dict[tuple[str, str], type[RolloutConfig] | type[TeacherConfig]] = {
    ("rollout", "native"): NativeRolloutConfig,
    ("rollout", "vllm"): VLLMRolloutConfig,
    ("rollout", "vllm_server"): VLLMServerRolloutConfig,
    ("teacher", "hf"): HFTeacherConfig,
    ("teacher", "native"): NativeTeacherConfig,
    ("teacher", "vllm"): VLLMTeacherConfig,
    ("teacher", "vllm_server"): VLLMServerTeacherConfig,
}
PLACES = {"rollout": "stage.rollout", "teacher": "stage.cascade.first.teacher"}
VALUES = {
    "sync_path": "x",
    "weights_by": "nccl",
    "servers": "{urls:['http://a:1']}",
    "kv_cache_gib": "0.5",
}
# Each kind, with each field that only others have.
FOREIGN = {
    (group, kind, name)
    for group, kind in OWN
    for other_group, other in OWN
    if other_group == group
    for name in OWN[group, other] - OWN[group, kind]
}


@pytest.mark.parametrize(("group", "kind"), OWN)
def test_a_kind_has_the_fields_of_all_and_its_own(group: str, kind: str) -> None:
    stage = compose_config("quickstart_opd", f"{group}@{PLACES[group]}={kind}").stage
    chosen = stage.rollout if group == "rollout" else stage.cascade["first"].teacher
    assert type(chosen) is CLASSES[group, kind]
    assert {field.name for field in fields(chosen)} == SHARED[group] | OWN[group, kind]
    assert chosen.backend.value == kind


@pytest.mark.parametrize(("group", "kind", "name"), sorted(FOREIGN))
def test_a_field_of_another_kind_is_refused_with_the_names_that_exist(
    group: str, kind: str, name: str
) -> None:
    place = PLACES[group]
    with pytest.raises(InputError) as refused:
        compose_config(
            "quickstart_opd",
            f"{group}@{place}={kind}",
            f"{place}.{name}={VALUES.get(name, '1')}",
        )
    said, _, known = str(refused.value).partition("; known are ")
    assert said == f"there is no {place}.{name} with {place}.backend={kind}"
    assert set(known.split(", ")) == SHARED[group] | OWN[group, kind]


@pytest.mark.parametrize(("group", "kind"), OWN)
def test_a_backend_is_chosen_by_its_group_alone(group: str, kind: str) -> None:
    place = PLACES[group]
    others = [other for other_group, other in OWN if other_group == group and other != kind]
    for other in others:
        with pytest.raises(InputError, match=rf"backend is {other}, .* choose {group}@.*={other} "):
            compose_config("quickstart_opd", f"{group}@{place}={kind}", f"{place}.backend={other}")
