"""PEFT, accelerate and TRL on the model. The lock file has none of them: each test runs where its package is installed.

docs/compatibility.md names the versions that these tests were run with.
"""

import pytest
import torch
from reference import TINY, random_ids, writer
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM

S = TINY["segment_length"]
close = {"rtol": 1e-4, "atol": 1e-5}


def model_and_ids() -> tuple[InfiniGPTNeoForCausalLM, torch.Tensor]:
    return writer(dtype=torch.float32), random_ids(2, 2 * S + 3)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["lm_head"]])
def test_lora_trains_and_is_saved_loaded_and_merged(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = model_and_ids()
    before = model(ids, labels=ids).loss.item()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        assert adapted(input_ids=ids, labels=ids).loss.item() < before - 0.1
        logits = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(writer(dtype=torch.float32), tmp_path).eval()
        assert_close(again(input_ids=ids).logits, logits, **close)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        text = adapted.generate(input_ids=ids, eos_token_id=None, **options)
        assert torch.equal(text[:, ids.shape[1]], logits[:, -1].argmax(-1))
        assert_close(adapted.merge_and_unload()(ids).logits, logits, **close)


def test_lora_needs_target_modules():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        peft.get_peft_model(model_and_ids()[0], peft.LoraConfig(task_type="CAUSAL_LM"))


def test_prompt_tuning_reads_its_prompt_before_the_text():
    peft = pytest.importorskip("peft")
    model, ids = model_and_ids()
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        prompt = tuned.get_prompt(batch_size=len(ids))
        embeds = torch.cat([prompt, model.transformer.wte(ids)], dim=1)
        labels = torch.cat([torch.full((len(ids), 5), -100), ids], dim=1)
        want = model(inputs_embeds=embeds, labels=labels).loss
        assert_close(tuned(input_ids=ids, attention_mask=mask, labels=ids).loss, want, **close)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = tuned.generate(input_ids=ids, attention_mask=mask, **options)
        assert torch.equal(text[:, ids.shape[1]], model(inputs_embeds=embeds).logits[:, -1].argmax(-1))


def test_prefix_tuning_is_refused():
    peft = pytest.importorskip("peft")
    model, ids = model_and_ids()
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with pytest.raises(ValueError, match="is a DynamicCache, which holds keys and values of all tokens"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def test_an_accelerator_trains_as_plain_torch_does(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    losses: list[list[float]] = []
    for accelerator in (None, accelerate.Accelerator(cpu=True)):
        model, ids = model_and_ids()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if accelerator:
            model, optimizer = accelerator.prepare(model, optimizer)
        losses.append([])
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            (accelerator.backward if accelerator else torch.Tensor.backward)(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    want = model(ids).logits
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    accelerator.load_state(tmp_path)
    assert_close(model(ids).logits, want)


def test_offloaded_weights_give_the_same_logits_and_a_loss():
    accelerate = pytest.importorskip("accelerate")
    model, ids = model_and_ids()
    with torch.no_grad():
        want = model(ids, labels=ids)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        got = model(ids, labels=ids)
    assert_close(got.logits, want.logits)
    assert_close(got.loss, want.loss, **close)


WORDS = ["import", "a", "b", "c", "d"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_keeps_packed_documents_apart(packing, checkpointing, tmp_path):
    """The loss of the first step is that of these rows with the `document_ids` that their packing means."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from data_prep.tokenizer import make_word_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 16, "segment_length": 8}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = InfiniGPTNeoConfig(vocab_size=16, attention_types=[[["global", "local"], 1]], **sizes, **special)
    model, tokenizer = InfiniGPTNeoForCausalLM(config), make_word_tokenizer(WORDS)
    texts = ["import a b c d " * n for n in (1, 2, 3, 1, 4, 2, 6, 3)]
    options = {"packing": packing, "max_length": 64, "gradient_checkpointing": checkpointing}
    options |= {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    options |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()  # all of it, since the order is shuffled
    assert ("position_ids" in batch) == packing
    labels, inputs = batch["labels"], {"attention_mask": batch.get("attention_mask")}
    if packing:
        inputs["document_ids"] = (batch["position_ids"] == 0).cumsum(1) - 1
        assert inputs["document_ids"].max() == len(texts) - 1
    with torch.no_grad():
        total = model(batch["input_ids"], labels=labels, loss_reduction="sum", **inputs).loss
    # Earlier versions of the Trainer count the first label of each row too.
    means = [(total / (each != -100).sum()).item() for each in (labels, labels[:, 1:])]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert any(losses[0] == pytest.approx(mean, abs=1e-4) for mean in means) and losses[1] < losses[0]
