"""The model in the hands of peft, accelerate, transformers' Trainer, torch.export, safetensors and lm-eval. Beside a
test is where people met its case."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from data.tokenizer import Bytes
from tests.test_calls import IDS, MIXERS, V, every_mixer, model
from tests.test_generate import generated

ROWS = torch.randint(1, V, (8, 8), generator=torch.Generator().manual_seed(3))


def largest(ours, theirs) -> float:
    return max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True))


# peft


@every_mixer
def test_lora_on_every_layer_merges(preset, tmp_path):
    """huggingface/transformers issue 30316 (Mamba's adapters were lost when merged), trl issue 4612 (the head's were
    not in the loss)."""
    m = model(preset, tie_embeddings=False, num_layers=1).eval()
    plain = m(IDS).logits
    layers = [name for name, layer in m.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    settings = {"target_modules": layers, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(m, LoraConfig(r=2, **settings)).double().eval()
    out = adapted(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    out.loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert len(gradients) == 2 * len(layers) and all(g.abs().max() > 0 for g in gradients)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(preset, tie_embeddings=False, num_layers=1), tmp_path).double()
    assert torch.equal(again.eval()(input_ids=IDS).logits, out.logits)
    tokens = generated(adapted, IDS[:1])
    merged = adapted.merge_and_unload()
    assert (out.logits - plain).abs().max() > 0.1
    torch.testing.assert_close(merged(IDS).logits, out.logits)
    assert torch.equal(generated(merged, IDS[:1]), tokens)


def test_an_adapter_on_one_of_two_tied_layers_is_warned_of():
    """Merging changes the other too: huggingface/peft issues 2018 and 2777, of which peft says nothing where layers
    have other names than it knows."""
    for layer in ("head", "embedding"):
        config = LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
        with pytest.warns(UserWarning, match="which are one weight: merged, it will change both"):
            get_peft_model(model(num_layers=1), config)(IDS, labels=IDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an adapter stands")
        get_peft_model(model(num_layers=1, tie_embeddings=False), config)(IDS, labels=IDS)
        get_peft_model(model(num_layers=1), LoraConfig(r=2, target_modules="all-linear"))(IDS, labels=IDS)


# accelerate


@every_mixer
def test_accelerate_accumulates_and_saves(preset, tmp_path):
    def alone() -> tuple[nn.Module, torch.optim.Optimizer]:
        m = model(preset, num_layers=1)
        return m, torch.optim.SGD(m.parameters(), lr=0.1)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    m, optimizer, loader = accelerator.prepare(*alone(), torch.utils.data.DataLoader(IDS, batch_size=1))
    for ids in loader:
        with accelerator.accumulate(m):
            accelerator.backward(m(ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    expected, optimizer = alone()
    expected(IDS, labels=IDS).loss.backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    optimizer.step()
    assert largest(m.parameters(), expected.parameters()) < 1e-12
    accelerator.unwrap_model(m).save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(m))
    assert largest(AutoModelForCausalLM.from_pretrained(tmp_path).parameters(), m.parameters()) == 0


@pytest.mark.parametrize("preset", [*MIXERS, "titans_mlp", "lact"])
def test_weights_that_hooks_bring_are_in_the_loss(preset):
    """accelerate's hooks bring a layer's weight when the layer is called; a loss that read the head's weight without a
    call was of whatever lay there (huggingface/transformers pull request 46978, accelerate pull request 442)."""
    m = model(preset, num_layers=1).eval()
    targets = F.pad(IDS[:, 1:], (0, 1), value=-100)
    expected, nats = m(IDS, labels=IDS), m.score(IDS, targets)
    offloaded = cpu_offload(copy.deepcopy(m), execution_device="cpu")
    out = offloaded(IDS, labels=IDS)
    torch.testing.assert_close((out.loss, out.logits), (expected.loss, expected.logits))
    torch.testing.assert_close(offloaded.score(IDS, targets), nats)


# Trainer


def trained(folder, preset, steps=2, pieces=1, resume=None, collator=None, save="no") -> tuple[list[float], nn.Module]:
    """Losses and gradient norms of some steps on four rows each, and the model."""
    rows = [{"input_ids": row.tolist(), "labels": [-100, *row.tolist()[1:]]} for row in ROWS]
    arguments = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces, "max_steps": steps}
    said = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": save, "save_steps": 1}
    args = TrainingArguments(folder, learning_rate=1e-3, use_cpu=True, **arguments, **said)
    trainer = Trainer(model=model(preset, num_layers=1), args=args, train_dataset=rows, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    return [row[name] for row in trainer.state.log_history if "loss" in row for name in row], trainer.model


@pytest.mark.slow
@every_mixer
def test_trainer_splits_packs_and_resumes(preset, tmp_path):
    """Pieces of a step, each with its rows packed into one, give the loss and gradient of the whole
    (huggingface/transformers issues 34242 and 47688, pull request 31629); a resumed run is the run, tied weights
    included (pull request 11682)."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    whole, m = trained(tmp_path / "whole", preset, save="steps")
    packing = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    assert trained(tmp_path / "pieces", preset, pieces=2, collator=packing)[0] == pytest.approx(whole, rel=1e-6)
    again = trained(tmp_path / "whole", preset, resume=tmp_path / "whole" / "checkpoint-1")[1]
    assert largest(again.parameters(), m.parameters()) == 0 and again.head.weight is again.embedding.weight


# Files and graphs


@every_mixer
def test_safetensors_hold_a_tied_weight_once(preset, tmp_path):
    """safetensors refuses tensors that share memory (safetensors/safetensors issue 98); a head that is left out must
    come back tied."""
    for tied in (True, False):
        m = model(preset, num_layers=1, tie_embeddings=tied)
        m.save_pretrained(tmp_path / str(tied))
        saved = load_file(tmp_path / str(tied) / "model.safetensors")
        assert ("head.weight" in saved) != tied and "embedding.weight" in saved
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(again(IDS).logits, m(IDS).logits)
        assert (again.head.weight is again.embedding.weight) == tied
        save_model(m, str(tmp_path / "plain.safetensors"))
        nn.init.zeros_(again.norm.weight)
        assert load_model(again, str(tmp_path / "plain.safetensors")) == (set(), [])
        assert torch.equal(again(IDS).logits, m(IDS).logits)


@pytest.mark.slow
@every_mixer
def test_torch_exports_the_forward_pass(preset):
    """Of one shape, weights that want gradients included (pytorch/pytorch issue 164313 is of such models)."""
    m, ids = model(preset, num_layers=1, hidden_size=16).eval(), IDS[:, :4]
    graph = torch.export.export(m, (), {"input_ids": ids}, strict=False).module()
    torch.testing.assert_close(graph(input_ids=IDS[:, 6:10]).logits, m(IDS[:, 6:10]).logits)


# lm-eval


@every_mixer
def test_what_lm_eval_asks_for(preset):
    """HFLM pads contexts on the right, gives no mask, and reads the logits of the continuations; where there is no
    context it begins with eos. Log likelihoods must not depend on the batch (EleutherAI/lm-evaluation-harness issue
    704, huggingface/transformers issue 31540 of Mamba, state-spaces/mamba issue 66)."""
    m, tokenizer = model(preset, num_layers=1, vocab_size=257, **Bytes().special_ids).eval(), Bytes().to_hugging_face()
    pairs = [("The cat", " sat on"), ("A", " b"), ("", "all of it"), ("What is this?", " x")]
    told = [(tokenizer(c).input_ids or [tokenizer.eos_token_id], tokenizer(x).input_ids) for c, x in pairs]
    rows = [torch.tensor([*context, *text][:-1]) for context, text in told]
    batch = m(nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.log_softmax(-1)
    for (context, text), found in zip(told, batch, strict=True):
        alone = m(torch.tensor([[*context, *text]])).logits[0].log_softmax(-1)
        read = slice(len(context) - 1, len(context) + len(text) - 1)
        torch.testing.assert_close(found[read], alone[read])
    assert tokenizer("whole", add_special_tokens=True).input_ids == list(b"whole")
