"""Whole models side by side: ours, as train.py makes them, and others' of the same width, depth, heads and parameters.

A name is a preset of conf/model (`gated_delta`), or one of PEERS; `+compile` at its end compiles a peer whole by
torch.compile. Each block has 12 D^2 parameters: ours derive the width of their feed-forward layer (models/block.py),
and a peer is given the width that is derived for it by the same rule.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from models.block import derived_inner_size
from models.build import build
from models.kernels import tuning
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.module import Training
from models.training.rehearsal import rehearse
from scripts.recipes import CONF, composed

COMPILED = "+compile"
PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "base")


class Peer(NamedTuple):
    """module: where model and config are, the classes' common name `kind`. settings(D, H, K, layers): those beside the
    common ones. like: our preset of the same regression, which counts its operations. gpu: it asks for
    fla's kernels, whatever the machine.
    """

    module: str
    kind: str
    settings: Callable[[int, int, int, int], dict[str, Any]]
    like: str
    gpu: bool = True


def heads(D: int, H: int, K: int, layers: int) -> dict[str, Any]:
    return {"num_heads": H, "head_dim": K}


def attention(D: int, H: int, K: int, layers: int) -> dict[str, Any]:
    return {"num_attention_heads": H, "num_key_value_heads": H, "head_dim": K, "attn_implementation": "sdpa"}


def next_layers(D: int, H: int, K: int, layers: int) -> dict[str, Any]:
    """Three layers of the gated delta rule for each of attention, and no experts."""
    return attention(D, H, K, layers) | {
        "linear_num_key_heads": H,
        "linear_num_value_heads": H,
        "linear_key_head_dim": K,
        "linear_value_head_dim": K,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "num_experts": 0,
    }


def gated_deltanet(*sizes: int) -> dict[str, Any]:
    return heads(*sizes) | {"expand_v": 1.0}


def without_fla_parts(*sizes: int) -> dict[str, Any]:
    """Norms and the feed-forward layer's activation by PyTorch, for the compiler to fuse; the cross-entropy stays."""
    return gated_deltanet(*sizes) | {"fuse_norm": False, "fuse_swiglu": False}


PEERS = {
    "fla.gated_deltanet": Peer("fla.models", "GatedDeltaNet", gated_deltanet, "gated_delta"),
    "fla.gated_deltanet_parts": Peer("fla.models", "GatedDeltaNet", without_fla_parts, "gated_delta"),
    "fla.kda": Peer("fla.models", "KDA", heads, "kda"),
    "fla.mesa_net": Peer("fla.models", "MesaNet", heads, "mesa"),
    "fla.delta_net": Peer("fla.models", "DeltaNet", lambda D, H, K, layers: {"num_heads": H}, "deltanet"),
    "transformers.qwen3": Peer("transformers", "Qwen3", attention, "softmax", gpu=False),
    "transformers.qwen3_next": Peer("transformers", "Qwen3Next", next_layers, "qwen3_next"),
}
# What is timed where nothing is asked for: ours, and each peer as it comes and compiled.
OURS = ["gated_delta", "softmax", "titans", "ttt_linear", "kda", "mesa", "local_linear", "qwen3_next", "titans_mlp"]
DEFAULT = [*OURS, "titans_mac", *(name + end for name in PEERS for end in ("", COMPILED))]


class Sizes(NamedTuple):
    """D model width, H heads of K, and what a step holds: B sequences of T tokens."""

    size: str
    vocabulary: int
    D: int
    H: int
    layers: int
    B: int
    T: int

    @property
    def model(self) -> str:
        heads = f"{self.H} heads of {self.D // self.H}"
        return f"{self.layers} layers, width {self.D}, {heads}, vocabulary {self.vocabulary:,}"

    def __str__(self) -> str:
        return f"{self.model}; {self.B} x {self.T:,}"


class Contender(NamedTuple):
    """loss(batch): the mean over the tokens, with gradients to the model's parameters. flops: of a token to train.
    begin(batch): what comes before the first step, and what is to be noted of it. packs: it tells the documents of a
    row apart.
    """

    model: nn.Module
    loss: Callable[[dict[str, Tensor | Any]], Tensor]
    optimizer: torch.optim.Optimizer
    flops: int
    begin: Callable[[dict[str, Tensor | Any]], str]
    packs: bool

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def sizes_of(size: str, batch: int | None = None, seq_len: int | None = None) -> Sizes:
    """Those of conf/size, a micro-batch a step; the vocabulary is the bytes at `tiny`, else 32,768."""
    cfg = composed("gated_delta", f"size={size}")
    vocabulary = 257 if size == "tiny" else 32_768
    model = cfg.model
    B, T = batch or cfg.micro_batch, seq_len or cfg.seq_len
    return Sizes(size, vocabulary, model.hidden_size, model.num_heads, model.num_layers, B, T)


def known(name: str) -> str | None:
    """Why there is no such contender, in a sentence; None where there is one."""
    base = name.removesuffix(COMPILED)
    if base not in PEERS and (name != base or base not in PRESETS):
        return (
            f"{name} is neither a preset of conf/model nor one of {', '.join(PEERS)}, which take {COMPILED} at the end"
        )
    return None


def missing(name: str, device: str) -> str | None:
    """Why this machine cannot time it, in a sentence; None where it can."""
    peer = PEERS.get(name.removesuffix(COMPILED))
    if peer is None:
        return None
    package = peer.module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if peer.gpu and device == "cpu":
        return "its kernels need a GPU"
    return None


def ours(name: str, sizes: Sizes, device: str, seed: int = 0, compiled: bool = True) -> Contender:
    """As train.py trains it: models/training/module.py's loss, its compiled and recomputed blocks, the config's
    optimizer. seed: of the weights. compiled: false for eager blocks whatever the config says."""
    module = training(name, sizes, device, seed, compiled)
    flops = 3 * module.model.flops_per_token(sizes.T)

    def loss(batch: dict[str, Tensor | Any]) -> Tensor:
        module._window.clear()  # which is for a step that logs
        return module.training_step(batch, 0)

    optimizer = module.optimizer(module.model)

    def begin(batch: dict[str, Tensor | Any]) -> str:
        first = partial(nats, module.model, batch)
        rehearse(module.model, first, torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
        module.recompute.begin(first, optimizer, torch.device(device))
        again = len(module.recompute.chosen)
        how = "blocks compiled" if module.compile_blocks else "eager"
        return f"{how}, {again} of {sizes.layers} recomputed" if again else how

    return Contender(module.model, loss, optimizer, flops, begin, packs=True)


def nats(model: LanguageModel, batch: dict[str, Tensor | Any]) -> Tensor:
    with half(batch["input_ids"].device.type):
        return model.sum_nats(batch["input_ids"], batch["labels"], batch["segments"])


def half(device: str) -> torch.autocast:
    """bf16 products on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def training(name: str, sizes: Sizes, device: str, seed: int = 0, compiled: bool = True) -> Training:
    """The LightningModule, its blocks compiled where train.py does."""
    cfg = composed(name, f"size={sizes.size}", f"model.num_layers={sizes.layers}")
    with torch.device(device):  # made there: a CPU takes seconds for what a GPU draws at once
        model = model_of(cfg, sizes.vocabulary, seed)
    parts: dict[str, Any] = {"compile_blocks": cfg.compile and compiled, "recompute": cfg.recompute}
    module = Training(model, build(cfg.optimizer), build(cfg.schedule), num_steps=1000, clip_norm=1.0, **parts)
    module.to(device)
    module.configure_model()
    return module


def model_of(cfg: DictConfig, vocabulary: int, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    settings: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return LanguageModel(LanguageModelConfig(vocab_size=vocabulary, **settings))


def theirs(name: str, sizes: Sizes, device: str) -> Contender:
    """As its own library makes it, with the same AdamW; compiled whole where the name says so."""
    base = name.removesuffix(COMPILED)
    with torch.device(device):
        model = peer_model(base, sizes).to(device)
    if name != base:
        # fla's operators end a graph in each layer, and a layer has its own index: more than the 8 forms of a function
        # after which Dynamo leaves it eager
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * sizes.layers)
        model.compile(dynamic=False)

    def loss(batch: dict[str, Tensor | Any]) -> Tensor:
        ids = batch["input_ids"]
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # it shifts them itself

    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    note = "compiled" if name != base else "eager"
    flops = 3 * forward_flops(model, PEERS[base].like, sizes)
    return Contender(model, loss, optimizer, flops, lambda batch: note, packs=False)


def peer_model(name: str, sizes: Sizes) -> Any:
    """With the inner width that gives its blocks 12 D^2 parameters, found by a model of four layers."""
    if PEERS[name].gpu and torch.cuda.is_available():
        tuning.without_loans()  # one after another, candidates take minutes a model
    torch.manual_seed(0)
    few = sizes._replace(layers=min(4, sizes.layers), vocabulary=16)
    step = max(1, sizes.D // 16)
    blocks = made(name, few, step)
    table = 16 * sizes.D  # tied, and one norm at the end
    each = (sum(p.numel() for p in blocks.parameters()) - table - sizes.D) // few.layers
    mixer = each - 3 * sizes.D * step - 2 * sizes.D  # without its two norms, as our blocks count
    return made(name, sizes, derived_inner_size("swiglu", sizes.D, sizes.H, mixer))


def made(name: str, sizes: Sizes, inner_size: int) -> Any:
    peer = PEERS[name]
    package: Any = importlib.import_module(peer.module)
    K = sizes.D // sizes.H
    common = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.D,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": inner_size,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": max(2**17, sizes.T),
    }
    config = getattr(package, f"{peer.kind}Config")(**common, **peer.settings(sizes.D, sizes.H, K, sizes.layers))
    return getattr(package, f"{peer.kind}ForCausalLM")(config)


def forward_flops(model: nn.Module, like: str, sizes: Sizes) -> int:
    """Of a token: the products with weights, and the regression as our preset `like` counts it, in each layer."""
    products = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    cfg = composed(like, f"size={sizes.size}")
    period = len(cfg.model.pattern)
    cfg.model.num_layers = period
    blocks = model_of(cfg, 16).blocks
    regressions = [block.mixer.regressor.flops_per_token(sizes.T) for block in blocks]
    return products + sum(regressions[i % period] for i in range(sizes.layers))


def contender(name: str, sizes: Sizes, device: str, compiled: bool = True) -> Contender:
    return ours(name, sizes, device, compiled=compiled) if name in PRESETS else theirs(name, sizes, device)


def batch_of(sizes: Sizes, device: str, documents: bool = True) -> dict[str, Tensor | Any]:
    """Random tokens of one step, as data/text.py gives them. Documents are synthetic: lengths log-normal with a median
    of 400 tokens (half of them between 175 and 900), of one seed, laid end to end and cut into rows of T.
    """
    draw = torch.Generator().manual_seed(0)
    B, T = sizes.B, sizes.T
    tokens = torch.randint(sizes.vocabulary, (B, T + 1), generator=draw)
    labels, segments = tokens[:, 1:].clone(), None
    if documents:
        lengths = torch.empty(B * (T + 1)).log_normal_(6.0, 1.2, generator=draw).ceil().long()
        number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[: B * (T + 1)].view(B, T + 1)
        labels[number[:, 1:] != number[:, :-1]] = -100
        segments = (number - number[:, :1])[:, :-1].contiguous().to(device)
    ids = tokens[:, :-1].contiguous().to(device)
    return {"input_ids": ids, "labels": labels.to(device), "segments": segments}
