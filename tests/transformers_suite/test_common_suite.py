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
# By these names the tests leave out classes that have no loss.
modeling.MODEL_MAPPING_NAMES = modeling.MODEL_MAPPING_NAMES | {"infini_gpt_neo": "InfiniGPTNeoModel"}

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
    "short_conv": 2,
    "embed_conv": 3,
    "bos_token_id": 98,
    "eos_token_id": 98,
    "pad_token_id": 98,
    "resid_dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
}

# Tests that cannot apply, each with its reason.
NOT_APPLICABLE = {
    "test_retain_grad_hidden_states_attentions": "no gradient flows through `hidden_states`: they are copies in the "
    "order of the tokens, and the layers compute on segments",
}


class ModelTester:
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


class TestModels(modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (InfiniGPTNeoModel, InfiniGPTNeoForCausalLM, InfiniGPTNeoForSequenceClassification)
    # Each switch skips tests of something that this model does not have.
    has_attentions = False  # attention probabilities are never computed (`output_attentions` is refused)
    test_head_masking = test_pruning = False  # this model takes no head mask and prunes no heads
    test_torchscript = fx_compatible = False  # blocks depend on the data: the number of segments, of documents
    test_missing_keys = False  # GPT-Neo's own test switches it off too

    def setUp(self) -> None:
        if reason := NOT_APPLICABLE.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = ModelTester(self)
        self.config_tester = configurations.ConfigTester(
            self, config_class=InfiniGPTNeoConfig, common_properties=["vocab_size"], **FIELDS
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = dict(inputs_dict)
        if return_labels and model_class is InfiniGPTNeoForCausalLM:
            inputs["labels"] = inputs["input_ids"].clone()
        if return_labels and model_class is InfiniGPTNeoForSequenceClassification:
            inputs["labels"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        return inputs

    def test_config(self) -> None:
        # Of the common properties, those that may be 0, as the test sets them: a width of 0 is refused.
        self.config_tester.run_common_tests()


def test_every_exception_names_a_test_of_the_suite():
    assert all(inspect.isfunction(getattr(TestModels, name, None)) for name in NOT_APPLICABLE)
    assert all(len(reason) > 20 for reason in NOT_APPLICABLE.values())
