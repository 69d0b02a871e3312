"""What is shown on the screen: progress bars and tables."""

import sys
from collections.abc import Sequence

from tqdm import tqdm


class ProgressBar:
    """A tqdm bar: how much is done, the loss, the rate and the time left.

    compiles: it says "compiling" until the first update, because JAX compiles what the first step runs. Where stderr
    is not a terminal (a log file) it prints a line every 30 seconds at most.
    """

    def __init__(self, description: str, total: int, initial: int = 0, unit: str = "step", shown: bool = True,
                 compiles: bool = False):
        terminal = sys.stderr.isatty()
        self._compiling = compiles
        self._bar = tqdm(
            desc=description,
            total=total,
            disable=not shown,
            initial=initial,
            unit=unit,
            ascii=not terminal,
            dynamic_ncols=terminal,
            mininterval=0.1 if terminal else 30,
            maxinterval=10 if terminal else 60,
            postfix="compiling" if compiles else None,
        )

    def update(self, count: int = 1, loss: str = "") -> None:
        """Moves on by `count`; a new `loss`, with its unit, is shown at the right."""
        if self._compiling:
            self._compiling = False
            self._bar.set_postfix_str("", refresh=False)
        if loss:
            self._bar.set_postfix_str(loss, refresh=False)
        self._bar.update(count)

    def write(self, message: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """An aligned text table; columns of numbers are right-aligned, floats have four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = []
    for index, header in enumerate(headers):
        texts = [header, *(row[index] for row in cells)]
        width = max(map(len, texts))
        is_number = all(isinstance(row[index], int | float) for row in rows)
        texts.insert(1, "-" * width)
        columns.append([text.rjust(width) if is_number else text.ljust(width) for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
