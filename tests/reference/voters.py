"""Who voted like whom, one row at a time. A row is {voter: label}; what a table says is a label or None."""

Row = dict[str, int]


def order(rows: list[Row]) -> list[str]:
    """Voters by number of votes, of equal ones by name."""
    names = {name for row in rows for name in row}
    return sorted(names, key=lambda name: (-sum(name in row for row in rows), name))


def consensus(rows: list[Row], said: list[int | None], names: list[str]) -> tuple[int, int]:
    """Votes of these voters for what is said, and their votes where something is said."""
    agreed = compared = 0
    for row, label in zip(rows, said, strict=True):
        for name in names:
            if name in row and label is not None:
                compared += 1
                agreed += row[name] == label
    return agreed, compared


def pair(rows: list[Row], one: str, other: str) -> tuple[int, int]:
    """Rows on which both vote, and on which they vote alike."""
    both = [row for row in rows if one in row and other in row]
    return len(both), sum(row[one] == row[other] for row in both)


def reliability(rows: list[Row], belief: list[list[float]], names: list[str]) -> float:
    """Mean belief in what these voters vote for."""
    shares = [belief[at][row[name]] for at, row in enumerate(rows) for name in names if name in row]
    return sum(shares) / len(shares)


def confusion(rows: list[Row], true: list[int | None], name: str, labels: int) -> list[list[int]]:
    counts = [[0] * labels for _ in range(labels)]
    for row, label in zip(rows, true, strict=True):
        if name in row and label is not None:
            counts[label][row[name]] += 1
    return counts
