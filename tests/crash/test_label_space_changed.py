"""A label space that is changed in the middle of a run is refused; after its end it is obeyed."""

from pathlib import Path

import pytest

from llmlabel.engine.fake import FakeEngine
from llmlabel.recipe import load_recipe, run
from llmlabel.recipe.runner import StepError

RECIPE = """
labels: {call: llmlabel.labelspace.load_labels, source: labels.txt}
texts: {call: llmlabel.data.load, path: texts.csv}
engine: {call: llmlabel.engine.fake.FakeEngine}
raw:
  call: llmlabel.label.direct.label_direct
  dataset: ${texts}
  engine: ${engine}
  labels: ${labels}
  block_rows: 4
"""
FORMER, NEW = "bug\npraise\n", "bug\nquestion\n"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The labels of each request; the third one is interrupted."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("texts.csv").write_text("text\n" + "".join(f"bug {n}\n" for n in range(20)))
    Path("labels.txt").write_text(FORMER)
    score, requests = FakeEngine.score, list[list[str]]()

    def interrupted(self: FakeEngine, chats: list, labels: list[str], **given: object) -> object:
        requests.append(list(labels))
        if len(requests) == 3:
            raise KeyboardInterrupt
        return score(self, chats, labels, **given)

    monkeypatch.setattr(FakeEngine, "score", interrupted)
    return requests


def test_label_space_changed_between_run_and_resume(asked: list[list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(Path("r.yaml")))
    Path("labels.txt").write_text(NEW)
    with pytest.raises(StepError) as error:
        run(load_recipe(Path("r.yaml")))
    assert str(error.value).startswith(
        "r.yaml: raw: label_direct: the blocks in runs/r/raw/blocks were begun by another call: the "
        "label space has changed (added: 'question'; gone: 'praise'); undo that, give another output "
        "folder, or delete runs/r/raw/blocks to begin again"
    )
    assert len(asked) == 3  # nothing was paid for
    Path("labels.txt").write_text(FORMER)
    assert run(load_recipe(Path("r.yaml")))["raw"]["label_ids"][0] == [0, 1]
    assert len(asked) == 6  # the two kept blocks were not asked for again
    Path("labels.txt").write_text(NEW)  # what is finished may be done anew
    run(load_recipe(Path("r.yaml")))
    assert asked[6:] == [["bug", "question"]] * 5
    Path("labels.txt").write_text(FORMER)  # and the former blocks are still there
    run(load_recipe(Path("r.yaml")))
    assert len(asked) == 11


def test_beginning_again_is_one_word(asked: list[list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(Path("r.yaml")))
    Path("labels.txt").write_text(NEW)
    run(load_recipe(Path("r.yaml")), force=True)
    assert asked[3:] == [["bug", "question"]] * 5
