"""Evaluates trained models: the loss at 1 to 8 times the length of their training, and by position.

    python scripts/evaluate.py runs/NAME                              # on the data that it was validated on
    python scripts/evaluate.py runs/ablation/*                        # several, one after another
    python scripts/evaluate.py runs/NAME --text book.txt notes        # on all text of these files and folders
    python scripts/evaluate.py runs/NAME data=wikitext                # on the validation split of another corpus
    python scripts/evaluate.py runs/recall data.num_pairs=16          # the run's own data, changed
    python scripts/evaluate.py runs/NAME --tasks mine --task-folder tasks    # tasks of lm-eval

A model is a run, a checkpoint of one, or the folder of an exported model. What was found is printed, and kept in the
run's folder: evaluations/NAME.json and NAME.png, and under evaluation/ in the run's other loggers, such as wandb.
docs/evaluating.md explains all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filelock import FileLock, Timeout

from conf.folders import job_folder, runs
from models.build import build
from models.training import origin, published
from models.training.logger import CsvLogger, Tolerant
from models.training.run import Run
from models.training.summary import quiet, say
from models.training.weights import Trained, open_trained
from scripts.evaluating import contexts, machine, report, scoring, tasks


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="and words like data=wikitext, as train.py has them")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8], help="lengths, in lengths of training")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="files or folders whose whole text is evaluated on")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-eval, in the place of the loss")
    parser.add_argument("--task-folder", metavar="FOLDER", help="with YAML files of tasks of your own")
    parser.add_argument("--tokens", type=int, help="to evaluate on (default: the run's validation_tokens)")
    parser.add_argument("--seq-len", type=int, help="length of training; needed for an exported folder by itself")
    parser.add_argument("--tokens-at-once", type=int, help="in memory (default: as many as in training)")
    parser.add_argument("--name", help="of the result (default: says what it is evaluated on)")
    given = parser.parse_intermixed_args(words)
    for name in ("tokens", "seq_len", "tokens_at_once"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    given.words = [word for word in given.models if setting(word)]
    given.models = [word for word in given.models if not setting(word)]
    if not given.models:
        parser.error("name a model: a run, a checkpoint or an exported folder")
    return given


def setting(word: str) -> bool:
    """Whether a word is like data.num_pairs=16, and not the path of a run, which may hold such words too."""
    return "=" in word and "/" not in word.partition("=")[0] and not Path(word).exists()


def evaluated(trained: Trained, given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The result of one model, as docs/evaluating.md describes it. path: where it will stand."""
    config = trained.config or {}
    seq_len = given.seq_len or config.get("seq_len")
    if seq_len is None:
        raise ValueError(f"{trained.path} does not say how long its sequences were; --seq-len N does")
    lengths = contexts.lengths(seq_len, given.times)
    (where, dtype), begun = machine.device_and_dtype(), time.time()
    at_once = given.tokens_at_once or seq_len * config.get("micro_batch", 8)
    trained.model.to(where)
    if given.tasks:
        node: Any = {"tasks": given.tasks, "folder": given.task_folder}
        report.refuse_other_data(path, node)
        rows = max(1, at_once // lengths[-1])
        results = tasks.run(trained, given.tasks, given.task_folder, lengths[-1], rows, dtype)
        found: dict[str, Any] = {"tasks": tasks.found(results), "lm_eval": results["lm_eval_version"]}
        say(tasks.table(found["tasks"]))
    else:
        task, node = data(trained, given, seq_len, lengths[-1])
        report.refuse_other_data(path, node)
        say("\n".join(f"data      {line}" for line in task.describe()))
        found = {"lengths": []}
        for length in lengths:
            samples, together = contexts.sequences(task, length, lengths[-1], tokens(given, config))
            sums = scoring.sums(trained.model, samples, length, together, at_once, dtype)
            found["lengths"].append(report.row(sums, seq_len, task.bytes_per_token))
        say(report.table(found["lengths"]))
    about = {"weights": trained.path.name, "step": trained.step, "seq_len": seq_len, "data": node}
    ends = {"dtype": str(dtype).removeprefix("torch."), "seconds": round(time.time() - begun, 1)}
    return {**about, **found, **ends, **origin.origin(where)}


def tokens(given: argparse.Namespace, config: dict[str, Any]) -> int:
    """How many to evaluate on."""
    return given.tokens or config.get("validation_tokens", 2**20)


def data(trained: Trained, given: argparse.Namespace, seq_len: int, longest: int) -> tuple[Any, dict[str, Any]]:
    """What to evaluate on, and how it was said."""
    if given.text:
        most = -(-tokens(given, trained.config or {}) // longest) * longest
        return contexts.text_of(trained, given.text, most), {"text": given.text}
    node = contexts.data_node(trained.config, given.words)
    return contexts.task_of(trained, node, seq_len), node


def default_name(trained: Trained, given: argparse.Namespace, where: str) -> str:
    """What it is evaluated on, and the step, where weights were named that need not be the run's last; of a mean of
    several steps (average.py) its name.
    """
    if given.tasks:
        name = "tasks-" + "-".join(given.tasks)
    elif given.text:
        name = "text-" + "-".join(Path(path).expanduser().resolve().stem for path in given.text)
    else:
        name = job_folder("", given.words) if given.words else "validation"
    earlier = trained.run and trained.path.name != "model" and not trained.run.samefile(Path(where).expanduser())
    own = trained.path.name.removeprefix("model-")
    which = f"step-{trained.step}" if trained.path.is_file() or own.isdigit() else own
    return f"{name}-{which}" if earlier else name


def home(trained: Trained, where: str) -> Path:
    """Where its evaluations are kept: in the run, or in the exported folder. That of a model on the hub is a cache; it
    has one of its name below runs/.
    """
    return Path(runs(), where.replace("/", "--")) if published.is_name(where) else trained.run or trained.path


def log(trained: Trained, name: str, result: dict[str, Any], picture: Path) -> None:
    """To the loggers of the run but metrics.csv, under the run's own id: the curve of the training stays."""
    nodes = (trained.config or {}).get("logger", {}).values()
    others = [node for node in nodes if not node["_target_"].endswith(CsvLogger.__name__)]
    if not others or trained.run is None:
        return
    try:
        with FileLock(trained.run / Run.LOCK, timeout=0):
            for node in others:
                moved = {"save_dir": str(trained.run)} if "save_dir" in node else {}  # with its folder, perhaps
                logger = Tolerant(build({**node, **moved}))
                tokens = {"progress/tokens": float((trained.step or 0) * (trained.config or {})["batch_tokens"])}
                logger.log_metrics(report.metrics(result, name) | tokens, trained.step)
                if picture.exists():
                    logger.log_image(f"evaluation/{name}", picture)
                logger.close(failed=False)
    except Timeout:
        say(f"warning: {trained.run} is being trained, and its loggers have been told nothing of this evaluation")


def main() -> None:
    quiet()
    given = arguments()
    try:
        for where in given.models:
            trained = open_trained(where)
            say(f"model     {trained.path}")
            name = given.name or default_name(trained, given, where)
            path = home(trained, where) / report.FOLDER / f"{name}.json"
            result = evaluated(trained, given, path)
            report.write(path, result)
            say(f"\nwritten   {path}\n")
            log(trained, name, result, path.with_suffix(".png"))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
