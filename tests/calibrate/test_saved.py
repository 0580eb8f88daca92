"""Calibrators on disk, and files that hold none."""

import json
import math
from pathlib import Path

import pytest
from calibrate.rows import ALL, space, voted

from llmlabel.calibrate.conformal import Conformal, fit_conformal, predict_sets
from llmlabel.calibrate.online import Online
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.calibrate.temperature import Temperature


@pytest.mark.parametrize("score", ALL)
def test_a_saved_threshold_predicts_the_same(score: str, tmp_path: Path) -> None:
    rows, new = voted(0, 200), voted(1, 30)
    fitted = fit_conformal(rows, space(4), score=score, alpha=0.2)
    path = save_calibrator(fitted, tmp_path / "sub" / "conformal.json")
    loaded = load_calibrator(path)
    assert loaded == fitted
    assert json.loads(path.read_text())["type"] == "llmlabel.calibrate.conformal.Conformal"
    for ties in ("keep", "draw"):
        one = predict_sets(new, space(4), loaded, ties=ties)["set_ids"][:]
        assert one == predict_sets(new, space(4), fitted, ties=ties)["set_ids"][:]


def test_other_calibrators_are_saved_too(tmp_path: Path) -> None:
    one = Temperature(1.5, 0.7, 0.6, 20, "f")
    assert load_calibrator(save_calibrator(one, tmp_path / "t.json")) == one
    infinite = Conformal(0.1, "lac", math.inf, 20, 0, "f", scores=(0.5, math.inf))
    assert load_calibrator(save_calibrator(infinite, tmp_path / "c.json")) == infinite
    with pytest.raises(ValueError, match=r"LabelSpace is no fitted dataclass"):
        save_calibrator(space(2), tmp_path / "no.json")
    how = Nonconformity(lambda probs, uniforms: 1 - probs)
    start = Online(0.1, 0.005, 0.1, (), None, 0, 0, how, 0, "f")
    with pytest.raises(ValueError, match=r"Online holds what JSON cannot, such as a function"):
        save_calibrator(start, tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "c.json: not a calibrator that save_calibrator wrote .*save it again"),
        ("[]", "c.json: not a calibrator that save_calibrator wrote .*save it again"),
        ('{"type": "llmlabel.calibrate.conformal.Conformal"}', "c.json: not a calibrator"),
        ('{"type": 3, "value": {}}', "c.json: 3 is no fitted dataclass"),
        (
            '{"type": "llmlabel.calibrate.conformal.Conformal", "value": {"alpha": "x"}}',
            "c.json: not a calibrator .*alpha",
        ),
        ('{"type": "os.path", "value": 1}', "c.json: os.path is no fitted dataclass"),
        (
            '{"type": "llmlabel.calibrate.conformal.Path", "value": "x"}',
            "conformal.Path is no fitted dataclass",
        ),
        (
            '{"type": "llmlabel.calibrate.nothing.Conformal", "value": {}}',
            "nothing.Conformal is no fitted dataclass",
        ),
    ],
)
def test_what_is_no_calibrator(content: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=line):
        load_calibrator(tmp_path / "c.json")
