"""A run's copy elsewhere is whole at any moment, and another machine goes on from it."""

from __future__ import annotations

import fsspec
import pytest

from models.training.checkpoint import checksum_of, newest_whole, sha256
from models.training.mirror import LIST, Mirror, OtherRunError, newest


def save(folder, step, shards=False):
    """What a run has after a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:09d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(1000) + step.to_bytes(4, "big"))
    files = [path]
    if shards:
        files.append(path.with_suffix(".shards") / "__0_0.distcp")
        files[1].parent.mkdir()
        files[1].write_text(f"a part of {step}")
    sums = (f"{sha256(file)}  {file.relative_to(path.parent)}\n" for file in files)
    checksum_of(path).write_text("".join(sums))
    (folder / "config.yaml").write_text("name: run")
    (folder / "metrics.csv").write_text("".join(f"{i}\n" for i in range(step)))
    (folder / ".lock").touch()
    (folder / "job" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "job" / "config.yaml").touch()  # of a sweep of the same name


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Mirrors of one run on two machines."""

    def on(name, url):
        monkeypatch.setenv("RUNS", str(tmp_path / name))
        return Mirror(url, tmp_path / name / "sweep" / "run")

    return on


@pytest.mark.parametrize("url", ["memory://mirror/runs", "{folder}/mirror"])
def test_another_machine_goes_on_from_it(url, machines, tmp_path):
    url = url.format(folder=tmp_path)
    first, second = machines("a", url), machines("b", url)
    assert second.fetch() == "" and not second.folder.exists()
    for step in (4, 8):
        save(first.folder, step, shards=step == 8)
        first.begin(step)
        (first.folder / "metrics.csv").write_text("a row that comes while it is copied")
    first.wait()
    assert "after step 8" in second.fetch()
    path, torn = newest_whole(second.folder / "checkpoints")
    assert path.name == "step-000000008.ckpt" and not torn and newest(second.folder) == 8
    assert (second.folder / "metrics.csv").read_text().count("\n") in (0, 8)
    assert {file.name for file in second.folder.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv"}
    assert second.fetch() == ""  # it has this state

    save(second.folder, 12)
    second.begin(12)
    second.wait()
    assert "after step 12" in first.fetch()  # whose own is older
    assert newest(first.folder) == 12
    names = [path.rpartition("/")[2] for path in first.system.find(first.place)]
    assert [name for name in names if "step" in name] == ["step-000000012.ckpt", "step-000000012.ckpt.sha256"]


@pytest.mark.parametrize("call", ["put_file", "pipe_file", "mv"])
def test_a_copy_that_breaks_off_leaves_the_one_before(call, machines, monkeypatch, capsys):
    url = f"memory://{call}"
    first = machines("a", url)
    save(first.folder, 4)
    first.begin(4)
    first.wait()
    with monkeypatch.context() as broken:

        def breaks(*_, **__):
            raise OSError("the connection is lost")

        broken.setattr(first.system, call, breaks)
        save(first.folder, 8)
        first.begin(8)
        first.wait()
    said = capsys.readouterr().out
    assert f"warning: mirror={url} could not be written (OSError: the connection is lost)" in said
    assert "the copy there is of step 4" in said
    second = machines("b", url)
    assert "after step 4" in second.fetch()
    path, torn = newest_whole(second.folder / "checkpoints")
    assert path.name == "step-000000004.ckpt" and not torn
    first.begin(8)  # the next try, which takes away what the last one has left
    first.wait()
    found = [path for path in first.system.find(first.place) if LIST not in path]
    assert len(found) == 4 and "after step 8" in second.fetch()


def test_other_bytes_than_were_put_there_are_told(machines):
    first = machines("a", "memory://damaged")
    save(first.folder, 4)
    first.begin(4)
    first.wait()
    system = fsspec.filesystem("memory")
    (path,) = [path for path in system.find(first.place) if path.endswith(".ckpt")]
    system.pipe_file(path, bytes(1000))
    second = machines("b", "memory://damaged")
    with pytest.raises(ValueError, match=r"mirror=memory://damaged can't be read \(.*is not what was put there"):
        second.fetch()
    assert not second.folder.exists()
    (listed,) = [path for path in system.find(first.place) if path.endswith(LIST)]
    system.pipe_file(listed, b'{"x')
    with pytest.raises(ValueError, match=r"mirror.json is damaged\); take .* away, or leave mirror= out"):
        second.fetch()
    assert first.fetch().startswith("warning: mirror=memory://damaged can't be read")  # which has its own state
    save(first.folder, 8)
    first.begin(8)
    first.wait()
    assert "after step 8" in second.fetch()
    with pytest.raises(ValueError, match=r"mirror=nowhere://x can't be read: fsspec knows no nowhere"):
        machines("c", "nowhere://x")


def test_a_copy_takes_nothing_away_that_no_copy_has_made(machines, tmp_path):
    """Neither another run below this one's name, nor somebody's own files."""
    first = machines("a", f"{tmp_path}/mirror")
    below = f"{first.place}/seed=1"
    others = [f"{below}/{LIST}", f"{below}/000000004-1a/config.yaml", f"{first.place}/notes.txt"]
    for path in others:
        first.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        first.system.pipe_file(path, b"{}")
    for step in (4, 8):
        save(first.folder, step)
        first.begin(step)
    first.wait()
    assert all(map(first.system.exists, others)) and len(first.system.find(first.place)) == len(others) + 5


def test_a_mirror_that_is_the_run_itself_is_refused(machines, tmp_path):
    for inside in ("", "/sweep/run", "/sweep/run/copies"):
        with pytest.raises(ValueError, match=r"is where the run itself is, .*; choose a folder elsewhere"):
            machines("a", f"{tmp_path}/a{inside}")


def test_another_run_of_the_same_name_is_refused_and_a_longer_one_is_not(machines):
    first, second = machines("a", "memory://names"), machines("b", "memory://names")
    save(first.folder, 4)
    first.begin(4)
    first.wait()
    with pytest.raises(OtherRunError, match=r"holds a run of this name with another config"):
        second.fetch({"name": "run", "seed": 1})
    assert not second.folder.exists()
    assert "after step 4" in second.fetch({"name": "run", "tokens": 100})


def test_what_was_finished_before_it_was_prolonged_is_not_finished(machines):
    first, second = machines("a", "memory://longer"), machines("b", "memory://longer")
    for at, step in ((second, 4), (first, 8)):
        save(at.folder, step)
    (second.folder / "result.json").touch()
    first.begin(8)
    first.wait()
    assert "after step 8" in second.fetch() and not (second.folder / "result.json").exists()


def test_a_torn_checkpoint_does_not_hide_a_copy_and_a_name_stays_in_the_run(machines):
    first, second = machines("a", "memory://torn"), machines("b", "memory://torn")
    for at in (first, second):
        save(at.folder, 8)
    (second.folder / "checkpoints" / "step-000000008.ckpt").write_bytes(bytes(10))
    first.begin(8)
    first.wait()
    assert newest(second.folder) == 0 and "after step 8" in second.fetch() and newest(second.folder) == 8
    listed = f"{first.place}/{LIST}"
    first.system.pipe_file(listed, first.system.cat_file(listed).replace(b"metrics.csv", b"../../x.csv", 1))
    with pytest.raises(ValueError, match=r"names ../../x.csv, which is outside of a run"):
        machines("c", "memory://torn").fetch()
