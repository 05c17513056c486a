"""Infini-GPT-Neo as a Hugging Face model. Imports torch and transformers only: an export carries these files."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .block_schedule import BlockSchedule
from .cache import InfiniCache
from .configuration import InfiniGPTNeoConfig
from .memory import MemoryState
from .memory_rule import MemoryRule, register_memory_rule
from .modeling import InfiniGPTNeoForCausalLM, InfiniGPTNeoForSequenceClassification, InfiniGPTNeoModel
from .sequence_parallel import SequenceGroup

__all__ = [
    "BlockSchedule",
    "InfiniCache",
    "InfiniGPTNeoConfig",
    "InfiniGPTNeoForCausalLM",
    "InfiniGPTNeoForSequenceClassification",
    "InfiniGPTNeoModel",
    "MemoryRule",
    "MemoryState",
    "SequenceGroup",
    "register_memory_rule",
]

AutoConfig.register(InfiniGPTNeoConfig.model_type, InfiniGPTNeoConfig)
AutoModel.register(InfiniGPTNeoConfig, InfiniGPTNeoModel)
AutoModelForCausalLM.register(InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM)
AutoModelForSequenceClassification.register(InfiniGPTNeoConfig, InfiniGPTNeoForSequenceClassification)
