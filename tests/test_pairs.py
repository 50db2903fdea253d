"""scripts/pairs.py on folders as a sweep leaves them."""

from __future__ import annotations

import json

from scripts.pairs import main


def test_pairs_of_a_sweep(tmp_path, monkeypatch, capsys):
    """Runs of one seed and two values are a pair; an unfinished run and a seed with one value are in none."""
    bits = {(1, "null"): 2.5, (1, "1e-05"): 2.25, (2, "null"): 2.0, (2, "1e-05"): 2.125, (3, "null"): 1.0}
    for (seed, eps), value in bits.items():
        folder = tmp_path / f"model.eps={eps},model=gla,seed={seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"seed: {seed}\nmodel: {{eps: {eps}}}\n")
        (folder / "result.json").write_text(json.dumps({"validation/nats": 9, "validation/bits_per_byte": value}))
    (tmp_path / "model.eps=1e-05,model=gla,seed=3").mkdir()
    (tmp_path / "model.eps=1e-05,model=gla,seed=3" / "config.yaml").write_text("seed: 3\nmodel: {eps: 1e-05}\n")
    monkeypatch.setattr("sys.argv", ["pairs.py", str(tmp_path), "model.eps", "null", "1e-5"])
    main()
    said = capsys.readouterr().out
    assert "model=gla" in said and "     1      2.500      2.250     -0.250" in said and "2.188     -0.062" in said
    assert "1e-5 is not worse than null in 1 of 2 pairs" in said and "2 runs are in no pair" in said
