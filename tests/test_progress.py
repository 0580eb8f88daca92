import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from llmlabel import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def hidden_afterwards() -> Iterator[None]:
    yield
    progress.hide()


def work(clock: Clock, advance: Callable[[int], None], *, blocks: int, rows: int) -> None:
    for _ in range(blocks):
        clock.now += 2.0
        advance(rows)


def test_a_library_call_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.task("label_direct", 10) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


def test_lines_come_after_5_then_every_10_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock)
    with progress.task("label_direct", 200) as advance:
        work(clock, advance, blocks=10, rows=20)
    assert stream.getvalue().splitlines() == [
        "label_direct 60/200 rows, 10.0 rows/s, 14 s left",
        "label_direct 160/200 rows, 10.0 rows/s, 4 s left",
        "label_direct 200/200 rows, 10.0 rows/s, took 20 s",
    ]


def test_a_short_task_prints_no_line(clock: Clock) -> None:
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock)
    with progress.task("label_direct", 40) as advance:
        work(clock, advance, blocks=2, rows=20)
    assert stream.getvalue() == ""


def test_a_task_that_fails_prints_no_closing_line(clock: Clock) -> None:
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock, first_seconds=100.0)

    def embed() -> None:
        with progress.task("embed", 4, "texts"):
            clock.now += 200.0
            raise RuntimeError("dead")

    with pytest.raises(RuntimeError, match="dead"):
        embed()
    assert stream.getvalue() == ""


def test_the_interval_and_the_unit_are_parameters(clock: Clock) -> None:
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock, first_seconds=2.0, every_seconds=4.0)
    with progress.task("train", 40_000, unit="steps") as advance:
        work(clock, advance, blocks=3, rows=20)
    assert stream.getvalue().splitlines() == [
        "train 20/40000 steps, 10.0 steps/s, 67 min left",
        "train 60/40000 steps, 10.0 steps/s, 67 min left",
        "train 60/40000 steps, 10.0 steps/s, took 6 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (119.0, "119 s"), (300.0, "5 min"), (9000.0, "2.5 h")]
)
def test_time_left_is_readable(clock: Clock, seconds: float, text: str) -> None:
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock, first_seconds=0.0)
    with progress.task("t", 2) as advance:
        clock.now += seconds
        advance(1)
    assert stream.getvalue().splitlines()[0].endswith(f"rows/s, {text} left")


def test_only_rank_0_shows(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    progress.show(stream=stream, clock=clock)
    with progress.task("train", 40) as advance:
        work(clock, advance, blocks=10, rows=4)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_nested_tasks_share_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress.show(stream=stream, clock=clock)
    with progress.task("label_direct", 40) as outer, progress.task("score", 8, "chats") as inner:
        clock.now += 2.0
        inner(8)
        outer(40)
    *_, first, second = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()
    assert re.fullmatch(r"label_direct ━+ 40/40 rows  20.0 rows/s 0:00:00", first.strip())
    assert re.fullmatch(r"score        ━+ 8/8   chats 4.0 chats/s 0:00:00", second.strip())


def test_rich_is_imported_only_when_something_is_shown() -> None:
    program = (
        "import sys; from llmlabel import progress\n"
        "progress.show(stream=sys.stdout)\n"
        "with progress.task('t', 1) as advance: advance(1)\n"
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
