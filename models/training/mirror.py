"""A run's copy elsewhere: mirror=s3://bucket/runs, or any other URL of fsspec, or a folder.

After each checkpoint the first rank copies it there, with the run's records, while training goes on; at the end also
the model. On a machine that has no such run, or an older state of it, the same command fetches it first.

    MIRROR/NAME/SOME-STEP/...  files, each under the step of the copy that brought it
               mirror.json     of each file of the run: where it is, its bytes and SHA-256

The list is written last and under another name first, and then files are removed that it does not name. So a kill at
any moment leaves the copy before or this one, whole. Only the newest checkpoint is there.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from conf.folders import runs
from data.remote import file_system, said
from models.training.checkpoint import sha256, step_of, sync

LIST = "mirror.json"
LAST = ("", ".sha256", ".ckpt", "config.yaml")  # these in this order: with the last ones a run is there


class Mirror:
    """url: where the copies of all runs are. folder: the run's."""

    def __init__(self, url: str, folder: str | Path) -> None:
        self.folder, self.url = Path(folder).absolute(), url
        root = Path(runs()).absolute()
        name = self.folder.relative_to(root) if self.folder.is_relative_to(root) else self.folder.name
        self.system, path = file_system(url, "mirror")
        self.place = f"{path.rstrip('/')}/{name}"
        self.thread: threading.Thread | None = None
        self.error = ""

    def begin(self, step: int) -> None:
        """Copies what is there now; the checkpoint that is named by the step must stay until `wait`."""
        self.wait()
        held = self.folder / ".mirror"  # records grow while they are copied
        shutil.rmtree(held, ignore_errors=True)
        files = dict(self._files(step))
        for name, file in files.items():
            if not name.startswith("checkpoints/"):
                files[name] = held / name
                files[name].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, files[name])
        self.thread = threading.Thread(target=self._copy, args=(step, files), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the copy is done that was begun. One that failed is told, and the next checkpoint's is another try."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            shutil.rmtree(self.folder / ".mirror", ignore_errors=True)
        if self.error:
            print(f"warning: mirror={self.url} could not be written ({self.error}); the copy is of before", flush=True)
            self.error = ""

    def fetch(self) -> str:
        """Brings the run where this machine has none, or an older state. What was brought, in a line, "" for nothing.
        Raises ValueError where the mirror can't be read, or holds other bytes than were put there. Of several processes
        of a machine one does it, and the others wait.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(f".{self.folder.name}.fetch")):
            try:
                there = self._list()
                if not there["files"] or there["step"] <= newest(self.folder):
                    return ""
                self._fetch(there["files"])
            except Exception as error:  # of any library
                raise ValueError(f"mirror={self.url} can't be read ({said(error)})") from error
        return f"fetched from {self.url}: the run after step {there['step']:,}"

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
        return json.loads(self.system.cat_file(f"{self.place}/{LIST}"))

    def _copy(self, step: int, files: dict[str, Path]) -> None:
        try:
            before, found, part = self._list()["files"], {}, f"{step:09d}-{time.time_ns():x}"
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
            named = {about["at"] for about in found.values()}
            for path in self.system.find(self.place):  # what a killed copy has left too
                at = str(path).partition(f"{self.place.strip('/')}/")[2]
                if at not in named and at != LIST:
                    self.system.rm_file(path)
        except Exception as error:  # of any library, and in a thread, which would keep it to itself: `wait` tells it
            self.error = said(error)

    def _fetch(self, files: dict[str, dict[str, Any]]) -> None:
        draft = self.folder.with_name(f".{self.folder.name}.fetched")
        for name, about in files.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not (file.exists() and sha256(file) == about["sha256"]):
                self.system.get_file(f"{self.place}/{about['at']}", str(file))
            if sha256(file) != about["sha256"]:
                raise ValueError(f"{self.place}/{about['at']} is not what was put there")
            with file.open("rb") as opened:
                sync(opened)
        for name in sorted(files, key=lambda name: max(i * name.endswith(end) for i, end in enumerate(LAST))):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(self.folder / name)
        shutil.rmtree(draft)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint of a run, -1 where there is no run."""
    if not (folder / "config.yaml").exists():
        return -1
    return max(map(step_of, (folder / "checkpoints").glob("step-[0-9]*.ckpt")), default=0)
