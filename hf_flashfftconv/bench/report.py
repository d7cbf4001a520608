"""What was measured, as a table, as JSON and as a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_HEADER = ("length", "pass", "contender", "ms", "x floor", "extra GiB", "error", "")


@dataclass(frozen=True)
class Result:
    """One contender on one problem.

    Args:
        contender (`str`): Who.
        length (`int`): Of the sequences.
        backward (`bool`): Whether the time is that of forward and backward together.
        floor_ms (`float`): The least time that the memory allows.
        ms (`float`, *optional*): The median time; None where the contender does not serve the problem.
        extra_bytes (`int`, *optional*): Memory at the peak, beyond the inputs.
        error (`float`, *optional*): Relative L2 error against float64, of the output or, with backward, of the gradient
            of the input.
        note (`str`): What a reader must know, or why there is no time.
    """

    contender: str
    length: int
    backward: bool
    floor_ms: float
    ms: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    note: str = ""

    @property
    def over_floor(self) -> float | None:
        return None if self.ms is None else self.ms / self.floor_ms

    def cells(self) -> tuple[str, ...]:
        def cell(value: float | None, format_: str) -> str:
            return "-" if value is None else format(value, format_)

        extra = None if self.extra_bytes is None else self.extra_bytes / 2**30
        numbers = (cell(self.ms, ".3f"), cell(self.over_floor, ".2f"), cell(extra, ".2f"), cell(self.error, ".1e"))
        return (f"{self.length:,}", "fwd+bwd" if self.backward else "fwd", self.contender, *numbers, self.note)


@dataclass(frozen=True)
class Report:
    """All results of a run.

    Args:
        environment (`dict`): Device, versions, command line and what was measured of the device itself.
        problem (`dict`): What all results have in common.
        results (`Sequence[Result]`): The results.
    """

    environment: dict[str, Any]
    problem: dict[str, Any]
    results: Sequence[Result]

    def __str__(self) -> str:
        facts = [f"{name}: {value}" for name, value in {**self.environment, **self.problem}.items()]
        rows = [_HEADER, *(result.cells() for result in self.results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for number, row in enumerate(rows):
            # Numbers to the right, words to the left.
            cells = [
                x.ljust(w) if i in (1, 2, 7) else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
            if number == 0:
                lines.append("-" * sum(widths, 2 * (len(widths) - 1)))
        return "\n".join([*facts, "", *lines])

    def save_json(self, path: str | Path) -> None:
        """Writes everything to a file."""
        results = [asdict(result) | {"over_floor": result.over_floor} for result in self.results]
        content = {"environment": self.environment, "problem": self.problem, "results": results}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    def save_plot(self, path: str | Path) -> None:
        """Draws time over length, forward on the left, forward and backward on the right. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        for axes, backward in zip(figure.subplots(1, 2), (False, True), strict=True):
            chosen = [result for result in self.results if result.backward == backward]
            floor = sorted({(result.length, result.floor_ms) for result in chosen})
            axes.plot(*zip(*floor, strict=True), "k--", label="memory floor")
            for contender in dict.fromkeys(result.contender for result in chosen):
                points = [(x.length, x.ms) for x in chosen if x.contender == contender and x.ms is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", label=contender)
            axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="ms")
            axes.set_title("forward and backward" if backward else "forward")
            axes.set_xticks([length for length, _ in floor], [f"{length:,}" for length, _ in floor], rotation=45)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"{self.environment['device']}: " + ", ".join(f"{k} {v}" for k, v in self.problem.items()))
        figure.savefig(path, dpi=150)
