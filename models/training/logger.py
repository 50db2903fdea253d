"""metrics.csv: one row a step, one column a metric, appended as the run goes and kept when it is resumed. And what
keeps a run alive when a logger fails.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class CsvLogger(Logger):
    """Writes `folder`/metrics.csv. (Lightning's own CSVLogger deletes the file of an interrupted run when the run goes
    on.)

    After a resume at step s the rows from step s on are dropped before new ones are written: they are computed again.
    Those before keep their text. What can't be written now, because the disk is full, is written with what comes next.
    """

    FILE = "metrics.csv"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: dict[int, dict[str, Any]] | None = None
        self.columns = ["step"]
        self.behind = False  # the file lacks something that was logged

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
    def resume(self, step: int, seen: dict[int, set[str]] | None = None) -> None:
        """Keeps what was logged before the optimizer's step `step` and forgets the rest."""
        path = self.folder / self.FILE
        self.rows, self.columns = {}, ["step"]
        if path.exists() and step > 0:
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last row off
            kept = [row for row in cells(whole) if float(row["step"]) < step]
            self.rows = {int(float(row["step"])): row for row in kept}
            self.columns = list(dict.fromkeys(["step", *(name for row in kept for name in row)]))
        self._write(self._rewrite)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert self.rows is not None and step is not None, "resume comes first, and every metric has a step"
        new = [name for name in metrics if name not in self.columns and name != "epoch"]
        row = self.rows.setdefault(step, {"step": step})
        before = dict(row)
        row.update({name: float(value) for name, value in metrics.items() if name != "epoch"})
        self.columns += new
        if new or self.behind or (len(before) > 1 and row != before):
            self._write(self._rewrite)
        elif row != before:
            self._write(lambda: self._append(row))

    def _write(self, how: Callable[[], None]) -> None:
        try:
            how()
            self.behind = False
        except OSError as error:
            if not self.behind:
                print(f"warning: {self.folder / self.FILE} could not be written ({error.strerror}); trying again")
            self.behind = True

    def _append(self, row: dict[str, Any]) -> None:
        with (self.folder / self.FILE).open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{self.FILE}.draft"
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows((self.rows or {}).values())
        draft.replace(self.folder / self.FILE)


class Tolerant(Logger):
    """Another logger, which may fail: it is then left alone, one line says so, and the run goes on."""

    def __init__(self, logger: Any) -> None:  # a Logger, with an experiment, which Logger does not declare
        super().__init__()
        self.logger, self.failed = logger, False
        self.last: tuple[int | None, dict[str, float]] | None = None  # row

    def _try(self, action: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        try:
            return action()
        except Exception as error:
            self.failed, kind = True, type(self.logger).__name__
            print(
                f"warning: {kind} failed and is left out from here on; {CsvLogger.FILE} goes on: {error!r}", flush=True
            )
            return None

    @property
    def name(self) -> str | None:
        return self._try(lambda: self.logger.name)

    @property
    def version(self) -> int | str | None:
        return self._try(lambda: self.logger.version)

    @property
    def save_dir(self) -> str | None:
        return self._try(lambda: self.logger.save_dir)

    @property
    def experiment(self) -> Any:
        return self._try(lambda: self.logger.experiment)

    def resume(self, step: int, seen: dict[int, set[str]] | None = None) -> None:
        """Training begins at this step. seen: the metrics that have been logged already, by step."""
        if hasattr(self.logger, "resume"):
            self._try(lambda: self.logger.resume(step, seen or {}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: self.logger.log_hyperparams(params, *args, **kwargs))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Once: checkpoint.py has a row logged before it saves, and Lightning logs it again behind that."""
        if (step, metrics) != self.last:
            self.last = (step, dict(metrics))
            self._try(lambda: self.logger.log_metrics(metrics, step=step))

    def log_image(self, name: str, path: Path, step: int | None = None) -> None:
        """A picture, where the logger takes any as wandb does."""
        if hasattr(self.logger, "log_image"):
            self._try(lambda: self.logger.log_image(name, [str(path)], step=step))

    def log_sample(self, prompt: str, text: str, step: int) -> None:
        """A text that the model wrote, where the logger takes any."""
        if hasattr(self.logger, "log_sample"):
            self._try(lambda: self.logger.log_sample(prompt, text, step))

    def save(self) -> None:
        self._try(self.logger.save)

    def finalize(self, status: str) -> None:
        self._try(lambda: self.logger.finalize(status))

    def close(self, failed: bool) -> None:
        """At the end of the run, after which another one of this process finds none that is open. (Lightning finalizes
        loggers after every fit and leaves wandb's and Comet's runs open, so that more can be logged to them.)"""
        experiment: Any = getattr(self.logger, "_experiment", None)  # not .experiment, which would begin one
        if hasattr(experiment, "finish"):  # wandb
            self._try(lambda: experiment.finish(exit_code=int(failed)))
        elif hasattr(experiment, "end"):  # Comet
            self._try(experiment.end)
        elif hasattr(experiment, "close"):  # TensorBoard
            self._try(experiment.close)


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a metrics.csv as they stand there, without the empty cells."""
    # a row that was cut off by a kill has too few cells: None
    rows = csv.DictReader(text.splitlines())
    return [{name: cell for name, cell in row.items() if cell not in ("", None)} for row in rows]


def logged(folder: Path) -> dict[int, set[str]]:
    """By step, the metrics in the folder's metrics.csv."""
    path = folder / CsvLogger.FILE
    text = path.read_text() if path.exists() else ""
    return {int(float(row["step"])): row.keys() - {"step"} for row in cells(text[: text.rfind("\n") + 1])}


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv as numbers."""
    return [{name: float(cell) for name, cell in row.items()} for row in cells(Path(path).read_text())]
