"""Commands in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError
from marco_train.models import load_model, save_model
from marco_train.models.hf_io import WEIGHTS
from marco_train.models.weights import random_model
from marco_train.teachers.preflight import check_files
from tests.helpers.models import DENSE, architecture, sparse_mlps
from tests.helpers.processes import REPOSITORY
from tests.helpers.teachers import teacher_config
from tests.helpers.tokenizers import TEMPLATE
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def test_the_command_line_upcycles(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    save_model(random_model(architecture(**DENSE), torch.float32, 0), dense)
    command = [
        *(sys.executable, str(REPOSITORY / "scripts" / "upcycle.py")),
        *("--dense", str(dense), "--out", str(tmp_path / "moe")),
        *("--num-experts", "8", "--expert-width", "16", "--top-k", "2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 experts of width 16, top-2" in done.stdout
    assert "layer 2/2, 0 s left" in done.stdout
    assert "paper scaling (chosen): with every slice active and nothing dropped, off" in done.stdout
    model = load_model(tmp_path / "moe", torch.float32)
    assert [torch.count_nonzero(mlp.gate.weight) for mlp in sparse_mlps(model)] == [0, 0]
    wrong = subprocess.run(
        [*command, "--overwrite", "--drop-ratio", "2"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "error: drop_ratio is 2.0, and must lie in [0, 1)"


def test_the_command_that_converts_a_pickle_does(world: World, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "teacher", world.path("data", "tokenizer")
    shape = architecture(**DENSE, tie_word_embeddings=False)
    save_model(random_model(shape, torch.float32, 0), path, Path(tokenizer))
    expected = load_file(path / WEIGHTS)
    torch.save(expected, path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()
    cfg = teacher_config(str(path), TeacherBackend.hf)
    with pytest.raises(InputError) as refusal:
        check_files(tokenizer, TEMPLATE, cfg, "teacher")
    code = str(refusal.value).split('python -c "')[1].rsplit('"', 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = load_file(path / WEIGHTS)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_files(tokenizer, TEMPLATE, cfg, "teacher")
    load_model(path, torch.float32)
