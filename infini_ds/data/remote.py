"""Prepared data at a remote address: its client, and a local folder with all but its shards."""

import importlib
import os
import re
import shutil
import uuid
from pathlib import Path

import xxhash

from data_prep.manifest import NAME
from infini_ds.streaming_compat.library import CloudDownloader
from infini_ds.utils.errors import UserError, first_line

LOCAL_SCHEME = "file://"  # a folder of this machine that is read through the cache, as if it were remote
# All but the shards: fetched at each start, since they tell which shards there are.
SMALL_FILES = (
    *(NAME, "train/index.json", "validation/index.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
)
# By the scheme of an address: the module that streaming imports for it, and what to install for it.
CLIENTS = {
    "s3": ("boto3", "boto3"),
    "gs": ("google.cloud.storage", "'google-cloud-storage<3.3'"),  # streaming 0.13's limit
    "hf": ("huggingface_hub", "huggingface_hub"),
    "azure": ("azure.storage.blob", "azure-storage-blob azure-identity"),
    "azure-dl": ("azure.storage.filedatalake", "azure-storage-file-datalake azure-identity"),
    "oci": ("oci", "oci"),
    "sftp": ("paramiko", "paramiko"),
    "dbfs": ("databricks.sdk", "databricks-sdk"),
    "alipan": ("alipcs_py", "AliPCS-py"),
}


def is_remote(path: str) -> bool:
    """Return whether `path` is an address, and not a folder that is read where it is."""
    return "://" in path


def remote_address(path: str) -> str:
    """Return the address as streaming takes it."""
    return path.removeprefix(LOCAL_SCHEME).rstrip("/")


def fetch_small_files(what: str, remote: str, cache: Path, cache_option: str) -> Path:
    """Fetch all files but the shards, and return their folder below `cache`.

    The folder's name depends on the address and the index: data that is prepared again under the same address has
    another folder. Ranks may fetch the same files at the same time.

    Args:
        what: "OPTION=ADDRESS", for errors.
        remote: as `remote_address` returns it.
        cache_option: the name of the option that chose `cache`, for errors.
    Raises:
        UserError: a package for this kind of address is missing, or it cannot be read.
    """
    scheme = remote.partition("://")[0] if "://" in remote else None
    if scheme is not None:
        _check_client(what, scheme)
    if scheme == "hf" and not re.match("hf://datasets/[^/]+/[^/]+", remote):
        raise UserError(f"{what}: write it as hf://datasets/OWNER/NAME, or with a folder after it")
    partial = cache / f".fetching-{uuid.uuid4().hex}"
    try:
        for name in SMALL_FILES:
            CloudDownloader.direct_download(f"{remote}/{name}", str(partial / name))
        digest = xxhash.xxh3_64(remote)
        for name in SMALL_FILES[:3]:
            digest.update((partial / name).read_bytes())
        folder = cache / f"{remote.rpartition('/')[2]}-{digest.hexdigest()}"
        if not folder.exists():
            try:
                os.rename(partial, folder)
            except OSError:
                if not folder.exists():  # else another rank was faster
                    raise
    except Exception as error:  # each client has errors of its own
        raise UserError(
            f"{what} cannot be read ({first_line(error)}): check the address, your rights there, and that "
            f"{cache_option}={cache} can be written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_client(what: str, scheme: str) -> None:
    """Raise a UserError if streaming does not know this kind of address, or its client is not installed."""
    if scheme not in CLIENTS:
        raise UserError(f"{what}: {scheme}:// is not known; known are file, {', '.join(CLIENTS)}, or a folder")
    module, packages = CLIENTS[scheme]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs a package that is not installed ({error}): pip install {packages}") from error
