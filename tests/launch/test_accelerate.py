"""The configuration files of accelerate's launcher, and weights that FSDP divides among processes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.numpy import load_file
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from llmlabel.recipe import load_recipe

FOLDER = Path("recipes/accelerate")
KINDS = {"ddp.yaml": "MULTI_GPU", "fsdp.yaml": "FSDP"}


def command_of(file: Path) -> list[str]:
    """What the comment of a configuration says to call, after `accelerate launch`."""
    found = re.findall(r"^#   accelerate launch (.*)$", file.read_text("utf-8"), re.MULTILINE)
    assert len(found) == 1
    return shlex.split(found[0])


def launched(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """The arguments and the environment of the processes that accelerate would start on GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command_of(file)))
    return args, prepare_multi_gpu_env(args)


def test_every_configuration_is_read_and_its_command_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(KINDS)
    for name, kind in KINDS.items():
        config = load_config_from_file(str(FOLDER / name))
        assert config.distributed_type.value == kind
        args, env = launched(FOLDER / name, monkeypatch)
        assert (args.module, args.training_script) == (True, "llmlabel")
        assert args.training_script_args == ["run", "train"]
        assert load_recipe("train").path.name == "train.yaml"
        assert (args.config_file, args.num_processes) == (str(FOLDER / name), 4)
        assert env["ACCELERATE_MIXED_PRECISION"] == "no"  # the argument dtype decides
        assert (args.multi_gpu, args.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")


def test_the_processes_of_fsdp_find_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    _, env = launched(FOLDER / "fsdp.yaml", monkeypatch)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # llmlabel.train.shards names them
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is False  # else all but one process load nothing


# accelerate divides weights on GPUs only, so that its own code runs here on what it would have found.
DRIVER = """
import json, sys
from pathlib import Path
import numpy as np
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train import loop
from llmlabel.train.classifier import train_classifier
from llmlabel.train.network import LoRA

model, output, batch, divide, stop_after = sys.argv[1:]
start, save = loop._accelerator, loop._Run.save


def divided(*arguments):
    accelerator = start(*arguments)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=False
    )
    return accelerator


def save_and_tell(run):
    save(run)
    modules = list(run.wrapped.modules())
    parts = {
        "units": [type(m).__name__ for m in modules if isinstance(m, FSDPModule)],
        "whole": [n for n, p in run.wrapped.named_parameters() if not isinstance(p, DTensor)],
    }
    if PartialState().is_main_process:  # the other may be here before there is a folder
        Path(output, ".parts.json").write_text(json.dumps(parts))
    if run.fitted.updates == int(stop_after):
        sys.exit(7)


if divide == "yes":
    loop._accelerator = divided
    loop._Run.save = save_and_tell
labels = load_labels(["animal", "money"])
texts = [["the cat sat", "business and money"][i % 2] + " mat" * (i % 5) for i in range(45)]
probs = np.array([[0.9, 0.1], [0.2, 0.8]])[np.arange(45) % 2]
rows = Dataset.from_dict({"id": [str(i) for i in range(45)], "text": texts})
unseen = {"id": list("abc"), "text": ["cat", "money mat", "business"], "gold": [[0], [1], [0]]}
train_classifier(
    SoftLabels.from_dense(probs, labels).add_to(rows),
    labels,
    model=model,
    output=Path(output),
    validation=Dataset.from_dict(unseen),
    lora=LoRA(r=4, dropout=0.0),
    dtype="float32",
    learning_rate=0.005,
    num_train_epochs=4,
    max_length=64,
    max_grad_norm=0.5,
    save_steps=5,
    pass_tokens=20,  # more passes in one process than in the other
    per_device_train_batch_size=int(batch),
)
"""


@pytest.mark.slow
def test_divided_weights_are_trained_and_saved_like_whole_ones(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    """Cut gradients, the best of 4 epochs, and a training that is killed after 10 of 24 updates."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(output: str, processes: int, *, divide: str, stop_after: int = -1) -> int:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *(launcher if processes == 2 else []), str(driver)]
        told = [str(tiny_decoder), str(tmp_path / output), str(8 // processes), divide]
        done = subprocess.run(
            [*command, *told, str(stop_after)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0 or stop_after > 0, done.stderr
        return done.returncode

    run("one", 1, divide="no")
    run("two", 2, divide="yes")
    assert run("killed", 2, divide="yes", stop_after=10) != 0
    parts = json.loads((tmp_path / "killed" / ".parts.json").read_text())
    assert parts["units"].count("FSDPLlamaDecoderLayer") == 3
    assert parts["whole"] == []
    assert not (tmp_path / "killed" / "model_card.json").exists()
    run("killed", 2, divide="yes")
    cards = {n: json.loads((tmp_path / n / "model_card.json").read_text()) for n in ("one", "two")}
    assert cards["two"]["processes"] == 2
    assert cards["one"]["validation"]["best_epoch"] == cards["two"]["validation"]["best_epoch"]
    for name in ("head.safetensors", "adapter_model.safetensors"):
        one, two, killed = (load_file(tmp_path / n / name) for n in ("one", "two", "killed"))
        assert one.keys() == two.keys() == killed.keys()
        assert max(np.abs(value).max() for value in one.values()) > 0.01
        for key, value in one.items():
            np.testing.assert_allclose(two[key], value, atol=1e-4, err_msg=key)
            np.testing.assert_array_equal(killed[key], two[key], err_msg=key)
