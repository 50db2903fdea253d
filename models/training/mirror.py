"""A run's copy elsewhere: mirror=s3://bucket/runs, or any other URL of fsspec, or a folder.

After each checkpoint the first rank copies it there, with the run's records, while training goes on; at the end also
the model. On a machine that has no such run, or an older state of it, the same command fetches it first.

    MIRROR/NAME/SOME-STEP/...  files, each under the step of the copy that brought it
               mirror.json     of each file of the run: where it is, its bytes and SHA-256

The list is written last and under another name first, and then files of earlier copies are removed that it does not
name, and no others. So a kill at any moment leaves the copy before or this one, whole. Only the newest checkpoint is
there.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from omegaconf import OmegaConf

from conf.folders import runs
from data.remote import file_system, said
from models.build import current
from models.training.checkpoint import sha256, step_of, sync, what_is_wrong
from models.training.run import difference

LIST = "mirror.json"
MADE = re.compile(r"\d{9,}-[0-9a-f]+(/|-mirror\.json$)")  # what a copy may take away: what copies have made
LAST = ("", ".sha256", ".ckpt", "config.yaml")  # these in this order: with the last ones a run is there


class OtherRunError(ValueError):
    """The mirror has a run of this name that is another one."""


class Mirror:
    """url: where the copies of all runs are. folder: the run's."""

    def __init__(self, url: str, folder: str | Path) -> None:
        self.folder, self.url = Path(folder).absolute(), url
        root = Path(runs()).absolute()
        name = self.folder.relative_to(root) if self.folder.is_relative_to(root) else self.folder.name
        self.system, path = file_system(url, "mirror")
        self.place = f"{path.rstrip('/')}/{name}"
        local = isinstance(self.system, LocalFileSystem)
        if local and Path(self.place).resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"mirror={url} is where the run itself is, {self.folder}; choose a folder elsewhere")
        self.thread: threading.Thread | None = None
        self.error, self.copied = "", -1  # the step of the newest whole copy that is known

    def begin(self, step: int) -> None:
        """Copies what is there now; the checkpoint that is named by the step must stay until `wait`."""
        self.wait()
        held = self.folder / ".mirror"  # records grow while they are copied
        shutil.rmtree(held, ignore_errors=True)
        files = dict(self._files(step))
        try:
            for name, file in files.items():
                if not name.startswith("checkpoints/"):
                    files[name] = held / name
                    files[name].parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, files[name])
        except OSError as error:
            self.error = said(error)
            return
        self.thread = threading.Thread(target=self._copy, args=(step, files), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the copy is done that was begun. One that failed is told, and the next checkpoint's is another try."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            shutil.rmtree(self.folder / ".mirror", ignore_errors=True)
        if self.error:
            there = f"the copy there is of step {self.copied:,}" if self.copied >= 0 else "there is no copy of today"
            print(f"warning: mirror={self.url} could not be written ({self.error}); {there}", flush=True)
            self.error = ""

    def fetch(self, config: dict[str, Any] | None = None) -> str:
        """Brings the run where this machine has none, or an older state. What was brought, in a line, "" for nothing.

        config: of the run to come, which must be that of the copy but for its length; else OtherRunError. Where the
        mirror can't be read, or holds other bytes than were put there, a state that is here goes on, and the line is a
        warning; without one it raises ValueError. Of several processes of a machine one does it, and the others wait.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(f".{self.folder.name}.fetch")):
            try:
                there = self._list()
                self.copied = there["step"]
                if there["files"] and config is not None:
                    self._agree(there["files"]["config.yaml"], config)
                if not there["files"] or there["step"] <= newest(self.folder):
                    return ""
                self._fetch(there["files"])
            except OtherRunError:
                raise
            except Exception as error:  # of any library
                bad = f"mirror={self.url} can't be read ({said(error)})"
                if newest(self.folder) > 0:
                    return f"warning: {bad}; the run goes on from its own folder, and its next checkpoint is copied"
                raise ValueError(f"{bad}; take {self.place} away, or leave mirror= out, to begin anew") from error
        return f"fetched from {self.url}: the run after step {there['step']:,}"

    def _agree(self, about: dict[str, Any], now: dict[str, Any]) -> None:
        """Raises OtherRunError where what is there can't be this run, of whatever length."""
        there = self.system.cat_file(f"{self.place}/{about['at']}").decode()
        before = current(OmegaConf.to_container(OmegaConf.create(there)))
        if found := difference(before | {key: now.get(key) for key in ("tokens", "schedule")}, now):
            raise OtherRunError(
                f"mirror={self.url} holds a run of this name with another config:\n{found}\n"
                "Choose another name= or mirror=, or overwrite=true to put this run in its place."
            )

    def _files(self, step: int) -> Iterator[tuple[str, Path]]:
        """All but other checkpoints, what is of this machine alone, and jobs of a sweep of this name."""
        for top in sorted(self.folder.iterdir()):
            if top.name.startswith(".") or (top / "config.yaml").exists():
                continue
            for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                name = file.relative_to(self.folder).as_posix()
                old = top.name == "checkpoints" and step_of(Path(name.split("/")[1])) != step
                if file.is_file() and not old and file.suffix != ".partial":
                    yield name, file

    def _list(self) -> dict[str, Any]:
        if not self.system.exists(f"{self.place}/{LIST}"):
            return {"step": -1, "files": {}}
        try:
            return json.loads(self.system.cat_file(f"{self.place}/{LIST}"))
        except json.JSONDecodeError:
            raise ValueError(f"{self.place}/{LIST} is damaged") from None

    def _copy(self, step: int, files: dict[str, Path]) -> None:
        try:
            before: dict[str, Any] = {}
            with suppress(ValueError):  # damaged, and so written anew
                before = self._list()["files"]
            found, part = {}, f"{step:09d}-{time.time_ns():x}"
            for name, file in files.items():
                about = {"bytes": file.stat().st_size, "sha256": sha256(file)}
                old = before.get(name, {})
                if {key: old.get(key) for key in about} == about:
                    found[name] = old
                    continue
                found[name] = {"at": f"{part}/{name}"} | about
                self.system.makedirs(f"{self.place}/{part}/{name}".rpartition("/")[0], exist_ok=True)
                self.system.put_file(str(file), f"{self.place}/{part}/{name}")
            draft = f"{self.place}/{part}-{LIST}"
            self.system.makedirs(self.place, exist_ok=True)
            self.system.pipe_file(draft, json.dumps({"step": step, "files": found}, indent=1).encode())
            self.system.mv(draft, f"{self.place}/{LIST}")
            self.copied = step
            named = {about["at"] for about in found.values()}
            for path in self.system.find(self.place):  # what a killed copy has left too
                at = str(path).partition(f"{self.place.strip('/')}/")[2]
                if MADE.match(at) and at not in named:
                    self.system.rm_file(path)
        except Exception as error:  # of any library, and in a thread, which would keep it to itself: `wait` tells it
            self.error = said(error)

    def _fetch(self, files: dict[str, dict[str, Any]]) -> None:
        draft = self.folder.with_name(f".{self.folder.name}.fetched")
        for name, about in files.items():
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"{self.place}/{LIST} names {name}, which is outside of a run")
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not (file.exists() and sha256(file) == about["sha256"]):
                self.system.get_file(f"{self.place}/{about['at']}", str(file))
            if sha256(file) != about["sha256"]:
                raise ValueError(f"{self.place}/{about['at']} is not what was put there")
            with file.open("rb") as opened:
                sync(opened)
        if "result.json" not in files:  # of before the run was prolonged: it is not finished
            (self.folder / "result.json").unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: max(i * name.endswith(end) for i, end in enumerate(LAST))):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(self.folder / name)
        shutil.rmtree(draft)


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint of a run, -1 where there is no run."""
    if not (folder / "config.yaml").exists():
        return -1
    paths = (folder / "checkpoints").glob("step-[0-9]*.ckpt")
    return max((step_of(path) for path in paths if not what_is_wrong(path)), default=0)
