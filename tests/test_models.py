import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmlabel import models


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[str]]]:
    """A wheel, a stand-in for `pip download` that delivers it, and the calls it got."""
    made = tmp_path / "index" / "demo-1.0-py3-none-any.whl"
    made.parent.mkdir()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("demo/data.bin", b"content")
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("LLMLABEL_CACHE", str(tmp_path / "cache"))
    return made, calls


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_member_is_downloaded_once(wheel: tuple[Path, list[list[str]]]) -> None:
    made, calls = wheel
    source = f"wheel:demo==1.0/demo/data.bin#sha256={sha(made)}"
    assert Path(models.fetch(source)).read_bytes() == b"content"
    assert Path(models.fetch(source)).read_bytes() == b"content"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert models.local_path(source) is None


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(
    wheel: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"demo==1.0: the wheel's sha256 is .*expected 0000"):
        models.fetch(f"wheel:demo==1.0/demo/data.bin#sha256={'0' * 64}")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "source", ["wheel:demo/x#sha256=" + "0" * 64, "wheel:demo==1.0#sha256=1", "wheel:demo==1/x"]
)
def test_a_misspelt_wheel_says_how_to_write_it(source: str) -> None:
    with pytest.raises(ValueError, match="write wheel:DIST==VERSION"):
        models.fetch(source)


def test_a_missing_member(wheel: tuple[Path, list[list[str]]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"the wheel holds no 'demo/other'"):
        models.fetch(f"wheel:demo==1.0/demo/other#sha256={sha(wheel[0])}")


def test_packages_are_found_without_importing_them() -> None:
    path = models.local_path("package:rich/console.py")
    assert path is not None
    assert path.name == "console.py"
    with pytest.raises(FileNotFoundError, match=r"pip install no-such-thing"):
        models.local_path("package:no_such_thing/x")
    with pytest.raises(FileNotFoundError, match=r"holds no 'nowhere'"):
        models.local_path("package:rich/nowhere")
    with pytest.raises(FileNotFoundError, match=r"no installed package"):
        models.local_path("package:../etc/passwd")


def test_hub_names_are_left_alone_and_paths_are_not() -> None:
    assert models.fetch("owner/name") == "owner/name"
    for missing in ("./here", "/no/where", "a/b/c", "x.gguf"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            models.fetch(missing)


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    header = json.dumps({"a": {"data_offsets": [0, 4]}}).encode()
    shard = len(header).to_bytes(8, "little") + header + b"1234"
    (tmp_path / "model-1.safetensors").write_bytes(shard)
    with pytest.raises(ValueError, match=r"model-2.safetensors is missing"):
        models.check_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(shard[:-1])
    with pytest.raises(ValueError, match=r"model-2.safetensors is cut short"):
        models.check_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(shard[:5])
    with pytest.raises(ValueError, match=r"model-2.safetensors is cut short"):
        models.check_model_folder(tmp_path)
    for damaged in (b"x" * len(shard), shard.replace(b"{", b"[")):
        (tmp_path / "model-2.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model-2.safetensors is cut short or damaged"):
            models.check_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(shard)
    models.check_model_folder(tmp_path)
    for index in ("{", "[]", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged"):
            models.check_model_folder(tmp_path)


def test_what_another_library_says_gets_the_name_of_the_model() -> None:
    with (
        pytest.raises(ValueError, match="model 'owner/name' cannot be loaded") as caught,
        models.loading("owner/name"),
    ):
        raise KeyError("\n\nmodel_type\nmore")
    assert "(KeyError: " in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="index 'x' cannot"), models.loading("x", what="index"):
        raise KeyError("card")
    with pytest.raises(ModuleNotFoundError), models.loading("owner/name"):
        raise ModuleNotFoundError("No module named 'x'", name="x")  # says what to install


def test_an_encoder_that_is_loaded_stays_as_it_is() -> None:
    encoder = object()
    assert models.load_encoder(encoder) is encoder


def test_names_hold_no_path_of_a_machine(tmp_path: Path) -> None:
    assert models.model_name(models.SMOLLM2) == "SmolLM2-135M-Instruct.Q4_1"
    assert models.model_name("package:rich/console.py") == "rich"
    assert models.model_name("owner/name") == "owner/name"
    assert models.model_name(tmp_path) == tmp_path.name


def test_content_sha_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    one = models.content_sha(tmp_path)
    assert models.content_sha(tmp_path) == one
    (tmp_path / "a").write_text("2")
    two = models.content_sha(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({one, two, models.content_sha(tmp_path)}) == 3


def test_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu = torch.device("cpu")
    assert 0.01 < models.bfloat16_gain() < 100
    monkeypatch.setattr(models, "bfloat16_gain", lambda: 3.0)
    assert models.best_dtype(cpu) == torch.bfloat16
    monkeypatch.setattr(models, "bfloat16_gain", lambda: 0.7)
    assert models.best_dtype(cpu) == torch.float32


@pytest.mark.model
def test_smollm2_is_a_plain_bfloat16_folder() -> None:
    folder = Path(models.fetch(models.SMOLLM2))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert "quantization_config" not in config
    assert "/" not in config.get("_name_or_path", "")
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(269_060_552, rel=0.001)


def test_a_model_is_told_by_all_of_its_weights(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    found = []
    for last in (1.0, 2.0):
        weights = {"a": np.zeros(2**19, np.float32), "b": np.full(4, last, np.float32)}
        save_file(weights, tmp_path / "model.safetensors")
        raw = (tmp_path / "model.safetensors").read_bytes()
        found.append((models.model_sha(tmp_path), raw[: 2**20], len(raw)))
    assert found[0][0] != found[1][0]
    assert found[0][1:] == found[1][1:]
    assert models.model_sha(tmp_path) == found[1][0]


def test_of_large_weights_the_ends_and_samples_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_LARGE_BYTES", 2**20)
    path, size = tmp_path / "model.safetensors", 2**25 + 5
    where = [None, 0, 2**20 - 1, 2**24, 2**24 + 2**16 - 1, size - 2**20, size - 1, 2**21]
    found = []
    for at in where:
        with path.open("wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(b"x")
        found.append(models.model_sha(path))
    assert found[0] == found[-1]  # which nobody reads
    assert len(set(found)) == len(where) - 1
