"""transformers' own tests for models and configurations, on a tiny model whose sequences have several segments."""

import inspect
import unittest

import torch
from transformers_tests import load

from infini_ds.model import (
    InfiniGPTNeoConfig,
    InfiniGPTNeoForCausalLM,
    InfiniGPTNeoForSequenceClassification,
    InfiniGPTNeoModel,
)

modeling, configurations = load()

B, T = 3, 19  # rows and tokens: five segments, the last one not full
FIELDS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 3,
    "max_position_embeddings": 64,
    "segment_length": 4,
    "bos_token_id": 98,
    "eos_token_id": 98,
    "pad_token_id": 98,
    "resid_dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
}

# Tests that cannot apply, each with its reason.
NOT_APPLICABLE: dict[str, str] = {}


class Tester:
    """What transformers' tests ask of a tester of a model."""

    batch_size, seq_length, is_training = B, T, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    encoder_seq_length = decoder_seq_length = key_length = T

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> InfiniGPTNeoConfig:
        return InfiniGPTNeoConfig(**FIELDS)

    def prepare_config_and_inputs_for_common(self) -> tuple[InfiniGPTNeoConfig, dict]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 98, (B, T), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModels(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (InfiniGPTNeoModel, InfiniGPTNeoForCausalLM, InfiniGPTNeoForSequenceClassification)
    # Switches of tests that a model may not support.
    has_attentions = False
    test_head_masking = test_pruning = test_torchscript = fx_compatible = False
    test_missing_keys = test_model_parallel = False

    def setUp(self) -> None:
        if reason := NOT_APPLICABLE.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = Tester(self)
        self.config_tester = configurations.ConfigTester(
            self, config_class=InfiniGPTNeoConfig, common_properties=["hidden_size", "num_layers"], **FIELDS
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = dict(inputs_dict)
        if return_labels and model_class is InfiniGPTNeoForCausalLM:
            inputs["labels"] = inputs["input_ids"].clone()
        if return_labels and model_class is InfiniGPTNeoForSequenceClassification:
            inputs["labels"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


def test_every_exception_names_a_test_of_the_suite():
    assert all(inspect.isfunction(getattr(TestModels, name, None)) for name in NOT_APPLICABLE)
    assert all(len(reason) > 20 for reason in NOT_APPLICABLE.values())
