"""A launch of fla's kernels that the table of this machine has is taken; candidates of others are compiled side by side
before they are timed, and only where no result is known."""

from __future__ import annotations

import inspect
import json
import threading
import time
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest

from models.kernels import tuning

FOLDER = tuning.FOLDER
PLACE = ((9, 0), "3.7.1", "0.6.0")
KEY = (4, 64, "torch.bfloat16")
TABLE = {
    "gpu": "NVIDIA H200",
    "capability": [9, 0],
    "triton": "3.7.1",
    "fla": "0.6.0",
    "launches": {"fla.ops.common.chunk_h.chunk_fwd_kernel_h": {"K=64, bfloat16": {"num_warps": 8}}},
}


def kernel_of(module: str, key: tuple[object, ...] = KEY) -> type:
    """In place of Triton's Autotuner: what it compiles, one after another, when it times a candidate."""

    class Kernel:
        def __init__(self) -> None:
            self.key, self.cache_results, self.known, self.compiled, self.refused = key, False, set(), [], []
            self.cache, self.keys, self.configs = {}, ["H", "K", "BV"], [SimpleNamespace(kwargs={"BV": 64})]
            self.base_fn = SimpleNamespace(__module__=module, __name__="chunk_fwd_kernel_h")
            self.fn = SimpleNamespace(warmup=self.warmup)
            self.candidates = [SimpleNamespace(all_kwargs=lambda n=n: {"num_warps": n}) for n in (4, 8)]

        def warmup(self, *args: int, grid: tuple[int, ...], width: int, num_warps: int) -> None:
            assert args == (1, 2) and grid == (3,) and width == 64
            self.compiled.append(num_warps)

        def run(self, *args: int, **kwargs: object) -> str:
            assert self.cache_results == module.startswith("fla.")
            if self.key not in self.cache:
                self.check_disk_cache(self.key, self.candidates, lambda: self.timed(self.candidates))
            self.best_config = self.cache[self.key]
            launch = self.best_config.all_kwargs()
            if launch in self.refused:
                raise RefusedError("shared memory")
            return "ran"

        def timed(self, candidates: list[object]) -> None:
            self.compiled.append("timed")
            self.cache[self.key] = candidates[0]

        def check_disk_cache(self, key: tuple[object, ...], candidates: list[object], time_them) -> bool:
            if key in self.known:
                self.cache[key] = candidates[1]
                return True
            time_them()
            self.known.add(key)
            return False

    return Kernel


class RefusedError(Exception):
    """In place of Triton's for a launch that the GPU can't take."""


class Asynchronous:
    """In place of triton.runtime._async_compile."""

    class AsyncCompileMode(AbstractContextManager):
        def __init__(self, pool, ignore_errors: bool) -> None:
            assert ignore_errors and pool.submit(threading.get_ident).result() != threading.get_ident()

        def __exit__(self, *_: object) -> None:
            time.sleep(0)


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    """The folder of tables, with one in it, and no cache of what fits."""
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "here", lambda: PLACE)
    tuning.kept.cache_clear()
    tuning.say_nearest.cache_clear()
    (tmp_path / "h200.json").write_text(json.dumps(TABLE))
    yield tmp_path / "h200.json"
    tuning.kept.cache_clear()


def called(module: str = "fla.ops.common.chunk_h", key: tuple[object, ...] = KEY, times: int = 2, refused=(), known=()):
    """A kernel that was called so often. refused: launches that the GPU can't take; known: keys in Triton's cache."""
    kind = kernel_of(module, key)
    tuning.tuned(kind, Asynchronous, (RefusedError,))
    kernel = kind()
    kernel.refused, kernel.known = list(refused), set(known)
    for _ in range(times):
        assert kernel.run(1, 2, grid=(3,), warmup=False, width=64) == "ran"
    assert not hasattr(kernel, "given")
    return kernel


def test_candidates_are_compiled_before_they_are_timed_and_once(table):
    table.unlink()
    assert called().compiled == [4, 8, "timed"]


def test_kernels_of_others_are_left_alone():
    assert called("models.kernels.delta.scans").compiled == ["timed"]


def test_a_launch_of_the_table_is_taken_and_nothing_compiled_or_timed():
    kernel = called()
    assert kernel.compiled == [] and kernel.cache[KEY].all_kwargs() == {"num_warps": 8}


def test_the_numbers_of_sequences_and_heads_are_no_matter():
    assert called(key=(6, 64, "torch.bfloat16")).compiled == []


@pytest.mark.parametrize("key", [(4, 512, "torch.bfloat16"), (4, 64, "torch.float32"), (4, 64), (64, "torch.bfloat16")])
def test_another_key_is_tuned(key):
    assert called(key=key).compiled == [4, 8, "timed"]


def test_another_kernel_is_tuned():
    assert called("fla.ops.common.chunk_h_split").compiled == [4, 8, "timed"]


@pytest.mark.parametrize("place", [((8, 0), *PLACE[1:]), (PLACE[0], "3.8.0", "0.6.0"), (*PLACE[:2], "0.6.1")])
def test_on_another_gpu_or_with_other_releases_all_are_tuned(monkeypatch, place, caplog):
    monkeypatch.setattr(tuning, "here", lambda: place)
    with caplog.at_level("INFO"):
        assert called().compiled == [4, 8, "timed"]
    assert "scripts/tune.py" in caplog.text


def test_what_is_taken_is_said_once(caplog):
    with caplog.at_level("INFO"):
        called()
        called()
    assert caplog.text.count("NVIDIA H200") == 1


@pytest.mark.parametrize("name", ["FLA_CACHE_MODE", "FLA_CONFIG_DIR"])
def test_who_sets_flas_own_way_gets_it(monkeypatch, name):
    monkeypatch.setenv(name, "disabled")
    assert called().compiled == [4, 8, "timed"]


def test_a_launch_that_is_no_candidate_here_is_not_taken(table):
    """As where fla prunes what is wrong on this GPU."""
    launch = {"K=64, bfloat16": {"num_warps": 16}}
    table.write_text(json.dumps(TABLE | {"launches": {"fla.ops.common.chunk_h.chunk_fwd_kernel_h": launch}}))
    assert called().compiled == [4, 8, "timed"]


WIDE = (4, 128, "torch.bfloat16")


@pytest.mark.parametrize("width", [16, 48, 128, 256])
def test_another_size_is_launched_as_the_nearest(width):
    key = (4, width, "torch.bfloat16")
    kernel = called(key=key)
    assert kernel.compiled == [] and kernel.cache[key].all_kwargs() == {"num_warps": 8} and kernel.known == set()


def test_who_is_compared_with_is_tuned_unless_the_table_has_it(monkeypatch):
    monkeypatch.setattr(tuning, "side_by_side", lambda: None)
    monkeypatch.setattr(tuning, "_lent", True)
    tuning.without_loans()
    assert called(key=WIDE).compiled == [4, 8, "timed"] and called().compiled == []


def test_what_triton_remembers_comes_before_the_nearest(table):
    launch = {"K=64, bfloat16": {"num_warps": 4}}
    table.write_text(json.dumps(TABLE | {"launches": {"fla.ops.common.chunk_h.chunk_fwd_kernel_h": launch}}))
    kernel = called(key=WIDE, known=[WIDE])
    assert kernel.compiled == [] and kernel.cache[WIDE].all_kwargs() == {"num_warps": 8}


def test_the_nearest_is_said_once(caplog):
    with caplog.at_level("INFO"):
        called(key=WIDE)
        called(key=(4, 32, "torch.bfloat16"))
    assert caplog.text.count("nearest sizes") == 1


def test_a_nearest_launch_that_the_gpu_refuses_is_tuned_and_said(caplog):
    with caplog.at_level("INFO"):
        kernel = called(key=WIDE, refused=[{"num_warps": 8}])
    assert kernel.compiled == [4, 8, "timed"] and kernel.cache[WIDE].all_kwargs() == {"num_warps": 4}
    assert "chunk_fwd_kernel_h can't be launched" in caplog.text and "shared memory" in caplog.text


def test_a_launch_of_the_table_that_the_gpu_refuses_is_an_error():
    with pytest.raises(RefusedError):
        called(refused=[{"num_warps": 8}])


def test_a_nearest_launch_that_is_refused_is_tuned_by_triton_itself():
    """By its own class, with what is read of it here: only its disk cache and its clock are others."""
    autotuner, errors = (pytest.importorskip(f"triton.runtime.{name}") for name in ("autotuner", "errors"))
    launched = []

    class Kind(autotuner.Autotuner):
        run = inspect.unwrap(autotuner.Autotuner.run)  # another test may have replaced it

        def check_disk_cache(self, key, candidates, time_them) -> bool:
            time_them()
            return False

    def launch(x, K, *, grid, num_warps, **_) -> None:
        launched.append(num_warps)
        if num_warps == 8:
            raise errors.OutOfResources(2, 1, "shared memory")

    def chunk_fwd_kernel_h(x, K) -> None: ...

    chunk_fwd_kernel_h.__module__ = "fla.ops.common.chunk_h"
    kernel = SimpleNamespace(fn=chunk_fwd_kernel_h, run=launch, warmup=lambda *_, **__: None)
    tuning.tuned(Kind, Asynchronous, (errors.OutOfResources,))
    candidates = [autotuner.Config({}, num_warps=n) for n in (8, 4, 2)]
    launches = {"K=64, bfloat16": candidates[0].all_kwargs()}
    tuning.kept().update({"fla.ops.common.chunk_h.chunk_fwd_kernel_h": launches})

    def seconds(call, quantiles) -> list[float]:
        call()
        return [float(launched[-1])] * 3

    tuner = Kind(kernel, ["x", "K"], candidates, ["K"], None, None, do_bench=seconds)
    x = SimpleNamespace(dtype="torch.bfloat16")
    tuner.run(x, K=128, grid=(1,))
    tuner.run(x, K=128, grid=(1,))
    assert launched == [8, 8, 4, 2, 2, 2] and tuner.best_config.num_warps == 2


def test_a_launch_of_the_table_is_an_error_where_another_key_has_the_same_one_as_its_nearest():
    kernel = called(key=WIDE)
    kernel.key, kernel.refused = KEY, [{"num_warps": 8}]
    with pytest.raises(RefusedError):
        kernel.run(1, 2, grid=(3,), warmup=False, width=64)
    assert WIDE in kernel.cache


@pytest.mark.parametrize(
    "warps",
    [
        {48: 4, 128: 8},  # by ratios the second is nearer, by differences the first
        {128: 16, 256: 8, 512: 4},  # the nearest is no candidate here
    ],
)
def test_the_nearest_that_is_a_candidate_here_is_taken(table, warps):
    launches = {f"K={width}, bfloat16": {"num_warps": n} for width, n in warps.items()}
    table.write_text(json.dumps(TABLE | {"launches": {"fla.ops.common.chunk_h.chunk_fwd_kernel_h": launches}}))
    key = (4, 96, "torch.bfloat16")
    assert called(key=key).cache[key].all_kwargs() == {"num_warps": 8}


def test_untimed_the_nearest_is_taken_and_kept():
    with tuning.untimed() as unknown:
        kernel = called(key=WIDE)
        assert unknown == []
    assert kernel.compiled == [] and kernel.cache[WIDE].all_kwargs() == {"num_warps": 8}


@pytest.mark.parametrize(
    ("one", "other", "octaves"),
    [
        ("K=64 V=64, bfloat16", "K=64 V=64, bfloat16", 0.0),
        ("K=64 V=64, bfloat16", "K=128 V=128, bfloat16", 2.0),
        ("K=64 V=512, bfloat16", "K=128 V=128, bfloat16", 3.0),
        ("K=64 V=1024, bfloat16", "K=128 V=128, bfloat16", float("inf")),
        ("K=64 G=True, bfloat16", "K=64 G=False, bfloat16", float("inf")),
        ("K=64 V=64, bfloat16", "K=64 BV=64, bfloat16", float("inf")),
        ("K=64 V=0, bfloat16", "K=64 V=64, bfloat16", float("inf")),
        ("K=64, bfloat16 float32", "K=64, bfloat16", float("inf")),
        ("K=64, float32", "K=64, bfloat16", float("inf")),
    ],
)
def test_keys_are_near_in_their_numbers_alone(one, other, octaves):
    assert tuning.distance(one, other) == tuning.distance(other, one) == octaves


def test_processes_of_one_computer_begin_at_different_candidates(table, monkeypatch):
    table.unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert called().compiled == [8, 4, "timed"]


def test_untimed_all_candidates_are_asked_for_and_timed_later(table):
    table.unlink()
    with tuning.untimed():
        kernel = called(times=2)
        assert kernel.compiled == [4, 8]
    assert kernel.cache == {} and kernel.known == set()
    kernel.run(1, 2, grid=(3,), warmup=False, width=64)
    assert kernel.compiled == [4, 8, 4, 8, "timed"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_can_be_read(path):
    table = tuning.read(path)
    assert table.gpu and len(table.capability) == 2 and table.launches
    for name, launches in table.launches.items():
        assert name.startswith("fla.")
        for key, launch in launches.items():
            assert ", " in key and {"num_warps", "num_stages", "num_ctas"} <= launch.keys()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"gpu": "x", "capability": [9, 0], "triton": "", "fla": "", "launches": null}']
)
def test_a_broken_table_is_named(tmp_path, text):
    (path := tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is no table of launches"):
        tuning.read(path)
