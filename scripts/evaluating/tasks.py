"""lm-eval's tasks on a model of this repository (github.com/EleutherAI/lm-evaluation-harness), its own or those of a
folder of YAML files. It is an extra: pip install -e '.[evaluation]'.
"""

from __future__ import annotations

from typing import Any

import torch

from models.build import near
from models.training.weights import Trained


def run(
    trained: Trained, names: list[str], folder: str | None, longest: int, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate returns. longest: tokens of a context, of which longer ones lose their beginning;
    rows: contexts at a time. Raises ValueError, in a sentence.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval, pip install -e '.[evaluation]' ({error})") from error
    tokenizer = trained.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{trained.path} was not trained on text, and tasks are texts")
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            meant = near(name, manager.all_tasks)
            raise ValueError(
                f"--tasks {name} is not there; "
                + (f"did you mean {meant}?" if meant else "--task-folder adds your own")
            )
    mixed = None if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    model = HFLM(
        pretrained=trained.model,
        tokenizer=tokenizer.to_hugging_face(),
        max_length=longest,
        batch_size=rows,
        mixed_precision_dtype=mixed,
    )
    try:
        return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=False)
    except OSError as error:  # a data set that is not here, nor in reach
        raise ValueError(f"--tasks {' '.join(names)}: {' '.join(str(error).split())}") from error


def found(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of each task: acc, acc_stderr; acc/FILTER where lm-eval filters the answers."""
    return {
        task: {
            metric.removesuffix(",none").replace(",", "/"): value
            for metric, value in row.items()
            if isinstance(value, int | float) and "," in metric
        }
        for task, row in results["results"].items()
    }


def table(tasks: dict[str, dict[str, float]]) -> str:
    width = max(map(len, tasks))
    rows = [(task, metric, value) for task, row in tasks.items() for metric, value in row.items()]
    return "\n".join(f"{task:<{width}}  {metric:<28}{value:>10.4f}" for task, metric, value in rows)
