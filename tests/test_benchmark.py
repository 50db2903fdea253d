"""Whole models side by side, in small and on a CPU: equal parameters, a row or a reason for each, kernels by kind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
import torch

from models.kernels import delta, fla
from models.training import captured
from scripts import benchmark
from scripts.benchmarks import apart, contenders, data, decoding, kinds, losses, starting, steps, whole
from scripts.benchmarks.contenders import COMPILED, DEFAULT, PEERS, PRESETS, Sizes
from scripts.figures import speed
from tests.conftest import ROOT

SMALL = Sizes("tiny", vocabulary=64, D=96, H=3, layers=4, B=2, T=64)


def in_process(function: str, given: dict, limit: float, cold: bool, slot: dict):
    """As the process of one model does it, by way of JSON too."""
    made = {"decoding": decoding.decode, "losses": losses.train, "starting": starting.start, "steps": steps.train}
    called = made[function.partition(".")[0]]
    return (json.loads(json.dumps(row)) for row in called(**json.loads(json.dumps(given))))


WORDS = {
    "train": "train --only gated_delta transformers.qwen3 fla.kda --steps 2",
    "starts": "starts --only gated_delta",
    "length": "length --only softmax --lengths 32 64 --steps 1",
    "losses": "losses --only gated_delta --steps 3 --seeds 0 1",
    "decode": "decode --only gated_delta softmax transformers.qwen3 fla.kda --batches 1 2 --contexts 8 --tokens 2 "
    "--repeats 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `benchmark.py` writes, with the small sizes and without processes: docs/speed in small."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "speed").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch.cuda.is_available", lambda: False)
        patched.setattr(contenders, "sizes_of", lambda size, batch, seq_len: SMALL)
        patched.setattr(whole.report, "__defaults__", (in_process, ()))
        for name, words in WORDS.items():
            path = folder / "speed" / f"{name}.json"
            patched.setattr(sys, "argv", ["benchmark.py", *words.split(), "--json", str(path)])
            benchmark.main()
    return folder


def read(folder, name):
    return json.loads((folder / "speed" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def rows(folder):
    return {row["name"]: steps.Trained(**row) for row in read(folder, "train")["rows"]}


@pytest.mark.slow
def test_a_row_for_each_or_a_reason(rows, folder):
    written = read(folder, "train")
    assert rows["fla.kda"].reason == "its kernels need a GPU"
    timed = [row for row in rows.values() if not row.reason]
    assert len(timed) == 2 and all(row.ms > 0 and len(row.steps) == 2 and row.first_s > 0 for row in timed)
    assert all(row.tokens_per_second == pytest.approx(2 * 64 / row.ms * 1e3, rel=1e-2) for row in timed)
    assert written["torch"] == torch.__version__ and written["device"] == "cpu"


@pytest.mark.slow
def test_all_train(rows):
    """They know after three steps that tokens are drawn from 64."""
    assert all(row.loss < 6 for row in rows.values() if row.loss is not None)


@pytest.mark.slow
def test_equal_parameters(rows):
    """Within the step of the feed-forward layer's width, 1.6 % of a block at this width and 0.2 % at 1,024."""
    counts = [row.num_params for row in rows.values() if row.num_params]
    assert max(counts) / min(counts) < 1.016


def test_operations_of_a_peer_are_those_of_the_same_model_of_ours():
    theirs = contenders.theirs("transformers.qwen3", SMALL, "cpu").flops
    assert theirs == pytest.approx(contenders.ours("softmax", SMALL, "cpu").flops, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.gpu])
def test_a_peer_that_needs_a_gpu_takes_steps(name):
    row = steps.time_training(name, SMALL._replace(D=128, H=2), "cuda", 1, kernels=True)
    assert row.loss < 6 and row.peak_gb > 0 and row.kinds


def test_the_peak_is_of_the_steps_in_which_a_graph_is_recorded(monkeypatch):
    """What it holds is not counted as allocated when it is replayed."""
    layer, done = torch.nn.Linear(4, 1), []

    def loss(batch):
        done.append("loss")
        return layer(torch.ones(4)).sum()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    made = contenders.Contender(layer, loss, optimizer, flops=1, begin=lambda batch: "", packs=True)
    monkeypatch.setattr(steps, "contender", lambda *given: made)
    monkeypatch.setattr(steps, "peak_gb", lambda work, device: (work(), len(done))[1])
    row = steps.time_training("one layer", SMALL, "cpu", steps=2)
    assert captured.WARM_UP < row.peak_gb == len(done) - 2


def test_the_peak_of_some_work(monkeypatch):
    done = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: len(done) * 1e9)
    assert steps.peak_gb(lambda: done.append("work"), "cuda") == 2 and done == ["reset", "work"]
    assert steps.peak_gb(lambda: done.append("more"), "cpu") is None and done[2:] == ["more"]


def test_of_two_releases_the_imported_one_is_named(monkeypatch, tmp_path):
    """One stands before the other on the path."""
    (tmp_path / "torch-99.dist-info").mkdir()
    (tmp_path / "torch-99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert whole.environment("cpu")["torch"] == "99"


def test_names():
    assert all(contenders.known(name) is None for name in (*DEFAULT, *PRESETS))
    for name in ("gated_deltas", f"softmax{COMPILED}", "fla.transformers"):
        assert contenders.known(name).startswith(f"{name} is neither a preset of conf/model nor one of fla.gated_delta")


def test_documents_are_packed_as_data_packs_them():
    batch = contenders.batch_of(SMALL._replace(B=8, T=512), "cpu")
    ids, labels, segments = batch["input_ids"], batch["labels"], batch["segments"]
    ends = segments[:, 1:] != segments[:, :-1]
    assert ends.any() and (segments[:, 0] == 0).all() and (segments.diff() >= 0).all()
    assert (labels[:, :-1][ends] == -100).all() and (labels[:, :-1] == ids[:, 1:])[~ends].all()


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "regression"),
        ("coefficients_gradient", "regression"),  # of models/kernels/momentum
        ("gate_gradient", "activations"),  # of models/kernels/swiglu
        ("cross_entropy", "cross-entropy"),
        ("pairs_forward", "convolution"),
        ("add_and_norm_gradient", "norms"),
        ("column_sums", "casts, copies, sums"),
        ("backward_keys_kernel", "attention"),
        ("causal_conv1d_bwd_kernel", "convolution"),
        ("triton_poi_fused__to_copy_cat_cos_mul_sin_12", "rotary positions"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_3", "norms"),
        ("triton_poi_fused_cat_mul_silu_silu_backward_7", "activations"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "optimizer and clipping",
        ),
        ("Memcpy DtoD (Device -> Device)", "casts, copies, sums"),
        ("something", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kinds.kind_of(kernel) == kind


def test_kinds_are_of_folders_and_files_that_exist():
    assert kinds.OF_FOLDERS.keys() <= {path.stem for path in kinds.KERNELS.iterdir()}


def test_kinds_sum_the_kernels():
    found = kinds.by_kind({"gemm_1": (1.0, 2), "gemm_2": (2.0, 3), "something": (4.0, 1)})
    assert found == {"other": (4.0, 1), "matrix products": (3.0, 5)} and list(found) == ["other", "matrix products"]


def test_a_process_of_its_own_ends_in_time(monkeypatch, tmp_path):
    """With the processes that it started; and one that fails says why."""
    for name in ("torch", "scripts", "models"):
        assert name not in apart.__dict__, "the child would import it before its time begins"
    monkeypatch.setattr(apart, "ROOT", tmp_path)
    package = tmp_path / "scripts" / "benchmarks"
    package.mkdir(parents=True)
    (package / "apart.py").write_text((benchmark.Path(apart.__file__)).read_text())
    (package / "trial.py").write_text(
        "import subprocess, sys, time, os\n"
        "def double(x): yield 2 * x, os.environ.get('TRITON_CACHE_DIR', '')[-6:]\n"
        "def fail(x):\n"
        "    yield 0\n"
        "    raise ValueError(f'{x} is too much')\n"
        "def hang(file):\n"
        "    subprocess.Popen([sys.executable, '-c', f'import time; time.sleep(2); open({file!r}, \"w\")'])\n"
        "    time.sleep(60)\n"
    )
    assert list(apart.apart("trial.double", {"x": 2}, 20, cold=True)) == [[4, "triton"]]
    failing, hanging = (
        apart.apart("trial.fail", {"x": 3}, 20),
        apart.apart("trial.hang", {"file": str(tmp_path / "left")}, 1),
    )
    assert next(failing) == 0
    with pytest.raises(apart.LeftOutError, match=r"^ValueError: 3 is too much$"):
        next(failing)
    with pytest.raises(apart.LeftOutError, match=r"^not done within 1 s$"):
        next(hanging)
    threading.Timer(1, apart.interrupted.set).start()
    try:
        with pytest.raises(apart.LeftOutError, match=r"^interrupted$"):
            next(apart.apart("trial.hang", {"file": str(tmp_path / "left")}, 50))
    finally:
        apart.interrupted.clear()
    time.sleep(1.5)
    assert not (tmp_path / "left").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at_once", ["1", "2"])
def test_ctrl_c_is_one_sentence(tmp_path, at_once):
    """It goes to all processes of a terminal; that which others are forked from is at its imports then."""
    words = [sys.executable, "scripts/benchmark.py", "starts", "--only", "linear", "titans", "--at-once", at_once]
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    while "M params" not in (tmp_path / "said").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 1
    said = (tmp_path / "said").read_text()
    assert said.endswith("error: interrupted\n") and "Traceback" not in said, said


def test_a_model_that_fails_is_told_at_the_end(monkeypatch, capsys):
    """With the exit code, after the rows of all; one that this machine has not is left out and has not failed."""

    def run(function: str, given: dict, *more):
        if given["name"] == "linear":
            raise apart.LeftOutError("RuntimeError: no")
        yield asdict(decoding.Decoded(given["name"], 1, 8, 1.0, None, 1.0))

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(whole.report, "__defaults__", (run, ()))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "decode", "--only", "linear", "fla.kda", "softmax"])
    with pytest.raises(SystemExit, match=r"^error: failed: linear$"):
        benchmark.main()
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "left out: RuntimeError: no" in lines[0] and "left out: its kernels need" in lines[1] and "1.0" in lines[2]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "decode", "--only", "fla.kda", "softmax"])
    benchmark.main()


@pytest.mark.slow
def test_forked_from_a_process_that_has_imported_all():
    """A row, an error's last line, and a limit of time; the environment is the child's own."""
    given = {"name": "gated_delta", "sizes": list(SMALL), "device": "cpu", "steps": 1, "warm_up": 0, "compiled": False}
    slot = {"CUDA_VISIBLE_DEVICES": "7", "TRITON_CACHE_DIR": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": "/nowhere"}
    (row,) = apart.forked("steps.train", given, 60, slot=slot)
    assert row["name"] == "gated_delta" and row["caches"] == "cold" and os.environ.get("TRITON_CACHE_DIR") != "/nowhere"
    with pytest.raises(apart.LeftOutError, match=r"^KeyError: 'gated_deltas'$"):
        list(apart.forked("steps.train", given | {"name": "gated_deltas"}, 60))
    with pytest.raises(apart.LeftOutError, match=r"^not done within 0.1 s$"):
        list(apart.forked("steps.train", given, 0.1))


@pytest.mark.slow
def test_as_many_tokens_in_longer_sequences(folder):
    rows = read(folder, "length")["rows"]
    assert [(row["tokens"], row["seq_len"]) for row in rows] == [(64, 32), (64, 64)]
    assert all(row["tokens_per_second"] > 0 and "whole rows" in row["note"] for row in rows)


def test_without_kernels_a_model_learns_the_same(folder):
    """On a CPU both ways are the same, bit for bit; weights of another seed are others."""
    rows = {(row["path"], row["seed"]): row["losses"] for row in read(folder, "losses")["rows"]}
    assert all(len(found) == 3 for found in rows.values()) and len(rows) == 4
    assert rows["kernels", 0] == rows["plain", 0] != rows["kernels", 1] == rows["plain", 1]


def test_no_kernel_runs_where_they_are_switched_off():
    with losses.without_kernels():
        assert "switched off" in delta.refusal(torch.device("cuda"), torch.bfloat16, 128, 128)
        assert "switched off" in fla.refusal_linear(torch.device("cuda"), torch.bfloat16)


def test_texts_of_python_are_packed():
    batches = losses.batches_of(SMALL._replace(B=64, T=512), "cpu")
    first, second = next(batches), next(batches)
    assert first["segments"].max() > 0 and (first["segments"] >= 0).all()
    assert not torch.equal(first["input_ids"], second["input_ids"])
    ends = first["segments"][:, 1:] != first["segments"][:, :-1]
    assert (first["labels"][:, :-1][ends] == -100).all()


def test_texts_go_on(folder):
    rows = read(folder, "decode")["rows"]
    timed = [(row["name"], row["batch"]) for row in rows if row["prefill_ms"] and row["token_ms"] is not None]
    assert timed == [(name, n) for name in ("gated_delta", "softmax", "transformers.qwen3") for n in (1, 2)]
    assert rows[-1]["reason"] == "its kernels need a GPU"
    assert decoding.shapes_of([1, 16], [8, 64], most=128) == [(1, 8), (1, 64), (16, 8)]


def test_a_page_is_made_of_what_is_stored(folder):
    """With a run that has kernels by kind, as on a GPU."""
    stored = read(folder, "train")
    stored["rows"][0] |= {"kinds": {"norms": [2.0, 3], "convolution": [4.5, 1000]}, "six_n": 0.4321}
    (folder / "speed" / "train.json").write_text(json.dumps(stored))
    (folder / "speed.md").write_text(f"before\n\n{speed.BEGIN}\n\n{speed.END}\nafter\n")
    speed.write(folder)
    page = (folder / "speed.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and (folder / "speed.svg").stat().st_size > 5_000
    for line in (
        "| convolution | 4.5 in 1,000 |",
        "| all | 6.5 in 1,003 |",
        "Left out: fla.kda (its kernels need a GPU).",
    ):
        assert line in page
    assert "| gated_delta | 3 |" in page and "| 0.0000 |" in page and (folder / "losses.svg").stat().st_size > 5_000
    assert "| 43.2 % |" in page and "| tokens | softmax |" in page and "| softmax | 2 x 8 |" in page
    assert (
        "without a limit of memory" in page and "one process at a time" in page and "Without a first step" not in page
    )
    speed.write(folder)
    assert (folder / "speed.md").read_text() == page


def test_runs_of_one_command_stand_beside_each_other(folder):
    run = read(folder, "length")
    later = run | {"commit": "later", "rows": [row | {"tokens_per_second": 1234.0} for row in run["rows"]]}
    (folder / "speed" / "length.json").write_text(json.dumps(run | {"further": [later]}))
    page = speed.section(folder)
    assert page.count("## Longer and longer sequences") == page.count("(speed.svg)") == 1
    assert page.count("| tokens | softmax |") == 2 and "commit later" in page and "| 1,234 |" in page
    labels = [line.get_label() for line in speed.draw([run, later]).axes[0].lines]
    assert labels == ["softmax", "softmax, another run"]
    assert [line.get_label() for line in speed.draw([run, run | {"rows": run["rows"][:1]}]).axes[0].lines] == [
        "softmax"
    ]


def test_what_does_not_start_is_told(folder):
    run = read(folder, "starts")
    rows = [run["rows"][0] | {"peak_gb": 71.25, "recomputed": 3}, run["rows"][0] | {"name": "mesa", "reason": "no"}]
    lines = "\n".join(speed.starting(run | {"rows": rows, "at_once": 10, "memory_gb": 80.0}))
    assert "of 80 GB of a GPU" in lines and "up to 10 such processes at a time" in lines
    assert "| gated_delta | 71.2 | 3 of 4 |" in lines and "* `mesa`: no" in lines


def test_the_tables_are_what_the_script_makes():
    page = (speed.DOCS / "speed.md").read_text()
    assert page.count(speed.BEGIN) == page.count(speed.END) == 1
    assert speed.with_section(page, speed.section(speed.DOCS)) == page, "python scripts/figures/speed.py"


def test_the_page_of_the_docs_is_what_the_script_makes():
    page = (ROOT / "docs" / "speed.md").read_text()
    assert speed.with_section(page, speed.section(ROOT / "docs")) == page, "python scripts/figures/speed.py"


def test_presets_start(folder):
    """Two steps; the first one's loss is of the untrained model, the second's time is told."""
    (row,) = read(folder, "starts")["rows"]
    assert row["name"] == "gated_delta" and row["first_s"] > 0 and row["ms"] > 0 and 3.9 < row["loss"] < 6
    assert row["compiled_s"] > 0 and row["recomputed"] == 0 and row["layers"] == 4 and row["backend"] == "torch"


def test_a_page_of_speed_names_the_file_that_is_no_run(tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed.md").write_text(f"{speed.BEGIN}\n{speed.END}\n")
    for broken in ("", "{}", "[]"):
        (tmp_path / "speed" / "decode.json").write_text(broken)
        with pytest.raises(ValueError, match=r"decode\.json is not what `benchmark\.py decode` writes"):
            speed.write(tmp_path)
    (tmp_path / "speed" / "decode.json").unlink()
    (tmp_path / "speed.md").write_text(speed.BEGIN)
    with pytest.raises(ValueError, match="the page has not one line each of"):
        speed.write(tmp_path)


def test_lengths_that_a_step_can_not_be_cut_into(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "length", "--only", "softmax", "--lengths", "64", "100"])
    with pytest.raises(SystemExit, match=r"--lengths: 64 is no part of 100; a step has as many tokens at each"):
        benchmark.main()


def test_presets_that_have_started_are_not_started_again(tmp_path):
    path, about = tmp_path / "starts.json", {"machine": "H200", "sizes": "340m", "memory_gb": 80.0, "eager": False}
    rows = [asdict(starting.Started("kda", ms=1.0)), asdict(starting.Started("wall", reason="no"))]
    assert benchmark.started(path, about) == []
    path.write_text(json.dumps({**about, "rows": rows}))
    assert [row.name for row in benchmark.started(path, about)] == ["kda"]
    with pytest.raises(SystemExit, match="and this is memory_gb=40"):
        benchmark.started(path, about | {"memory_gb": 40.0})
    for other in ("", "{}", "[]"):
        path.write_text(other)
        with pytest.raises(SystemExit, match="is there, and no file of `starts`; name another, or delete it"):
            benchmark.started(path, about)
    path.write_text(json.dumps({**about, "rows": [{"name": "kda"}]}))
    with pytest.raises(SystemExit, match="has a row that `starts` has not written"):
        benchmark.started(path, about)


def test_whole_models_take_turns(tmp_path):
    """Few layers beside each other, and whole models alone: two processes that would both be in their turn wait."""
    turn, inside, most = str(tmp_path / "turn"), [], []

    def work() -> None:
        with starting.in_turn(turn):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_several_at_a_time_each_in_a_slot_of_its_own():
    """As many as there are slots, and a row of each as it is done."""
    begun, both, slots = [], threading.Barrier(2), ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"})

    def run(function: str, given: dict, limit: float, cold: bool, slot: dict):
        begun.append(slot)
        both.wait(5)
        if given["fails"]:
            raise apart.LeftOutError("it failed")
        yield {"name": slot["CUDA_VISIBLE_DEVICES"]}

    jobs = [whole.Job("steps.train", {"fails": i == 3}, steps.Trained("softmax")) for i in range(4)]
    rows = [row for _, row in whole.rows(jobs, "cpu", whole.Limits(10, slots=slots), run)]
    assert begun[0] != begun[1] and len(begun) == 4 and {row.name for row in rows} == {"0", "1", "softmax"}
    assert [row.reason for row in rows if row.reason] == ["it failed"]


def test_nothing_is_begun_after_the_end():
    job = whole.Job("steps.train", {}, steps.Trained("softmax"))
    ((_, row),) = whole.rows([job], "cpu", whole.Limits(10, total=0.0), in_process)
    assert row.reason == "the 0 s of all were over"


def test_the_time_of_all_ends_a_model_between_two_of_its_shapes():
    """Which is told, and not the odd seconds that this model had; the shapes that were timed stay."""

    def run(function: str, given: dict, limit: float, *_: object):
        yield {"name": "softmax", "batch": 1, "context": 64, "reason": "out of memory"}
        time.sleep(limit)
        raise apart.LeftOutError(f"not done within {limit:g} s")

    job = whole.Job("decoding.decode", {}, decoding.Decoded("softmax"))
    (_, first), (_, last) = whole.rows([job], "cpu", whole.Limits(10, total=0.05), run)
    assert first.context == 64 and last.reason == "the 0.05 s of all were over" and "0 x 0" not in str(last)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--only gated_deltas", "error: --only: gated_deltas is neither a preset"),
        ("--kernels", "error: --kernels needs a GPU"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", *words.split()])
    with pytest.raises(SystemExit, match=said):
        benchmark.main()


def test_a_loader_is_timed_beside_a_memory_map(capsys):
    data.loader(megabytes=1, lengths=[128], num_workers=0, repeats=1)
    said = capsys.readouterr().out
    for name in ("a plain memory map", "the loader, num_workers=0"):
        assert re.search(rf"seq_len=128 +{name} +[\d.]+ M tokens/s, +[\d.]+ a second of a core \(load", said)


@pytest.mark.parametrize(
    "words, said",
    [
        (["starts", "--memory-gb", "0"], "error: --memory-gb=0.0 must be above 0 and finite"),
        (["train", "--limit", "0"], "error: --limit=0.0 must be above 0 and finite"),
        (["train", "--limit", "nan"], "error: --limit=nan must be above 0 and finite"),
        (["train", "--batch", "-1"], "error: --batch=-1 must be above 0 and finite"),
        (["decode", "--tokens", "0"], "error: --tokens=0 must be above 0 and finite"),
        (["decode", "--contexts", "7", "0"], "error: --contexts=0 must be above 0 and finite"),
        (["starts", "--json", "/"], "error: --json=/ is a folder; name a file in it"),
        (["train", "--json", "/nowhere/x.json"], "error: --json=/nowhere/x.json: the folder /nowhere is not there"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_timed(monkeypatch, words, said):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit, match=f"^{said}$"):
        benchmark.main()
