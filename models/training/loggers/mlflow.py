"""MLflow: a run of an experiment, on a server (MLFLOW_TRACKING_URI) or in a file of this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from models.training.loggers import identity
from models.training.loggers.seen import Seen, news


class MLflow(MLFlowLogger):
    """save_dir: the run's folder, whose loggers.json keeps the run that MLflow knows it by. settings: of MLFlowLogger.
    The pictures and texts of a database in a file are in a folder beside it.

    MLflow keeps every number that it is given for a step. So what has been logged before an interruption is not logged
    again.
    """

    FILE = "sqlite:///"

    def __init__(self, save_dir: str, tracking_uri: str, **settings: Any) -> None:
        if tracking_uri.startswith(self.FILE):
            file = Path(tracking_uri.removeprefix(self.FILE)).absolute()
            file.parent.mkdir(parents=True, exist_ok=True)
            settings = {"artifact_location": (file.parent / f"{file.stem}-artifacts").as_uri()} | settings
            for name in ("alembic", "mlflow"):  # which tell of every table that they make
                logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # warns that it makes the first
        settings["tags"] = {name: tag for name, tag in (settings.get("tags") or {}).items() if tag is not None}
        super().__init__(tracking_uri=tracking_uri, run_id=identity.known(Path(save_dir), "mlflow"), **settings)
        self.folder, self.seen = Path(save_dir), Seen()

    @rank_zero_only
    def resume(self, step: int, seen: Seen) -> None:
        self.seen = seen if self._run_id else {}
        if self.run_id and not identity.known(self.folder, "mlflow"):
            identity.keep(self.folder, "mlflow", self.run_id)
        self.experiment.update_run(self.run_id, status="RUNNING")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As config.json, and as parameters but for those that this run has already: MLflow refuses to change one."""
        self.experiment.log_dict(self.run_id, json.loads(json.dumps(params, default=str)), "config.json")
        flat = dict(_flat(params))
        known = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({key: value for key, value in flat.items() if key not in known})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        at = None if step is None else int(step)
        if found := dict(metrics) if at is None else news(metrics, at, self.seen):
            super().log_metrics(found, at)

    @rank_zero_only
    def log_image(self, name: str, paths: Sequence[str], step: int | None = None) -> None:
        for path in paths:
            self.experiment.log_artifact(self.run_id, path, name)

    @rank_zero_only
    def log_sample(self, prompt: str, text: str, step: int) -> None:
        self.experiment.log_text(self.run_id, f"{prompt} ... goes on:\n\n{text}\n", "sample.txt")


def _flat(node: Any, path: str = "") -> Any:
    """Path and value of every leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
