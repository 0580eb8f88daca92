from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmlabel.train.network import check_output, load_backbone, pool


@pytest.mark.parametrize("seed", range(20))
def test_pooling_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, tokens, width = (int(n) for n in rng.integers(1, 7, 3))
    hidden = torch.from_numpy(rng.normal(size=(rows, tokens, width)))
    lengths = rng.integers(1, tokens + 1, rows)
    mask = torch.from_numpy((np.arange(tokens) < lengths[:, None]).astype(np.int64))
    for row, length in enumerate(lengths):
        own = hidden[row, :length]
        assert torch.equal(pool(hidden, mask, "last")[row], own[-1])
        assert torch.equal(pool(hidden, mask, "max")[row], own.max(dim=0).values)
        torch.testing.assert_close(pool(hidden, mask, "mean")[row], own.mean(dim=0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_later_tokens_are_seen_only_without_the_causal_mask(
    tiny_decoder: Path, implementation: str, with_mask: bool
) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    more: dict[str, Any] = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    for bidirectional in (False, True):
        backbone = load_backbone(
            str(tiny_decoder), settings={"bidirectional": bidirectional}
        ).eval()
        backbone.set_attn_implementation(implementation)
        with torch.inference_mode():
            hidden = backbone(ids, **more).last_hidden_state
        influence = (hidden[0, 0] - hidden[1, 0]).abs().max().item()
        assert (influence > 1e-3) == bidirectional
        if with_mask:
            alone = backbone(ids[:1, :3]).last_hidden_state[0]
            padded = backbone(
                torch.tensor([[5, 6, 7, 3, 3]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
            ).last_hidden_state[0, :3]
            assert (alone - padded).abs().max().item() < 1e-5  # padding is not attended


def test_a_pooler_that_is_never_used_is_dropped(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder), settings={"bidirectional": False})
    assert backbone.pooler is None
    assert backbone(torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 32)


def test_a_folder_of_another_kind_of_student_is_refused(tmp_path: Path) -> None:
    prompted: dict[str, Any] = {"prompt_tokens": 3}
    for name in ("model_card.json", "head.safetensors", "labels.json", ".checkpoint.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()  # a tracker's, of a training that is not finished
    for settings in ({}, prompted):
        check_output(tmp_path, settings)
    (tmp_path / "mine.parquet").touch()
    check_output(tmp_path, {}, others=["mine.parquet"])
    with pytest.raises(
        ValueError, match=r"holds mine.parquet, which is no file of a student with a"
    ):
        check_output(tmp_path, {})
    (tmp_path / "mine.parquet").unlink()
    (tmp_path / "prompt.safetensors").touch()
    check_output(tmp_path, prompted)
    with pytest.raises(
        ValueError, match=r"prompt.safetensors, .* of a student with adapters; give"
    ):
        check_output(tmp_path, {})
    (tmp_path / "prompt.safetensors").rename(tmp_path / "adapter_model.safetensors")
    check_output(tmp_path, {})
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors, .* of a student with a prompt;"
    ):
        check_output(tmp_path, prompted)
