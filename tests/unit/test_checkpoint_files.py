"""Which files a model is read from, and which directories hold none that can be read.

Every layout is offered to a student, to a teacher in transformers and to one in vLLM.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from marco_train.config.servers import TeacherServersConfig
from marco_train.config.teacher import TeacherBackend
from marco_train.data.chat import CHATML
from marco_train.errors import InputError
from marco_train.models import load_model, save_model
from marco_train.models.hf_io import INDEX, WEIGHTS, read_head
from marco_train.models.upcycle import Scaling, UpcycleConfig, upcycle
from marco_train.models.weights import random_model
from marco_train.stages.checks import Checks
from marco_train.stages.opd import prepare_opd
from marco_train.teachers.preflight import check_files
from marco_train.teachers.vocab import check_head_rows
from tests.helpers.configs import compose_config
from tests.helpers.models import DENSE, architecture
from tests.helpers.teachers import teacher_config
from tests.helpers.world import World


@pytest.fixture
def model_dir(world: World, tmp_path: Path) -> Path:
    """A dense, untied model of seed 0 with the world's tokenizer."""
    shape = architecture(**DENSE, tie_word_embeddings=False)
    path = tmp_path / "model"
    save_model(random_model(shape, torch.float32, 0), path, Path(world.path("data", "tokenizer")))
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path / WEIGHTS))


def set_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def shard(path: Path, seed: int | None = None, directory: str = "") -> None:
    """Write two shards and an index, of other weights where a seed is given."""
    weights = weights_of(path)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weights = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    files = {n: f"{directory}model-0000{1 + i % 2}.safetensors" for i, n in enumerate(weights)}
    (path / directory).mkdir(exist_ok=True)
    for file in set(files.values()):
        save_file({n: w for n, w in weights.items() if files[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def only_shards(path: Path) -> None:
    shard(path)
    (path / WEIGHTS).unlink()


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change an index, and leave no single file."""

    def make(path: Path) -> None:
        only_shards(path)
        content = json.loads((path / INDEX).read_text())
        (path / INDEX).write_text(json.dumps(change(content)))

    return make


def first_entry(file: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: content | {"weight_map": content["weight_map"] | {"model.x": file}}


def stale_index(path: Path) -> None:
    shard(path, seed=7)
    for file in path.glob("model-*.safetensors"):
        file.unlink()


def instead(name: str) -> Callable[[Path], None]:
    """Leave a file of this name where the weights were."""

    def make(path: Path) -> None:
        (path / WEIGHTS).unlink()
        (path / name).write_bytes(b"weights")

    return make


def pickled(path: Path) -> None:
    torch.save(weights_of(path), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def pickled_shards(path: Path) -> None:
    instead("pytorch_model-00001-of-00001.bin")(path)
    (path / "pytorch_model.bin.index.json").write_text("{}")


def beside(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).write_text("{}")

    return make


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what the single file's header says, and nothing else."""

    def make(path: Path) -> None:
        file = path / WEIGHTS
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(change(entries)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return make


NORM = "model.norm.weight"


def norm_entry(**fields: Any) -> Callable[[Path], None]:
    return header(lambda entries: entries | {NORM: entries[NORM] | fields})


def without_norm(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if name != NORM}


def two_in_one_place(entries: dict[str, Any]) -> dict[str, Any]:
    other = "model.layers.0.input_layernorm.weight"
    return entries | {NORM: entries[NORM] | {"data_offsets": entries[other]["data_offsets"]}}


def typed(
    dtype: torch.dtype, name: str = "model.layers.0.mlp.up_proj.weight"
) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        weights = weights_of(path)
        save_file(weights | {name: weights[name].to(dtype)}, path / WEIGHTS)

    return make


def cut(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-5])


def pointer(path: Path) -> None:
    (path / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 470392\n"
    )


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda path: set_config(path, **changes)


def only_shards_in_a_directory(path: Path) -> None:
    shard(path, directory="parts/")
    (path / WEIGHTS).unlink()


@dataclass(frozen=True)
class Layout:
    """A directory, and what its readers say; None: it loads, and is the model of seed 0."""

    make: Callable[[Path], object]
    student: str | None = None
    hf: str | None = None
    vllm: str | None = None

    @classmethod
    def for_nobody(cls, make: Callable[[Path], object], said: str) -> "Layout":
        return cls(make, said, said, said)

    @classmethod
    def for_vllm(cls, make: Callable[[Path], object], said: str) -> "Layout":
        return cls(make, said, said, None)


PICKLE = r"pytorch_model.* no pickle is loaded here.*python -c .*\.save_pretrained\("
BOTH = r"model.safetensors and model.safetensors.index.json: transformers takes the single file"
QUANTISED = r"quantised weights \(quantization_config: {}\).*vllm"
LAYOUTS = {
    "one file": Layout(lambda _: None),
    "shards": Layout(only_shards),
    "one file beside other shards": Layout(lambda path: shard(path, seed=7), vllm=BOTH),
    "one file beside an old index": Layout(stale_index, vllm=BOTH),
    "one file beside another": Layout(
        lambda path: shutil.copy(path / WEIGHTS, path / "copy.safetensors"),
        vllm="do not read the same weights .*copy.safetensors",
    ),
    "one file beside pickles": Layout(
        lambda path: (path / "pytorch_model.bin").write_bytes(b"a pickle")
    ),
    "shards in a directory": Layout(
        only_shards_in_a_directory,
        vllm="do not read the same weights .*parts/model-00001.safetensors",
    ),
    "another name": Layout.for_nobody(
        lambda path: (path / WEIGHTS).rename(path / "weights.safetensors"),
        "holds weights.safetensors, and neither model.safetensors nor",
    ),
    "a pickle": Layout.for_nobody(pickled, PICKLE),
    "pickles with an index": Layout.for_nobody(pickled_shards, PICKLE),
    "a pickle of another name": Layout.for_nobody(
        instead("model.pt"), "model.pt, and no pickle is loaded here"
    ),
    "a .pth": Layout.for_nobody(instead("consolidated.00.pth"), "no pickle is loaded here"),
    "gguf": Layout.for_nobody(instead("model-Q4_K_M.gguf"), "gguf, which is not read here"),
    "h5": Layout.for_nobody(instead("tf_model.h5"), "h5, which is not read here"),
    "msgpack": Layout.for_nobody(instead("flax_model.msgpack"), "msgpack, which is not read"),
    "no weights": Layout.for_nobody(
        lambda path: (path / WEIGHTS).unlink(), "no weights: it lacks the weight files"
    ),
    "what training left": Layout.for_nobody(instead("optimizer.pt"), "no weights: it lacks"),
    "an adapter": Layout.for_nobody(
        lambda path: (
            instead("adapter_model.safetensors")(path),
            beside("adapter_config.json")(path),
        ),
        r"holds an adapter .*merge it .*merge_and_unload\(\)",
    ),
    "an adapter's weights": Layout.for_nobody(
        instead("adapter_model.bin"), r"holds an adapter .*merge it"
    ),
    "an adapter without config.json": Layout.for_nobody(
        lambda path: (path / "config.json").rename(path / "adapter_config.json"),
        r"holds an adapter .*merge it",
    ),
    "a model beside an adapter's config": Layout.for_nobody(
        beside("adapter_config.json"), "holds an adapter"
    ),
    "no config": Layout.for_nobody(
        lambda path: (path / "config.json").unlink(), "config.json does not exist"
    ),
    "a broken config": Layout.for_nobody(
        lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"
    ),
    "cut short": Layout.for_nobody(cut, "cut short"),
    "empty": Layout.for_nobody(lambda path: (path / WEIGHTS).write_bytes(b""), "cut short"),
    "a pointer of git": Layout.for_nobody(pointer, "git lfs pull"),
    "a header of another shape": Layout.for_nobody(
        norm_entry(shape=[31]), rf"{NORM} is F32 \[31\] by its header, and has 128 bytes"
    ),
    "a header of another type": Layout.for_nobody(norm_entry(dtype="F16"), f"{NORM} is F16 .* 128"),
    "a header without a shape": Layout.for_nobody(norm_entry(shape=None), f"entry of {NORM} is"),
    "a header of negative sizes": Layout.for_nobody(norm_entry(shape=[-32]), f"entry of {NORM}"),
    "a header with no places": Layout.for_nobody(norm_entry(data_offsets=[4, 0]), "to lie at"),
    "a header with a hole": Layout.for_nobody(header(without_norm), "begins at byte|promises"),
    "a header of two in one place": Layout.for_nobody(header(two_in_one_place), "begins at byte"),
    "an index without weights": Layout.for_nobody(index(lambda _: {}), "has no weight_map"),
    "an index that is a list": Layout.for_nobody(index(lambda _: []), "holds no JSON object"),
    "an index of numbers": Layout.for_nobody(index(first_entry(3)), "no index of weights: .* 3,"),
    "an index of lists": Layout.for_nobody(index(first_entry(["x"])), "no index of weights"),
    "an index that leads out": Layout.for_nobody(
        index(first_entry("../x/model.safetensors")), "no index of weights: .*below its directory"
    ),
    "an index that leads elsewhere": Layout.for_nobody(
        index(first_entry("/model.safetensors")), "no index of weights"
    ),
    "an index of pickles": Layout.for_nobody(
        index(first_entry("pytorch_model.bin")), "no index of weights: it names pytorch_model.bin"
    ),
    "an index of absent files": Layout.for_nobody(
        index(first_entry("model-9.safetensors")), "lacks the weight files model-9.safetensors"
    ),
    "an index without metadata": Layout(
        index(lambda content: {"weight_map": content["weight_map"]}), hf='has no "metadata"'
    ),
    "fp8": Layout.for_vllm(
        configured(quantization_config={"quant_method": "fp8"}), QUANTISED.format("fp8")
    ),
    "gptq": Layout.for_vllm(
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        QUANTISED.format("gptq"),
    ),
    "a method of no name": Layout.for_vllm(
        configured(quantization_config={"bits": 4}), QUANTISED.format("of no name")
    ),
    "quantised under text_config": Layout.for_vllm(
        configured(text_config={"vocab_size": 320, "quantization_config": {"quant_method": "awq"}}),
        QUANTISED.format("awq"),
    ),
    "fp8 that config.json does not tell of": Layout.for_vllm(
        typed(torch.float8_e4m3fn),
        r"quantised: 1 are not stored as one of .* model.layers.0.mlp.up_proj.weight F8_E4M3",
    ),
    "whole numbers": Layout.for_vllm(
        typed(torch.int8), r"quantised: 1 are not stored as one of .*mlp.up_proj.weight I8"
    ),
    "images": Layout.for_vllm(
        configured(vision_config={"depth": 2}), r"more than text .*\(vision_config\).*vllm"
    ),
    "sound": Layout.for_vllm(configured(audio_config={}), r"more than text .*\(audio_config\)"),
    "an encoder": Layout.for_vllm(
        configured(architectures=["Qwen3VLForConditionalGeneration"]),
        r"more than text .*\(Qwen3VLForConditionalGeneration\)",
    ),
    "other files to read": Layout.for_nobody(
        configured(transformers_weights="x.safetensors"), "other files .transformers_weights"
    ),
}


def check_with(backend: TeacherBackend, path: Path, world: World) -> None:
    given = {}
    if backend is TeacherBackend.vllm_server:
        given["servers"] = TeacherServersConfig(
            urls=["http://localhost:1"],
            max_requests=1,
            request_timeout_seconds=1,
            save_after_seconds=1,
            give_up_after_seconds=1,
            max_rejected=0.0,
        )
    cfg = teacher_config(str(path), backend, **given)
    check_files(world.path("data", "tokenizer"), CHATML.read_text(), cfg, "teacher")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_student_and_teachers_read_one_model_or_refuse_it(
    layout: Layout, model_dir: Path, world: World
) -> None:
    expected = weights_of(model_dir)
    layout.make(model_dir)
    for backend, said in ((TeacherBackend.hf, layout.hf), (TeacherBackend.vllm, layout.vllm)):
        if said is None:
            check_with(backend, model_dir, world)
        else:
            with pytest.raises(InputError, match=said):
                check_with(backend, model_dir, world)
    for read in (
        lambda: load_model(model_dir, torch.float32),
        lambda: check_with(TeacherBackend.native, model_dir, world),
    ):
        if layout.student is None:
            read()
        else:
            with pytest.raises(InputError, match=layout.student):
                read()
    if layout.student is None:
        ours = load_model(model_dir, torch.float32).state_dict()
        assert all(torch.equal(ours[name], weight) for name, weight in expected.items())
    if layout.hf is None:
        theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
        assert all(torch.equal(theirs[name], weight) for name, weight in expected.items())


class Planted:
    """What makes a file where its pickle is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_that_would_run_something_runs_nothing(
    name: str, model_dir: Path, world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (model_dir / WEIGHTS).unlink()
    torch.save({"model.norm.weight": Planted(run)}, model_dir / name)
    with pytest.raises(InputError):
        load_model(model_dir, torch.float32)
    for backend in TeacherBackend:
        if backend is not TeacherBackend.vllm_server:  # which reads no files here
            with pytest.raises(InputError):
                check_with(backend, model_dir, world)
    assert not run.exists()
    torch.load(model_dir / name, weights_only=False)
    assert run.exists()


@pytest.mark.parametrize("shape", [(8, 31, 32), (0, 32, 32)])
def test_experts_that_cannot_be_cut_apart_are_named(
    shape: tuple[int, ...], world: World, tmp_path: Path
) -> None:
    path = tmp_path / "moe"
    shutil.copytree(world.path("student"), path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(weights_of(path) | {name: torch.zeros(shape)}, path / WEIGHTS)
    with pytest.raises(InputError, match=f"1 are not of this model: {name}"):
        load_model(path, torch.float32)


def test_a_cascade_says_that_a_teacher_is_an_adapter(model_dir: Path, world: World) -> None:
    (model_dir / "config.json").rename(model_dir / "adapter_config.json")
    teacher = f"stage.cascade.first.teacher.path={model_dir}"
    cfg = compose_config("quickstart_opd", f"root={world.root}", teacher)
    with pytest.raises(InputError, match="holds an adapter"):
        prepare_opd(cfg, Checks())


def test_a_server_needs_no_weights_and_may_serve_any(model_dir: Path, world: World) -> None:
    (model_dir / WEIGHTS).unlink()
    set_config(model_dir, quantization_config={"quant_method": "fp8"}, vision_config={"depth": 2})
    check_with(TeacherBackend.vllm_server, model_dir, world)
    (model_dir / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        check_with(TeacherBackend.vllm_server, model_dir, world)


FOR_TRANSFORMERS = {
    "null": ({"vocab_size": None}, "transformers cannot read .*'vocab_size' expected int"),
    "unknown": ({"model_type": "nobody"}, "transformers cannot read .*nobody"),
    "no causal model": ({"model_type": "clip"}, "describes a clip, which transformers has no"),
}


@pytest.mark.parametrize(("change", "names"), FOR_TRANSFORMERS.values(), ids=FOR_TRANSFORMERS)
def test_what_transformers_cannot_read_is_no_teacher(
    change: dict[str, Any], names: str, model_dir: Path, world: World
) -> None:
    set_config(model_dir, **change)
    with pytest.raises(InputError, match=names):
        check_with(TeacherBackend.hf, model_dir, world)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_no_student(value: float, model_dir: Path) -> None:
    weights = weights_of(model_dir)
    broken = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    for name in broken:
        weights[name][1, 2] = value
    save_file(weights, model_dir / WEIGHTS)
    with pytest.raises(InputError, match=rf"2 weights .* not finite .*: {', '.join(broken)};"):
        load_model(model_dir, torch.float32)


def test_a_number_that_a_smaller_type_cannot_hold_is_no_student(model_dir: Path) -> None:
    weights = weights_of(model_dir)
    weights[NORM][0] = 1e30
    save_file(weights, model_dir / WEIGHTS)
    load_model(model_dir, torch.bfloat16)
    with pytest.raises(InputError, match=f"not finite in float16: {NORM}"):
        load_model(model_dir, torch.float16)


EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def tied_dir(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.path("teacher_first", "export"), tmp_path / "tied")
    return tmp_path / "tied"


def test_a_tied_head_is_stored_once_or_twice_or_as_the_head(tied_dir: Path) -> None:
    weights = weights_of(tied_dir)
    expected = weights[EMBEDDINGS].clone()
    rest = {n: w for n, w in weights.items() if n != EMBEDDINGS}
    for stored in (
        {EMBEDDINGS: expected},
        {EMBEDDINGS: expected, "lm_head.weight": expected.clone()},
        {"lm_head.weight": expected},
    ):
        save_file(rest | stored, tied_dir / WEIGHTS)
        ours = load_model(tied_dir, torch.float32)
        assert torch.equal(ours.model.embed_tokens.weight, expected)
        assert torch.equal(read_head(tied_dir), expected)
        theirs = AutoModelForCausalLM.from_pretrained(tied_dir, dtype=torch.float32)
        assert torch.equal(theirs.get_input_embeddings().weight, expected)
        assert torch.equal(theirs.get_output_embeddings().weight, expected)


def test_a_tied_head_that_differs_is_refused(tied_dir: Path) -> None:
    weights = weights_of(tied_dir)
    save_file(weights | {"lm_head.weight": weights[EMBEDDINGS] + 1}, tied_dir / WEIGHTS)
    for read in (lambda: load_model(tied_dir, torch.float32), lambda: read_head(tied_dir)):
        with pytest.raises(InputError, match=r"ties its head .*set tie_word_embeddings to false"):
            read()


def test_a_head_is_the_embeddings_only_where_both_are_tied(model_dir: Path) -> None:
    weights = weights_of(model_dir)
    head = weights.pop("lm_head.weight")
    assert torch.equal(read_head(model_dir), head)
    save_file(weights, model_dir / WEIGHTS)
    with pytest.raises(InputError, match="no output head"):
        read_head(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    del config["tie_word_embeddings"]  # which transformers then takes for false
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no output head"):
        read_head(model_dir)


def test_a_head_is_found_below_text_config(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    whole = {"model_type": "qwen3_vl", "vision_config": {"depth": 2}, "text_config": config}
    (model_dir / "config.json").write_text(json.dumps(whole))
    weights = weights_of(model_dir)
    head = weights["lm_head.weight"].clone()
    renamed = {f"model.language_{n}": w for n, w in weights.items() if n.startswith("model.")}
    save_file(renamed | {"lm_head.weight": head}, model_dir / WEIGHTS)
    assert torch.equal(read_head(model_dir), head)
    check_head_rows(320, str(model_dir), "teacher")
    config["final_logit_softcapping"] = 30.0
    (model_dir / "config.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="final_logit_softcapping"):
        read_head(model_dir)


BAD_HEADS = {
    "quantised": (lambda head: head.to(torch.float8_e4m3fn), "output head as F8_E4M3"),
    "padded": (lambda head: torch.cat([head, head[:8]]), r"\[328, 32\], and 320 tokens"),
    "not finite": (lambda head: head * float("nan"), "not finite"),
}


@pytest.mark.parametrize(("change", "names"), BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_a_head_that_cannot_be_read_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], names: str, model_dir: Path
) -> None:
    weights = weights_of(model_dir)
    save_file(weights | {"lm_head.weight": change(weights["lm_head.weight"])}, model_dir / WEIGHTS)
    with pytest.raises(InputError, match=names):
        read_head(model_dir)


def test_what_a_config_leaves_out_is_its_classs_default(model_dir: Path) -> None:
    for kind, rows in (("qwen3", 151936), ("llama", AutoConfig.for_model("llama").vocab_size)):
        config = {"model_type": kind, "hidden_size": 32}
        (model_dir / "config.json").write_text(json.dumps(config))
        check_head_rows(rows, str(model_dir), "teacher")
        with pytest.raises(InputError, match=f"has {rows} output rows and the student 320"):
            check_head_rows(320, str(model_dir), "teacher")


@pytest.mark.parametrize("at", ["config.json", "text_config", "generation_config.json"])
def test_the_end_of_a_turn_is_read_where_transformers_reads_it(
    at: str, model_dir: Path, world: World
) -> None:
    generation, config = model_dir / "generation_config.json", model_dir / "config.json"
    content = json.loads(config.read_text())
    generation.unlink()
    if at == "config.json":
        content["eos_token_id"] = 2
    elif at == "text_config":
        content = {"model_type": "outer", "text_config": content | {"eos_token_id": [5, 2]}}
    else:
        generation.write_text('{"eos_token_id": 2}')
    config.write_text(json.dumps(content))
    check_with(TeacherBackend.vllm_server, model_dir, world)
    generation.write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is not JSON"):
        check_with(TeacherBackend.vllm_server, model_dir, world)


def test_a_model_to_upcycle_is_read_like_any_other(model_dir: Path, tmp_path: Path) -> None:
    cfg = UpcycleConfig(
        num_experts=4,
        expert_width=16,
        top_k=4,
        drop_ratio=0.0,
        share_indices=True,
        scaling=Scaling.exact,
        router_std=0.0,
        seed=0,
    )
    expected = weights_of(model_dir)
    shard(model_dir, seed=7)  # beside the single file, which wins
    upcycle(model_dir, tmp_path / "moe", cfg)
    assert torch.equal(weights_of(tmp_path / "moe")[EMBEDDINGS], expected[EMBEDDINGS])
    pickled(model_dir)
    (model_dir / INDEX).unlink()
    for file in model_dir.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="no pickle is loaded here"):
        upcycle(model_dir, tmp_path / "moe", cfg)


def test_a_teacher_of_transformers_with_another_head_than_it_ties_is_refused(
    tied_dir: Path, world: World
) -> None:
    weights = weights_of(tied_dir)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tied_dir / WEIGHTS)
    check_with(TeacherBackend.hf, tied_dir, world)
    save_file(weights | {"lm_head.weight": head + 1e-3}, tied_dir / WEIGHTS)
    with pytest.raises(InputError, match="ties its head to the embeddings"):
        check_with(TeacherBackend.hf, tied_dir, world)


def test_a_weight_in_two_files_is_refused(model_dir: Path, world: World) -> None:
    only_shards(model_dir)
    names = sorted(file.name for file in model_dir.glob("model-*.safetensors"))
    one, other = (load_file(model_dir / name) for name in names[:2])
    doubled = next(iter(one))
    save_file(other | {doubled: one[doubled] + 1}, model_dir / names[1], {"format": "pt"})
    with pytest.raises(InputError, match=f"1 weights .* in several of its files: {doubled};"):
        check_with(TeacherBackend.hf, model_dir, world)


def test_double_precision_is_not_quantised(model_dir: Path, world: World) -> None:
    weights = {name: weight.double() for name, weight in weights_of(model_dir).items()}
    save_file(weights, model_dir / WEIGHTS, {"format": "pt"})
    check_with(TeacherBackend.hf, model_dir, world)
