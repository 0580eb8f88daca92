import numpy as np
from report.pages import svg

from llmlabel.report import plots


def test_names_in_figures_are_no_mathematics() -> None:
    uri = plots.shares(np.array([0.5, 0.5]), None, names=["$x_1$ & <b>", "b"], limit=0.5)
    assert "<!-- $x_1$ &amp; &lt;b&gt; -->" in svg(uri)
    assert "font-family" not in svg(uri)  # drawn as paths
    assert "date" not in svg(uri)


def test_a_name_that_the_font_lacks_is_numbered() -> None:
    assert plots.drawable("政治", "label 3") == "label 3"
    assert plots.drawable("a\n b", "label 3") == "a b"
    assert plots.drawable("x" * 30, "label 3") == "x" * 23 + "…"
    assert plots.drawable("a\u202eb", "label 3") == "a\ufffdb"
    assert "<!-- label 2 -->" in svg(
        plots.shares(np.array([0.5, 0.5]), None, names=["a", "政治"], limit=0.5)
    )
