"""metrics.csv: one row a step, one column a metric, appended as the run goes and kept when it is resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class CsvLogger(Logger):
    """Writes `folder`/metrics.csv. (Lightning's own CSVLogger deletes the file of an interrupted run when the run goes
    on.)

    After a resume at step s the rows from step s on are dropped before new ones are written: they are computed again.
    """

    FILE = "metrics.csv"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: dict[int, dict[str, float]] | None = None
        self.columns = ["step"]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> CsvLogger:
        return self

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml stands beside metrics.csv."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Keeps what was logged before the optimizer's step `step` and forgets the rest."""
        path = self.folder / self.FILE
        self.rows, self.columns = {}, ["step"]
        if path.exists() and step > 0:
            kept = [row for row in read_metrics(path) if row["step"] < step]
            self.rows = {int(row["step"]): row for row in kept}
            self.columns = list(dict.fromkeys(["step", *(name for row in kept for name in row)]))
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert self.rows is not None and step is not None, "resume comes first, and every metric has a step"
        new = [name for name in metrics if name not in self.columns and name != "epoch"]
        row = self.rows.setdefault(step, {"step": step})
        fresh = len(row) == 1
        row.update({name: float(value) for name, value in metrics.items() if name != "epoch"})
        self.columns += new
        if new or not fresh:
            self._rewrite()
        else:
            with (self.folder / self.FILE).open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{self.FILE}.draft"
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows.values())
        draft.replace(self.folder / self.FILE)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, without the empty cells."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    # a row that was cut off by a kill has too few cells: None
    return [{name: float(cell) for name, cell in row.items() if cell not in ("", None)} for row in rows]
