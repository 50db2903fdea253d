"""A sweep whose jobs are in processes of their own, on other machines, or chosen one after the other: what is told at
the end, what a job returns, what is submitted. Tests that need a plugin of Hydra are left out where it is not installed
(pip install -e ".[sweeps]"). Where such faults were reported stands beside each test."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

import train as entry
from conf.command import PLUGINS
from models.training.sweep import JobError
from scripts import array_job
from tests.conftest import ROOT
from tests.training.test_sweep import JOB

# as Hydra knows it, which imports its plugins once more for itself
BasicLauncher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher"
)
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs hydra-optuna-sweeper")


@pytest.fixture
def swept(monkeypatch, tmp_path, capsys):
    """swept(*words) is train.py's main in this process, whose jobs compute nothing: their loss is 1 / seed, infinite
    for 0, and 3 is a bad seed. Returns the exit code, what was said, and the seeds in their order."""
    seeds: list[int] = []

    def job(cfg):
        seeds.append(cfg.seed)
        if cfg.seed == 3:
            raise ValueError("seed=3 is bad")
        return {"validation/nats": 1 / cfg.seed if cfg.seed else float("inf"), "validation/loss": 0.0}

    def run(*words: str) -> tuple[int, str, list[int]]:
        seeds.clear()
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        code = 0
        try:
            entry.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            GlobalHydra.instance().clear()
        return code, capsys.readouterr().out, [*seeds]

    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("models.training.job.train", job)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(entry.sweep, "page", str)
    GlobalHydra.instance().clear()
    return run


@pytest.fixture
def elsewhere(monkeypatch) -> list:
    """Jobs are run by a copy of the Sweep that was pickled, as launchers do. The list of what they return."""
    returned: list = []
    launch = BasicLauncher.launch

    def launched(self, job_overrides, initial_job_idx):
        for i, words in enumerate(job_overrides):
            self.task_function = pickle.loads(pickle.dumps(entry.sweep)).job(inspect.unwrap(entry.main))
            returned.extend(launch(self, [words], initial_job_idx + i))
        return returned[-len(job_overrides) :]

    monkeypatch.setattr(BasicLauncher, "launch", launched)
    return returned


@pytest.mark.slow
def test_jobs_elsewhere_are_told_like_those_in_this_process(swept, elsewhere, tmp_path):
    """Of jobs that fail, Hydra raises the first one's exception and drops the rest
    (https://github.com/hydra-ecosystem/hydra/issues/1377), and the resolvers of a config stay behind
    (https://github.com/hydra-ecosystem/hydra/issues/861). A loss that is not finite ended the whole study of Optuna
    (https://github.com/hydra-ecosystem/hydra/pull/3451)."""
    code, said, seeds = swept("-m", "name=s", "seed=2,3,0")
    assert code == 1 and seeds == [2, 3, 0]
    table, failures = said.split("\nsweep     ")[1].split("\nfailed;")
    assert table.startswith("3 jobs, 1 failed")
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["seed=2", "seed=3", "seed=0"]
    assert f"  seed=3   ValueError: seed=3 is bad\n      {tmp_path}/s/seed=3\n" in failures
    assert [job.return_value for job in elsewhere] == [0.5, None, None]
    assert not list(tmp_path.glob(".sweep-*")) and os.environ["PYTHONPATH"] == str(ROOT)


def test_a_job_that_is_killed_elsewhere_leaves_the_others_told(swept, elsewhere, monkeypatch):
    """A launcher's error about one job was all that was said of the sweep
    (https://github.com/hydra-ecosystem/hydra/issues/1928, https://github.com/facebookincubator/submitit/issues/1641)."""
    launch = BasicLauncher.launch

    def killed(self, job_overrides, initial_job_idx):
        launch(self, job_overrides, initial_job_idx)
        raise RuntimeError("Job 17 was killed\nand more")

    monkeypatch.setattr(BasicLauncher, "launch", killed)
    code, said, _ = swept("-m", "name=s", "seed=1")
    assert code == 1 and "sweep     1 jobs, 0 failed" in said
    assert (
        "the sweep itself ended early, and does not wait for jobs that still run: RuntimeError: Job 17 was killed\n"
        in said
    )


def test_where_the_folder_is_not_shared_a_failure_is_an_exception(swept, elsewhere, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: not path.name.startswith(".sweep-") and os.path.isdir(path))
    with pytest.raises(JobError, match="seed=3 is bad"):
        swept("-m", "name=s", "seed=3")


@needs_optuna
def test_optuna_minimises_and_goes_on(swept, monkeypatch, tmp_path):
    """Jobs that fail, or whose loss is not finite, stop no study (https://github.com/hydra-ecosystem/hydra/pull/2225),
    nor do jobs that are chosen once more; and the same command chooses the same jobs again, where a study that was
    resumed began to count anew (https://github.com/hydra-ecosystem/hydra/issues/1679)."""
    words = ["-m", "hydra/sweeper=tpe", "hydra.sweeper.n_trials=8", "name=s", "seed=0,2,3"]
    code, said, seeds = swept(*words)
    assert code == 1 and len(seeds) == 8 and {*seeds} == {0, 2, 3}, seeds
    (best,) = re.findall(r"best_value: (\S+)", (tmp_path / "optimization_results.yaml").read_text())
    assert float(best) == 0.5
    assert swept(*words)[2] == seeds
    code, said, _ = swept("-m", "hydra/sweeper=tpe", "hydra.sweeper.n_trials=1", "name=s", "seed=3")
    assert code == 1 and "seed=3 is bad" in said and "the sweep itself ended early" in said


# submitit, really

TASKS = """#!/bin/bash
cp "$1" {folder}/submitted.sh
for i in 0 1; do
    env SLURM_JOB_ID=$((17 + i)) SLURM_ARRAY_JOB_ID=17 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_NAME=ttr SLURM_NTASKS=1 \\
        SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost \\
        SLURM_NODELIST=localhost bash {folder}/submitted.sh > {folder}/log.$i 2>&1 &
done
echo "Submitted batch job 17"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = "#!/bin/sh\necho 'JobID|State|NodeList'; for i in 0 1; do echo \"17_$i|RUNNING|localhost\"; done\n"


def fake_slurm(folder: Path) -> None:
    """Commands that run the tasks of an array in the background, on this machine."""
    for name, text in {"sbatch": TASKS.format(folder=folder), "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@needs_submitit
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_submitit(launcher, tmp_path, cache):
    """Two jobs, one of them bad, each in a process of its own; begun in another folder than the repository's."""
    fake_slurm(tmp_path)
    words = ["-m", f"hydra/launcher={launcher}", "name=s", "model.num_heads=2,5", "trainer.devices=1", *JOB]
    environment = os.environ | {"RUNS": str(tmp_path / "runs"), "TTR_CACHE": str(cache)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1 and "\nsweep     2 jobs, 1 failed\n" in done.stdout, done.stdout + done.stderr
    assert "num_heads=5 does not divide hidden_size=32" in done.stdout.split("failed;")[1]
    assert (tmp_path / "runs" / "s" / "report.html").exists()
    (result,) = (tmp_path / "runs" / "s").glob("*/result.json")
    assert '"command": "python train.py -m name=s model.num_heads=2' in result.read_text()
    if launcher == "slurm":
        flags = re.findall(r"^#SBATCH --(\S+)$", (tmp_path / "submitted.sh").read_text(), flags=re.MULTILINE)
        assert {"array=0-1%2", "signal=USR2@120", "requeue", "time=1440", "gpus-per-node=1", "job-name=ttr"} <= {*flags}


# what needs no plugin


@pytest.mark.parametrize(("word", "choice"), [
    ("hydra/launcher=local", "hydra/launcher/submitit_local"),
    ("hydra/launcher=submitit_slurm", "hydra/launcher/submitit_slurm"),
    ("hydra/sweeper=tpe", "hydra/sweeper/optuna"),
])  # fmt: skip
def test_a_plugin_that_is_missing_is_named_with_the_line_that_installs_it(word, choice, swept):
    if importlib.util.find_spec("optuna" if "optuna" in choice else "submitit"):
        pytest.skip("it is installed")
    code, _, _ = swept("-m", word, "seed=1,2")
    assert code == f"error: {word} needs a plugin of Hydra that is not installed: pip install '{PLUGINS[choice]}'"
    assert f'"{PLUGINS[choice]}"' in (ROOT / "pyproject.toml").read_text()


def test_a_job_array_is_a_sweep(swept, monkeypatch, capsys, tmp_path):
    """Each index is a job, in the folder that the sweep gives it; and all indices are those of the sweep."""
    words = ["name=s", "model=softmax,mesa", "seed=1,2"]
    each = array_job.jobs(words)
    assert each == [["name=s", f"model={m}", f"seed={i}"] for m in ("softmax", "mesa") for i in (1, 2)]
    found = array_job.jobs(["model=glob(titans_ma?)", "x='a,b'"])
    assert found == [[f"model=titans_{m}", "x='a,b'"] for m in ("mac", "mag", "mal")]
    monkeypatch.setattr(sys, "argv", ["array_job.py", *words])
    array_job.main()
    assert capsys.readouterr().out.endswith(f"\nsbatch --array=0-3 scripts/slurm/array.sbatch {' '.join(words)}\n")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setattr(sys, "argv", ["array_job.py", *words])
    array_job.main()
    assert (tmp_path / "s" / "model=mesa,seed=1").is_dir()
    for task, typed, message in (
        ("4", words, "SLURM_ARRAY_TASK_ID=4 is no job of this sweep, which has 4: sbatch --array=0-3"),
        ("0", ["-m", *words], "-m is a flag: an array takes settings alone"),
        ("0", ["model=[softmax"], "no viable alternative"),
        ("0", [*words, "run_dir=a"], "run_dir=a: each job of a sweep has a folder of its own"),
    ):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setattr(sys, "argv", ["array_job.py", *typed])
        with pytest.raises(SystemExit, match=f"^error: {re.escape(message)}"):
            array_job.main()


@pytest.mark.parametrize("script", ["train", "array", "elastic"])
def test_the_sbatch_scripts_start_what_is_there(script, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1"}
    command = ["bash", str(ROOT / "scripts" / "slurm" / f"{script}.sbatch"), "name=a b"]
    *_, last = said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.splitlines()
    (started,) = (word for word in said if word.endswith(".py"))
    assert (ROOT / started).is_file() and last == "name=a b"
