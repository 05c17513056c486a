"""Save a cache to a file and load it again, so that a text is read once and continued often.

A file is safetensors: the tensors of an `InfiniCache` by name, and as metadata what identifies its model. The memory of
another model, or of the same one at another step of its training, means nothing, so weights are compared by their hash.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from .memory import like_state
from .memory_rule import state_tensors

if TYPE_CHECKING:
    from .cache import InfiniCache
    from .configuration import InfiniGPTNeoConfig

FORMAT = "infini_cache"
VERSION = 1  # of the format; a reader refuses a newer one
# Fields of GPT-Neo's configuration that change what is computed, and that neither the weights' shapes nor a cache's
# fingerprint tell.
GPT_NEO_FIELDS = ("activation_function", "attention_layers", "layer_norm_epsilon", "window_size")
NOT_COMPARED = {"self", "kwargs", "gate_init"}  # of InfiniGPTNeoConfig's arguments; gate_init is an initial value
ABSENT_BEFORE = {"embed_conv": 0}  # fields that files of earlier versions do not have, and what they mean there
OPTIONAL = ("ids_hash", "offset_hash")  # None where a text was given as embeddings


class Digest(Protocol):
    """What `hashlib` returns."""

    def update(self, data: Any, /) -> None: ...


def hash_weights(module: nn.Module, digest: Digest) -> None:
    """Update a digest with names, types, shapes and values of all parameters, in the order of their names."""
    for name, weight in sorted(module.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def save_cache(cache: InfiniCache, path: str | Path, model: PreTrainedModel) -> None:
    """Write a cache to a file, atomically.

    Raises:
        ValueError: the cache is not one of this model.
    """
    cache.check(cast("InfiniGPTNeoConfig", model.config), len(cache.memory_document), model.dtype)
    copies = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in _tensors(cache).items()
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "model": json.dumps(_describe(model), sort_keys=True)}
    _write(Path(path), save(copies, metadata))


def load_cache(cache_class: type[InfiniCache], path: str | Path, model: PreTrainedModel) -> InfiniCache:
    """Return the cache in a file, on the device of its model.

    Raises:
        ValueError: the file is damaged or not a cache, or the cache of another model.
        OSError: the file cannot be read.
    """
    metadata, tensors = _read(Path(path))
    try:
        version, of_file = int(metadata["version"]), json.loads(metadata["model"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a saved cache: give a file that InfiniCache.save wrote") from error
    if metadata.get("format") != FORMAT or version > VERSION:
        raise ValueError(
            f"{path} has format {metadata.get('format')} {version}, and this code reads {FORMAT} up to {VERSION}: read "
            "it with the version of the model's code that wrote it"
        )
    _compare(ABSENT_BEFORE | of_file, _describe(model), path)
    rows, device = len(tensors["memory_document"]), model.device
    cache = cache_class(cast("InfiniGPTNeoConfig", model.config), rows, model.dtype, device)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    for index, layer in enumerate(cache.layer_caches):
        memory = [on_device[f"layers.{index}.memory.{name}"] for name in state_tensors(layer.memory)]
        layer.memory = like_state(layer.memory, memory)
        layer.k, layer.v = (on_device[f"layers.{index}.{name}"] for name in ("k", "v"))
    cache.open_documents, cache.memory_document = on_device["open_documents"], on_device["memory_document"]
    cache.first_ids = on_device["first_ids"]
    cache.last_embeds = on_device.get("last_embeds", cache.last_embeds)  # of a model with a convolution of embeddings
    cache.ids_hash, cache.offset_hash = (on_device.get(name) for name in OPTIONAL)
    columns, offset, packed = tensors["counts"].tolist()
    cache.columns, cache.offset, cache.packed = columns, offset, bool(packed)
    return cache


def _tensors(cache: InfiniCache) -> dict[str, Tensor]:
    """Return all that a cache consists of by name. Numbers are a tensor, so that a file's size does not tell them."""
    tensors = {name: getattr(cache, name) for name in ("open_documents", "memory_document", "first_ids")}
    tensors |= {name: value for name in OPTIONAL if (value := getattr(cache, name)) is not None}
    if cache.last_embeds.numel():
        tensors["last_embeds"] = cache.last_embeds
    tensors["counts"] = torch.tensor([cache.columns, cache.offset, cache.packed])
    for index, layer in enumerate(cache.layer_caches):
        named = {f"memory.{name}": tensor for name, tensor in state_tensors(layer.memory).items()}
        tensors |= {f"layers.{index}.{name}": x for name, x in (named | {"k": layer.k, "v": layer.v}).items()}
    return tensors


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the content of a cache depends on: fields of the configuration, precision, and a hash of the weights.

    The output layer has no influence on a cache and is left out, so a model with and without a head are the same.
    """
    config = model.config
    own = set(inspect.signature(type(config).__init__).parameters) - NOT_COMPARED
    fields = {name: getattr(config, name) for name in (*sorted(own), *GPT_NEO_FIELDS)}
    digest = hashlib.sha256()
    hash_weights(model.base_model, digest)
    described = fields | {"dtype": str(model.dtype).removeprefix("torch."), "weights": digest.hexdigest()}
    return dict(json.loads(json.dumps(described)))  # tuples as lists, as a file has them


def _compare(of_file: dict[str, Any], of_model: dict[str, Any], path: str | Path) -> None:
    """Raise a ValueError that names the first difference between the model of a file and another one."""
    remedy = "give the model that it was saved with, or read the text again with this one"
    for name in sorted((of_file.keys() | of_model.keys()) - {"weights"}):
        if of_file.get(name) != of_model.get(name):
            raise ValueError(
                f"{path} is the cache of a model with {name}={of_file.get(name)}, and this model has "
                f"{name}={of_model.get(name)}: {remedy}"
            )
    if of_file.get("weights") != of_model["weights"]:
        raise ValueError(
            f"{path} is the cache of a model with other weights than this one's (another model, or another step of its "
            f"training): {remedy}"
        )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with path.open("rb"):  # for an OSError that names the file
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a saved cache ({error}): read the text again") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file through a partial one in the same folder, so that its content is the earlier or the complete one."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
