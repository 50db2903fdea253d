"""Asked to stop: SIGTERM, SIGUSR1, SIGUSR2 and ctrl-c.

A run that is asked to stop saves after the optimizer step that it is in, on all ranks together, whichever of them was
asked, and exits with the codes below. Asked while it validates or saves, it does so after the step that follows.

    75    not finished, and nothing is wrong: the same command goes on        (EX_TEMPFAIL of sysexits.h)
    130   the same, after ctrl-c

SIGUSR1 is what Slurm sends ahead of a time limit (`sbatch --signal=USR1@120`), and SIGUSR2 where submitit submitted the
job: the job is then put back into the queue.
SIGTERM is not answered so, because it also is what scancel sends, and a job that Slurm preempts is requeued by Slurm.

Before training, while data are prepared, there is nothing to save, and the run stops at once. After the last step it
is finished in any case. A second signal of these changes nothing; a second ctrl-c ends the run without saving.
"""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

UNFINISHED = 75
AHEAD = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit
SIGNALS = (signal.SIGTERM, *AHEAD, signal.SIGINT)


class Stopped(SystemExit):
    """The run ends because it was asked to; the exit code says so. `where` is for people."""

    def __init__(self, preemption: Preemption, where: str) -> None:
        super().__init__(128 + signal.SIGINT if preemption.signal == signal.SIGINT else UNFINISHED)
        self.preemption, self.where = preemption, where

    def __str__(self) -> str:
        said = f"stopped by {(self.preemption.signal or signal.SIGTERM).name} {self.where}"
        again = "begins anew, for overwrite=true" if self.preemption.overwrites else "goes on"
        return f"{said}; the same command {again}"


class Preemption(Callback):
    """Takes the signals, within its `with`, in the place of Lightning, which saves inside the handler, in the middle of
    whatever was going on. What is stopped so ends here: a line, Slurm's queue, the exit code.

    asked: of the last run of this process, though it was finished before it could stop; a sweep then stops after it.
    signal: the first that this rank was sent.  agreed: whether all ranks know of one. They exchange one message a step
    about that and whatever else they have to agree on (Training.configure_gradient_clipping).
    """

    asked: signal.Signals | None = None

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = self.requeue = self.training = False
        self.overwrites = False  # whether the run was told overwrite=true, as debug= does

    def __enter__(self) -> Preemption:
        self.process = os.getpid()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, stop: BaseException | None, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        Preemption.asked = self.signal
        if isinstance(stop, Stopped):
            if self.agreed and rank_zero_only.rank != 0:  # the first says all, and Lightning kills it if another fails
                raise SystemExit(0)
            print(stop, flush=True)
            if self.requeue:
                requeue()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = self.signal or signal.Signals(number)
        self.requeue |= number in AHEAD
        if os.getpid() != self.process:  # a loader's worker, forked: signals to the whole group are not its business,
            if again and number == signal.SIGTERM:  # but its owner's are, which come after
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.training:
            raise Stopped(self, "before the first step")
        elif again and number == signal.SIGINT:
            raise KeyboardInterrupt
        elif not again and rank_zero_only.rank == 0:  # os.write, because print may be what was interrupted
            hint = "; ctrl-c again: at once, without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{self.signal.name}: stopping after this step{hint}\n".encode())

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.training = True
        trainer._signal_connector.register_signal_handlers = lambda: None
        # Lightning asks before every micro-batch whether its own handler was called, and waits for the GPU to hear it
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def votes(self) -> list[float]:
        """What this rank has to say, to be summed over all ranks and handed to `agree`."""
        return [float(self.signal is not None), float(self.requeue)]

    def agree(self, votes: list[float]) -> None:
        self.agreed, self.requeue = votes[0] > 0, votes[1] > 0
        if self.agreed and self.signal is None:
            self.signal = signal.SIGTERM


def stop_of_a_sweep() -> SystemExit:
    """After a job that was asked to stop, and was finished."""
    number, Preemption.asked = Preemption.asked, None
    assert number is not None
    print(f"{number.name}: the job was finished; the sweep stops, and the same command goes on", flush=True)
    return SystemExit(128 + number if number == signal.SIGINT else UNFINISHED)


def requeue() -> None:
    """Puts a Slurm job back into the queue. The last thing that the first rank does, because it ends the job. Of an
    array it names the task: one of them has the id of all in SLURM_JOB_ID, and would put all back.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        print(f"putting job {job} back into the queue", flush=True)
        try:
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"warning: scontrol requeue {job} failed: {getattr(error, 'stderr', None) or error}", flush=True)
