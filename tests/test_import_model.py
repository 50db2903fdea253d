"""Published models taken over: Qwen3 and Qwen3-Next of random weights compute the same here."""

from __future__ import annotations

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3NextConfig

from conf import schema
from data.tokenizer import Bytes
from models.language_model import LanguageModel, LanguageModelConfig
from models.training import weights
from scripts.export import export
from scripts.exporting.source import Source
from scripts.import_model import main, take_over
from tests.laws.presets import CONF

IDS = torch.arange(40).remainder(37).view(2, 20)
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 40, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
QWENS = {
    "qwen3": Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen3_next": Qwen3NextConfig(**SIZES, **HEADS, **DELTA, num_experts=0),
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Where fla is installed transformers takes its kernels, which a CPU can't run. Imported here, since that imports
    fla, which takes three seconds of every worker."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn",
                 "causal_conv1d_update"):  # fmt: skip
        monkeypatch.setattr(qwen3_next, name, getattr(qwen3_next, name).__wrapped__)


def theirs(name: str):
    """With weights that training might have left behind."""
    torch.manual_seed(0)
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_next": "Qwen3NextForCausalLM"}[name]
    made = getattr(transformers, architecture)(QWENS[name]).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return made


@torch.no_grad()
def same(a, b, ids: int = 300) -> None:
    """Logits of the first ids, and what is likeliest next."""
    expected, found = (m(IDS).logits[..., :ids] for m in (a, b))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    new = [m.generate(IDS[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None) for m in (a, b)]
    assert torch.equal(*new)


@pytest.mark.slow
@pytest.mark.parametrize("name", QWENS)
def test_a_qwen_computes_the_same_here_and_goes_back(name, tmp_path):
    """Grouped heads, theirs eps, tied or not; of Qwen3-Next also the gate of its attention and the quarter of channels
    that turns. Then to transformers once more."""
    published, folder = theirs(name), tmp_path / "published"
    published.save_pretrained(folder)
    take_over(str(folder), tmp_path / "ours")
    ours = LanguageModel.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.pattern == (["attention"] if name == "qwen3" else [*["recurrent"] * 3, "attention"])
    same(published, ours)
    back = export(Source(ours, tmp_path, None, None, None), name)
    same(published, AutoModelForCausalLM.from_pretrained(back))


def test_a_run_goes_on_from_it(tmp_path):
    """experiment=imported is its model, weights and tokenizer, without the ids that its tokenizer does not have."""
    published = theirs("qwen3_next")
    published.save_pretrained(tmp_path / "published")
    Bytes().save(tmp_path / "published")
    said = "\n".join(take_over(str(tmp_path / "published"), tmp_path / "ours"))
    assert "without 43 rows" in said and "experiment=imported" in said
    schema.register()
    words = [f"hydra.searchpath=[file://{tmp_path}/ours/conf]", "experiment=imported", "name=on", "run_dir=none"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", words), resolve=True)
    assert cfg["tokenizer"]["name"] == cfg["init_from"] == str(tmp_path / "ours")
    ours = LanguageModel(LanguageModelConfig(vocab_size=257, **cfg["model"])).eval()
    assert "warning" not in weights.load(ours, cfg["init_from"], Bytes())
    with torch.no_grad():
        expected, found = published(IDS).logits[..., :257], ours(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3NextConfig(**SIZES), "num_experts=512: layers with experts can't be imported, only 0"),
        (Qwen3Config(**SIZES, attention_bias=True), "attention_bias=True: only False can be imported"),
        (Qwen3Config(**SIZES, hidden_act="gelu"), "hidden_act=gelu: only silu can be imported"),
        (
            Qwen3Config(**SIZES, use_sliding_window=True, max_window_layers=0),
            "layer_types has sliding_attention: full_attention and linear_attention can be imported",
        ),
        (
            Qwen3Config(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_parameters.rope_type=linear: only default can be imported",
        ),
        (LanguageModelConfig(), "model_type=test_time_regression: qwen3 or qwen3_next can be imported"),
    ],
)
def test_what_is_another_function_is_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path / "published")
    with pytest.raises(SystemExit, match=rf"^error: .*published has {message}"):
        main([str(tmp_path / "published"), "--folder", str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()
