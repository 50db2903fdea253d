"""What callers of transformers' interface say, in our terms: which tokens are documents of their own, and which
keywords mean something here.

transformers' models take any keyword and leave out those that they do not know. So a misspelt attention_mask pads with
text, and documents that a collator has packed see each other, silently. Here every keyword is obeyed or is an error.

Shapes: B batch, T tokens, N documents.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache import Cache
from models.loss import IGNORED

# They say nothing that is not said elsewhere: lengths of documents that cu_seq_lens_q has as well, the place in a cache
# that knows it.
SAID_ELSEWHERE = ("cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position")


def refuse_unknown(given: dict[str, Any], known: list[str]) -> None:
    """Raises TypeError for the first keyword of a call that is not None and means nothing here."""
    for name, value in given.items():
        if value is None or name in SAID_ELSEWHERE or (name == "output_attentions" and not value):
            continue
        if name == "output_attentions":
            raise TypeError("output_attentions=True: a test-time regressor has no matrix of attention; leave it out")
        near = get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]}?" if near else f"; it knows {', '.join(known)}"
        raise TypeError(f"LanguageModel knows no keyword {name}{meant}")


def refuse_shapes(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, targets: dict[str, Tensor | None], cache: Any, width: int
) -> None:
    """Raises ValueError unless there is one input, [B, T] of whole numbers or [B, T, D] of others, with at least one
    token, at most one of targets (by keyword), of the input's [B, T], and a cache of the model's, None or of B rows.
    width: D.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("one of input_ids and inputs_embeds must be given, and not both")
    name, x, wanted = "input_ids", input_ids, "[B, T]"
    if x is None:
        name, x, wanted = "inputs_embeds", inputs_embeds, "[B, T, D]"
    assert x is not None
    if x.ndim != wanted.count(",") + 1:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}; it must be {wanted}, B rows of T tokens")
    if x.is_floating_point() != (inputs_embeds is not None):
        kind = "embeddings, which inputs_embeds takes" if inputs_embeds is None else "tokens, which input_ids takes"
        raise ValueError(f"{name} is of {x.dtype}, the dtype of {kind}")
    if inputs_embeds is not None and x.shape[2] != width:
        raise ValueError(f"inputs_embeds has the shape {tuple(x.shape)}; it must be [B, T, {width}], the model's width")
    B, T = x.shape[:2]
    if not B * T:
        raise ValueError(f"a batch of {B} x {T} tokens is empty; it must have at least one")
    given = {name: y for name, y in targets.items() if y is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say what comes after each token; give one of them")
    for name, y in given.items():
        if y.shape != (B, T):
            raise ValueError(f"{name} has the shape {tuple(y.shape)}; it must be [{B}, {T}], a number for each token")
    if cache is not None and not isinstance(cache, Cache):
        kind = type(cache).__name__
        raise ValueError(f"past_key_values is a {kind}; it must be what a call with use_cache=True has returned")
    if cache is not None and cache.batch_size not in (None, B):
        raise ValueError(
            f"past_key_values is of {cache.batch_size} rows, and the batch has {B}; batch_repeat_interleave(n) makes n "
            "of each row"
        )


def refuse_targets(name: str, targets: Tensor | None, vocabulary: int) -> None:
    """Raises ValueError for a target that is no token of the vocabulary, where the loss would count another's."""
    if targets is None or torch.compiler.is_compiling():
        return
    outside = (targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        y = targets[outside][0].item()
        raise ValueError(f"{name} has {y}; it must be a token, 0 to {vocabulary - 1}, or {IGNORED} to ignore")


def refuse_documents(told: dict[str, Tensor | None], others: dict[str, Any], like: Tensor, seen: int) -> None:
    """Raises ValueError where documents of tokens like [B, T] are told twice, in another shape, or in a way that says
    too little. told: by keyword.
    """
    if told["segments"] is not None:
        for name in (name for name, value in told.items() if value is not None and name != "segments"):
            raise ValueError(f"segments and {name} both say where documents begin; give one of them")
    if told["cu_seqlens"] is not None and told["cu_seq_lens_q"] is not None:
        raise ValueError("cu_seqlens and cu_seq_lens_q both say where documents begin; give one of them")
    q, k = told["cu_seq_lens_q"], others.get("cu_seq_lens_k")
    if k is not None and q is None:
        raise ValueError("cu_seq_lens_k says where documents begin, and cu_seq_lens_q is missing, which is read here")
    B, T = like.shape[:2]
    for name, value in (told | {"cu_seq_lens_k": k}).items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")
        shape, wanted = tuple(value.shape), f"[{B}, {T}], a number for each token"
        right = shape in ((B, T), (1, T))
        if name == "attention_mask":
            right = shape in ((B, T), (B, seen + T))
            wanted = f"[{B}, {seen + T}], a number for each token, those in the cache first"
        elif name.startswith("cu_"):
            right, wanted = len(shape) == 1 and shape[0] > 1, "[N + 1], the tokens before each document and after all"
        if not right:
            raise ValueError(f"{name} has the shape {shape}; it must be {wanted}")
    for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q"):
        if seen and told[name] is not None:
            raise ValueError(f"{name} with a cache: it can't say whether the cache's document goes on; give segments")
    if k is not None and q is not None and k.tolist() != q.tolist():
        raise ValueError(f"cu_seq_lens_k={k} and cu_seq_lens_q={q} differ; they must be the same documents")


def documents(
    like: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    seen: int = 0,
    number: Tensor | None = None,
) -> Tensor | None:
    """segments [B, T] of tokens like [B, T], whatever way they are told; None where no document begins.

    seen: how many tokens are in a cache; number: of the document [B] that goes on, None for 0.
    attention_mask: [B, seen + T], or [B, T] where the tokens in the cache go on: padding, on either side, is another
    document. position_ids: [1 or B, T]: a
    document begins where they do not go on by one. seq_idx: [1 or B, T], numbers of documents. cu_seqlens: [N + 1], for
    B = 1 the tokens before each document and after the last.
    """
    if attention_mask is None and position_ids is None and seq_idx is None and cu_seqlens is None:
        return None
    B, T = like.shape[:2]
    starts = torch.zeros(B, T, dtype=torch.bool, device=like.device)
    if attention_mask is not None:
        others = (attention_mask != 0) & (attention_mask != 1)
        if not torch.compiler.is_compiling() and others.any():
            raise ValueError(
                f"attention_mask has {attention_mask[others][0].item()}; it must be 1 for text and 0 for padding, and "
                "documents are told by segments or position_ids"
            )
        alone = seen > 0 and attention_mask.shape[1] == T
        if alone and not torch.compiler.is_compiling() and (attention_mask[:, 0] == 0).any():
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)} and begins with padding after a cache of "
                f"{seen} tokens; it must be [{B}, {seen + T}], a number for each token, those in the cache first"
            )
        changes = F.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0))
        if not torch.compiler.is_compiling() and (changes.sum(1) + (attention_mask[:, 0] != 0) > 2).any():
            raise ValueError("attention_mask has padding inside a row's text, which would cut it in two; leave it out")
        starts |= changes[:, -T:]
    if position_ids is not None:
        starts[:, 0] |= (position_ids[:, 0] == 0) & (seen > 0)
        starts[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    if seq_idx is not None:
        starts[:, 1:] |= seq_idx[:, 1:] != seq_idx[:, :-1]
    if cu_seqlens is not None:
        if B != 1 or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != T or (cu_seqlens.diff() <= 0).any():
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()} in a batch of {B} x {T} tokens; it must be of one row that has all "
                "documents one after another, begin with 0, rise, and end with the number of tokens"
            )
        starts[0, cu_seqlens[1:-1].long()] = True
    if not torch.compiler.is_compiling() and not starts.any():
        return None
    return starts.cumsum(1) + (0 if number is None else number.unsqueeze(1))
