"""What transformers' callers say is obeyed or refused: keywords, documents, adapters. Beside a test is where
people met its case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils.generic import find_labels

from models.language_model import LanguageModel, LanguageModelConfig
from tests.laws.presets import recipe

MIXERS = ("gated_delta", "softmax", "titans", "mesa", "ttt_linear")
every_mixer = pytest.mark.parametrize("preset", MIXERS)
V = 61
IDS = torch.randint(1, V, (2, 20), generator=torch.Generator().manual_seed(1))


def model(preset: str = "gated_delta", **settings) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_layers": 2} | settings
    return LanguageModel(LanguageModelConfig(mixers={"m": recipe(preset)}, pattern=["m"], **sizes)).double()


# Keywords


@every_mixer
def test_the_loss_is_divided_by_the_items_of_the_whole_step(preset):
    """Trainer counts them over all pieces of a step (huggingface/transformers issues 34242 and 47688)."""
    m = model(preset)
    whole = m(IDS, labels=IDS).loss
    for count in (38, torch.tensor(38)):
        parts = sum(m(IDS[i : i + 1], labels=IDS[i : i + 1], num_items_in_batch=count).loss for i in (0, 1))
        torch.testing.assert_close(parts, whole)
    shifted = F.pad(IDS[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(m(IDS, shift_labels=shifted).loss, whole)
    nothing = torch.full_like(IDS, -100)
    assert m(IDS, labels=nothing).loss == m(IDS, labels=nothing, num_items_in_batch=0).loss == 0


def test_a_label_outside_the_vocabulary_is_refused():
    m = model(num_layers=1)
    for name in ("labels", "shift_labels"):
        for token in (-1, V):
            with pytest.raises(ValueError, match=f"{name} has {token}; it must be a token, 0 to 60, or -100 to ignore"):
                m(IDS, **{name: torch.where(IDS > 30, token, IDS)})


def test_a_keyword_that_means_nothing_is_refused():
    m = model()
    with pytest.raises(TypeError, match=r"no keyword atention_mask; did you mean attention_mask\?"):
        m(IDS, atention_mask=torch.ones_like(IDS))
    with pytest.raises(TypeError, match=r"no keyword token_type_ids; "):
        m(IDS, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(TypeError, match="has no matrix of attention"):
        m(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="a batch of 0 x 20 tokens is empty"):
        m(IDS[:0])
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 19\); it must be \[2, 20\]"):
        m(IDS, attention_mask=torch.ones(2, 19))
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        m()
    for says, given in (
        (r"input_ids has the shape \(20,\); it must be \[B, T\]", {"input_ids": IDS[0]}),
        (r"inputs_embeds has the shape \(2, 20\); it must be \[B, T, D\]", {"inputs_embeds": IDS}),
        ("input_ids is of torch.float32, the dtype of embeddings", {"input_ids": IDS.float()}),
        ("inputs_embeds is of torch.int64, the dtype of tokens", {"inputs_embeds": IDS.unsqueeze(2)}),
        (r"inputs_embeds .*; it must be \[B, T, 32\]", {"inputs_embeds": torch.zeros(2, 20, 16)}),
        (r"labels has the shape \(2, 19\); it must be \[2, 20\]", {"input_ids": IDS, "labels": IDS[:, 1:]}),
        (r"shift_labels has the shape \(40,\)", {"input_ids": IDS, "shift_labels": IDS.flatten()}),
        ("labels and shift_labels both say", {"input_ids": IDS, "labels": IDS, "shift_labels": IDS}),
    ):
        with pytest.raises(ValueError, match=says):
            m(**given)
    m(IDS, token_type_ids=None, output_attentions=False, cache_position=torch.arange(20))
    with pytest.raises(
        TypeError, match=r"norm_esp=1.0 is no setting of a LanguageModelConfig; did you mean norm_eps\?"
    ):
        LanguageModelConfig(norm_esp=1.0)
    assert LanguageModelConfig(num_hidden_layers=2, tie_word_embeddings=False, later=1).later == 1, "transformers' own"


@every_mixer
def test_what_is_returned_is_what_was_asked_for(preset):
    """huggingface/transformers pull request 29605 (hidden states and use_cache of state space models)."""
    m = model(preset)
    out = m(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and m(IDS).hidden_states is None
    torch.testing.assert_close(out.hidden_states[0], m.embedding(IDS))
    torch.testing.assert_close(m.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(m(IDS, return_dict=False)[0], out.logits)
    assert torch.equal(m(IDS, logits_to_keep=torch.tensor([3, 7])).logits, out.logits[:, [3, 7]])
    assert torch.equal(m(IDS, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(m(inputs_embeds=m.embedding(IDS)).logits, out.logits)


# Documents


@every_mixer
def test_packed_rows_are_separate_however_they_are_told(preset):
    """By transformers' collator (huggingface/transformers pull requests 31629 and 36456), and by fla's cu_seqlens
    (fla-org/flash-linear-attention issue 313)."""
    m = model(preset)
    rows = [IDS[0, :13], IDS[1, :7]]
    apart = torch.cat([m(row.unsqueeze(0)).logits[0] for row in rows])
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    labels, flat = batch.pop("labels"), batch["input_ids"]
    told = (batch, *({"input_ids": flat, name: batch[name]} for name in ("position_ids", "seq_idx", "cu_seq_lens_q")))
    for given in (*told, {"input_ids": flat, "cu_seqlens": torch.tensor([0, 13, 20])}):
        torch.testing.assert_close(m(**given).logits[0], apart, msg=str(sorted(given)))
    expected = F.cross_entropy(apart[:-1], labels[0, 1:], ignore_index=-100)
    torch.testing.assert_close(m(**batch, labels=labels).loss, expected)
    for ends in ([0, 13, 19], [7, 20], [0, 12, 7, 20], [0, 25, 20]):
        with pytest.raises(ValueError, match=r"cu_seqlens=\[.*\] in a batch of 1 x 20 tokens"):
            m(flat, cu_seqlens=torch.tensor(ends))


def test_documents_are_told_once():
    m, ends = model(), torch.tensor([0, 7, 20])
    cached = {"past_key_values": m(IDS, use_cache=True).past_key_values}
    segments = torch.zeros_like(IDS)
    mask = torch.ones_like(IDS)
    mask[0, 8:11] = 0
    for says, given in (
        ("segments and attention_mask both", {"segments": segments, "attention_mask": torch.ones_like(IDS)}),
        ("segments and position_ids both", {"segments": segments, "position_ids": segments}),
        ("cu_seqlens and cu_seq_lens_q both", {"cu_seqlens": ends, "cu_seq_lens_q": ends}),
        ("cu_seq_lens_q is missing", {"cu_seq_lens_k": ends}),
        ("padding inside a row's text", {"attention_mask": mask}),
        ("attention_mask has 2; it must be 1 for text", {"attention_mask": mask + 1}),
        ("attention_mask has -inf; it must be 1 for text", {"attention_mask": mask.log()}),
        ("cu_seq_lens_k=.* differ", {"cu_seq_lens_q": ends, "cu_seq_lens_k": torch.tensor([0, 20])}),
        ("seq_idx with a cache", {"seq_idx": segments} | cached),
        ("cu_seqlens with a cache", {"cu_seqlens": ends} | cached),
        ("cu_seq_lens_q with a cache", {"cu_seq_lens_q": ends} | cached),
        ("past_key_values is a DynamicCache", {"past_key_values": DynamicCache()}),
    ):
        with pytest.raises(ValueError, match=says):
            m(IDS, **given)


def test_documents_are_told_in_a_shape():
    m, zeros = model(num_layers=1), torch.zeros_like(IDS)
    for name in ("segments", "position_ids", "seq_idx"):
        for wrong in (zeros[0], zeros[:, :1], zeros[:, 1:], zeros.unsqueeze(0)):
            shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
            with pytest.raises(ValueError, match=rf"{name} has the shape {shape}; it must be \[2, 20\]"):
                m(IDS, **{name: wrong})
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"{name} is a list; it must be a tensor"):
            m(IDS[:1], **{name: [0, 3, 20]})
        with pytest.raises(ValueError, match=rf"{name} has the shape \(1, 3\); it must be \[N \+ 1\]"):
            m(IDS[:1], **{name: torch.tensor([[0, 3, 20]])})
    halves = torch.arange(20).unsqueeze(0) // 10
    torch.testing.assert_close(m(IDS, segments=halves).logits[:, 10:], m(IDS[:, 10:]).logits)


def test_trainer_finds_the_labels_and_shifts_what_it_smooths():
    """Parameters with "label" in their names are labels to Trainer, which evaluates only if all are in a batch."""
    assert find_labels(LanguageModel) == ["labels"]
    m = model()
    smoothed = LabelSmoother(epsilon=0.0)(m(IDS), IDS.clone(), shift_labels=True)
    torch.testing.assert_close(smoothed, m(IDS, labels=IDS).loss)
    assert LanguageModel.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@every_mixer
def test_padding_of_a_single_row_too(preset):
    """Left padding of one row flowed into the text elsewhere (huggingface/transformers pull request 46773)."""
    m = model(preset)
    padded, mask = F.pad(IDS[:1], (5, 0)), F.pad(torch.ones(1, 20), (5, 0))
    torch.testing.assert_close(m(padded, attention_mask=mask).logits[:, 5:], m(IDS[:1]).logits)


# The surface of a PreTrainedModel


def test_the_vocabulary_grows():
    """zai-org/ChatGLM3 issue 340; with the head, whether it is tied or not (huggingface/transformers issue 45276)."""
    for tied in (True, False):
        m = model(tie_embeddings=tied)
        before = m(IDS).logits
        m.resize_token_embeddings(64, mean_resizing=False)
        assert m.config.vocab_size == 64 and m.head.weight.shape == m.embedding.weight.shape == (64, 32)
        assert (m.head.weight is m.embedding.weight) == tied
        torch.testing.assert_close(m(IDS).logits[..., :V], before)
        m.resize_token_embeddings(200, mean_resizing=False)
        for weight in (m.embedding.weight, m.head.weight):
            assert weight[64:].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert m.config.num_hidden_layers == 2


@every_mixer
def test_gradient_checkpointing_changes_no_gradient(preset):
    gradients = []
    for checkpointing in (False, True):
        m = model(preset).train()
        if checkpointing:
            m.gradient_checkpointing_enable()
        m(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_an_adapter_before_the_head_is_in_the_loss():
    """Losses that read the head's weight leave it out (huggingface/trl issue 4612 and pull request 5676)."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.delta = base, nn.Linear(32, V, bias=False).double()

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.delta(x)

    m = model(tie_embeddings=False)
    m.set_output_embeddings(Adapted(m.head))
    out = m(IDS, labels=IDS)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(m.sum_nats(IDS, F.pad(IDS[:, 1:], (0, 1), value=-100)), 38 * expected)
    out.loss.backward()
    assert m.head.delta.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_it_compiles_whole_with_a_mask():
    m = model("gated_delta").eval()
    mask = torch.ones_like(IDS)
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, attention_mask=mask).logits, m(IDS, attention_mask=mask).logits)
