"""A teacher teaches only if it arrived whole, and is known by what it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from marco_train.config.model import DType
from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError
from marco_train.models import hf_io, load_model
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.identity import Identity, files_identity
from tests.helpers.checkpoints import AN_EXPERT, Weights, another_template, changed, with_value
from tests.helpers.configs import compose_config
from tests.helpers.models import DENSE, architecture
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import opened, teacher_config
from tests.helpers.tokenizers import TEMPLATE
from tests.helpers.world import World

IN_MEMORY = [TeacherBackend.hf, TeacherBackend.native]


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


@pytest.fixture
def teacher_dir(world: World, tmp_path: Path) -> Path:
    """A mixture whose head is its own, with tokenizer and template."""
    model = random_model(architecture(tie_word_embeddings=False), torch.float32, seed=5)
    save_model(model, tmp_path / "teacher", Path(world.path("data", "tokenizer")))
    return tmp_path / "teacher"


EXPERT = "model.layers.1.mlp.experts.2"
# How a checkpoint is changed, and what transformers' and our own model's refusals name.
WAYS: dict[str, tuple[Callable[[Weights], Weights], str, str]] = {
    "a layer absent": (
        without("layers.1."),
        r"\d+ are missing: model.layers.1.input_layernorm.weight, .* and \d+ more",
        r"\d+ are missing: model.layers.1",
    ),
    "all names prefixed": (
        lambda weights: {f"language_model.{name}": w for name, w in weights.items()},
        r"are missing: lm_head.weight, .* are not of this model: language_model.lm_head.weight",
        r"are missing: .* are not of this model: language_model.",
    ),
    "a tensor too many": (
        lambda weights: weights | {"model.extra.weight": torch.zeros(2)},
        r"1 are not of this model: model.extra.weight$",
        r"1 are not of this model: model.extra.weight$",
    ),
    "another shape": (
        lambda weights: weights | {"model.norm.weight": torch.ones(5)},
        r"1 have another shape than config.json says: model.norm.weight \[5\], not \[32\]",
        r"1 have another shape than config.json says: model.norm.weight \[5\], not \[32\]",
    ),
    "an expert absent": (
        without(f"{EXPERT}."),
        r"model.layers.1.mlp.experts.down_proj \[7, 32, 16\], not \[8, 32, 16\]",
        rf"3 are missing: {EXPERT}.gate_proj.weight",
    ),
    "a matrix of an expert absent": (
        without(f"{EXPERT}.up_proj"),
        r"cannot load it \(model.layers.1.mlp.experts.gate_up_proj\)",
        rf"1 are missing: {EXPERT}.up_proj.weight",
    ),
    "its own head absent": (
        without("lm_head"),
        "1 are missing: lm_head.weight",
        "1 are missing: lm_head.weight",
    ),
    "not a number": (
        with_value(AN_EXPERT, float("nan")),
        r"1 weights under .* hold values that .*finite.*: model.layers.1.mlp.experts.gate_up_proj",
        rf"1 weights under .* hold values that are not finite.*: {AN_EXPERT}",
    ),
    "infinity": (
        with_value("model.norm.weight", float("inf")),
        "1 weights under .* hold values that are not finite.*: model.norm.weight",
        "1 weights under .* hold values that are not finite.*: model.norm.weight",
    ),
}


@pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize(("change", "by_hf", "by_moe"), WAYS.values(), ids=WAYS.keys())
def test_a_teacher_that_did_not_arrive_whole_is_refused(
    change: Callable[[Weights], Weights], by_hf: str, by_moe: str, dtype: DType, teacher_dir: Path
) -> None:
    stored = getattr(torch, dtype.value)
    changed(teacher_dir, lambda weights: {n: w.to(stored) for n, w in weights.items()})
    for backend in IN_MEMORY:
        opened(teacher_dir, backend, dtype=dtype)
    changed(teacher_dir, change)
    for backend, names in zip(IN_MEMORY, (by_hf, by_moe), strict=True):
        with pytest.raises(InputError, match=names):
            opened(teacher_dir, backend, dtype=dtype)


def test_files_that_cannot_be_read_are_refused_in_a_sentence(teacher_dir: Path) -> None:
    file = teacher_dir / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(InputError, match=r"transformers cannot load it; it says: .*not fully"):
        opened(teacher_dir)
    file.unlink()
    with pytest.raises(InputError, match=r"cannot load it; it says: .*model\.safetensors"):
        opened(teacher_dir)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "nonesuch"},
        {"model_type": "t5"},
        {"num_attention_heads": "four"},
        {"rope_parameters": {"rope_type": "nonsense"}},
    ],
    ids=["unknown", "no decoder", "no number", "unknown positions"],
)
def test_a_config_that_transformers_cannot_use_is_refused_in_a_sentence(
    fields: dict[str, Any], teacher_dir: Path
) -> None:
    edit(teacher_dir / "config.json", lambda config: config | fields)
    with pytest.raises(InputError, match="transformers cannot load it; it says: ") as refusal:
        opened(teacher_dir)
    assert "\n" not in str(refusal.value)


def test_the_cascade_refuses_a_teacher_that_is_not_whole(world: World, teacher_dir: Path) -> None:
    changed(teacher_dir, without("layers.1."))
    path = f"stage.cascade.first.teacher.path={teacher_dir}"
    cfg = compose_config("quickstart_opd", f"root={world.root}", path)
    found = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)
    with pytest.raises(InputError, match=r"what is missing would be drawn at random; \d+ are miss"):
        found.teacher_at(0, [])


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "gemma": {"head_dim": 8},
}


def family_model(family: str, tied: bool) -> Any:
    torch.manual_seed(0)
    shape = SHAPE | FAMILIES[family] | {"tie_word_embeddings": tied}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))


def check_scores_of(teacher: Any, model: Any) -> None:
    """Compare a teacher's scores with those of a model of transformers."""
    asked = rollouts()
    for rollout, scored in zip(asked, teacher.score(asked), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([rollout.input_ids])).logits[0].float()
        first = len(rollout.prompt.input_ids) - 1
        wanted = logits[first:-1].log_softmax(-1)
        ids = torch.tensor(rollout.response_ids)
        expected = wanted[torch.arange(len(ids)), ids]
        torch.testing.assert_close(scored.scores.teacher_logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_checkpoints_of_many_families_load(family: str, tied: bool, tmp_path: Path) -> None:
    model = family_model(family, tied).eval()
    model.save_pretrained(tmp_path)
    check_scores_of(opened(tmp_path), model)
    if family.startswith("qwen3"):
        check_scores_of(opened(tmp_path, TeacherBackend.native), model)


def test_old_names_that_decide_nothing_are_let_pass(tmp_path: Path) -> None:
    model = family_model("llama", tied=False).eval()
    model.save_pretrained(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    changed(tmp_path, lambda weights: weights | old)
    check_scores_of(opened(tmp_path), model)


def edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def respell_config(path: Path) -> None:
    def respell(config: dict[str, Any]) -> dict[str, Any]:
        more = {"transformers_version": "4.1", "use_cache": False, "torch_dtype": "float16"}
        turned = dict(reversed((config | more).items()))
        assert turned["rope_theta"] == 1e4
        return turned | {"rope_theta": 10_000, "eos_token_id": None}

    edit(path / "config.json", respell)


def respell_merges(path: Path) -> None:
    def respell(tokenizer: dict[str, Any]) -> dict[str, Any]:
        merges = tokenizer["model"]["merges"]
        assert merges and isinstance(merges[0], list)
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
        return dict(reversed(tokenizer.items()))

    edit(path / "tokenizer.json", respell)


def move_template(path: Path) -> None:
    file = path / "chat_template.jinja"
    template = file.read_text()
    file.unlink()
    edit(path / "tokenizer_config.json", lambda config: config | {"chat_template": template})


def fuse_experts(path: Path) -> None:
    """Store experts as transformers holds them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def add_texts(path: Path) -> None:
    (path / "README.md").write_text("A model.")
    edit(path / "generation_config.json", lambda config: config | {"temperature": 0.6})


SPELLINGS = {
    "config": respell_config,
    "merges": respell_merges,
    "template": move_template,
    "experts": fuse_experts,
    "texts": add_texts,
}


@pytest.mark.parametrize("respell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_the_same_teacher_in_another_spelling_is_the_same(
    respell: Callable[[Path], None], teacher_dir: Path
) -> None:
    before = [opened(teacher_dir, backend).identity for backend in IN_MEMORY]
    files = files_of(teacher_dir)
    respell(teacher_dir)
    assert [opened(teacher_dir, backend).identity for backend in IN_MEMORY] == before
    if respell is not fuse_experts:
        assert files_of(teacher_dir) == files


def files_of(path: Path, served_as: str | None = None, **changes: Any) -> Identity:
    """How a teacher in vLLM is known."""
    return files_identity(teacher_config(str(path), TeacherBackend.hf, **changes), served_as)


def test_shards_are_the_same_teacher_as_one_file(
    world: World, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(teacher_dir, torch.float32)
    monkeypatch.setattr(hf_io, "SHARD_BYTES", 20_000)
    save_model(model, tmp_path / "sharded", Path(world.path("data", "tokenizer")))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for backend in IN_MEMORY:
        one, sharded = (opened(tmp_path / n, backend).identity for n in ("teacher", "sharded"))
        assert one == sharded


DIFFERENCES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "an embedding": (
        "weights",
        lambda path: changed(path, with_value("model.embed_tokens.weight", 1e-3)),
    ),
    "an expert": ("weights", lambda path: changed(path, with_value(AN_EXPERT, 1e-3))),
    "the last norm": ("weights", lambda path: changed(path, with_value("model.norm.weight", 0.5))),
    "a field of the config": (
        "config",
        lambda path: edit(path / "config.json", lambda config: config | {"rms_norm_eps": 1e-5}),
    ),
    "the template": (
        "template",
        another_template,
    ),
    "the tokenizer": (
        "tokenizer",
        lambda path: edit(
            path / "tokenizer.json", lambda content: content | {"normalizer": {"type": "NFC"}}
        ),
    ),
}


@pytest.mark.parametrize(("part", "change"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_another_teacher_is_another(
    part: str, change: Callable[[Path], None], teacher_dir: Path
) -> None:
    def found() -> list[Identity]:
        in_memory = [opened(teacher_dir, backend).identity for backend in IN_MEMORY]
        return [*in_memory, files_of(teacher_dir)]

    before = found()
    change(teacher_dir)
    for one, other in zip(before, found(), strict=True):
        assert [key for key in one if one[key] != other[key]] == [part]


def test_type_stop_and_name_are_part_of_a_teacher(teacher_dir: Path) -> None:
    plain = files_of(teacher_dir)
    assert files_of(teacher_dir, dtype=DType.bfloat16) != plain
    assert files_of(teacher_dir, stop_id=0) != plain
    assert files_of(teacher_dir, served_as="teacher") != plain


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "m.pt"])
def test_files_are_digested_whole(name: str, teacher_dir: Path) -> None:
    file = teacher_dir / name
    content = bytearray(torch.randint(256, (3_000_000,), dtype=torch.uint8).numpy().tobytes())
    file.write_bytes(content)
    plain = files_of(teacher_dir)
    for place in (0, 100_000, 1_234_567, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        assert files_of(teacher_dir) != plain
        content[place] ^= 1
    file.write_bytes(content)
    assert files_of(teacher_dir) == plain


def test_a_server_is_not_known_by_weights_that_lie_here(teacher_dir: Path) -> None:
    known, own = files_of(teacher_dir, served_as="teacher"), files_of(teacher_dir)
    (teacher_dir / "model.safetensors").write_bytes(b"of no use to a server elsewhere")
    assert files_of(teacher_dir, served_as="teacher") == known
    assert files_of(teacher_dir) != own
    assert files_of(teacher_dir, served_as="another") != known


@pytest.fixture
def resumable(world: World, tmp_path: Path) -> tuple[Path, Callable[[], Cascade]]:
    """A teacher's directory and a cascade that it opens."""
    path = tmp_path / "teacher"
    save_model(
        random_model(architecture(**DENSE), torch.float32, seed=2),
        path,
        Path(world.path("data", "tokenizer")),
    )
    given = f"stage.cascade.first.teacher.path={path}"
    cfg = compose_config("quickstart_opd", f"root={world.root}", given)
    return path, lambda: Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)


def resumed(new: Callable[[], Cascade], state: dict[str, Any]) -> Cascade:
    found = new()
    found.resume(1, json.loads(json.dumps(state)))
    return found


def test_another_teacher_under_the_same_path_does_not_resume(
    resumable: tuple[Path, Callable[[], Cascade]],
) -> None:
    path, new = resumable
    before = new()
    before.teacher_at(0, [])
    state = before.state_at(1)
    resumed(new, state).teacher_at(1, [])
    respell_config(path)
    resumed(new, state).teacher_at(1, [])
    changed(path, with_value("model.norm.weight", 0.999))
    names = r"'first' is another .* resumed \(weights: \w{32} -> \w{32}(; teacher: says .*)?\)"
    with pytest.raises(InputError, match=names):
        resumed(new, state).teacher_at(1, [])


@pytest.mark.parametrize(("away", "refused"), [(9e-4, False), (2e-3, True)])
def test_a_teacher_that_answers_otherwise_does_not_resume(
    away: float, refused: bool, resumable: tuple[Path, Callable[[], Cascade]]
) -> None:
    _, new = resumable
    before = new()
    before.teacher_at(0, [])
    state = json.loads(json.dumps(before.state_at(1)))
    state["probe_logprobs"]["first"]["teacher"][7] += away
    later = resumed(new, state)
    if not refused:
        later.teacher_at(1, [])
        # What is kept does not drift.
        assert later.state_at(1)["probe_logprobs"] == state["probe_logprobs"]
        return
    with pytest.raises(InputError, match=r"\(teacher: says of plain sentences .* than 0.001 nats"):
        later.teacher_at(1, [])
