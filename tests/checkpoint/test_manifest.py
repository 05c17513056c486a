"""The checkpoint manifest: damage to itself, and what earlier versions wrote."""

import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    TrainState,
    find_damage,
    fsync_and_hash,
    read_manifest,
    write_manifest,
)
from infini_ds.utils.errors import UserError
from infini_ds.utils.hashing import sha256_of_json

STATE = TrainState(step=20, tokens=20480, validated=20, validation_loss=3.25, consecutive_skips=2, losses=18)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoints" / "step-000020"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(os.urandom(1000))
    files = {"weights.pt": fsync_and_hash(folder / "weights.pt")}
    write_manifest(folder, CheckpointManifest(STATE, 8, "2026-01-02T03:04:05+00:00", "2.13.0", files, sequence=2))
    return folder


def test_it_is_read_as_it_was_written(checkpoint):
    manifest = read_manifest(checkpoint)
    assert manifest.state == STATE and (manifest.world_size, manifest.sequence) == (8, 2)
    assert manifest.files["weights.pt"].bytes == 1000 and find_damage(checkpoint) == []
    assert sorted(os.listdir(checkpoint)) == [MANIFEST, "weights.pt"]  # no partial file


def test_damage_to_the_manifest_is_found(checkpoint):
    draw, path = random.Random(0), checkpoint / MANIFEST
    written = path.read_bytes()
    for byte in range(0, len(written.rstrip()), 3):
        damaged = bytearray(written)
        damaged[byte] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert f"{path} is damaged (" in find_damage(checkpoint)[0], byte
    path.write_text(json.dumps({"step": 20, "tokens": 1, "world_size": 2, "torch": "2.13"}))
    assert len(find_damage(checkpoint)) == 1  # without checksums
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_manifest(checkpoint)


def test_manifests_of_earlier_versions_are_read(checkpoint):
    """Version 0.1 had another name for the skips, and no sequence groups. Its checksum is over its own names."""
    body = asdict(read_manifest(checkpoint))
    del body["sequence"]
    body["state"]["skipped_in_a_row"] = body["state"].pop("consecutive_skips")
    with (checkpoint / MANIFEST).open("w") as file:
        json.dump(body | {"sha256": sha256_of_json(body)}, file, indent=1)
    manifest = read_manifest(checkpoint)
    assert manifest.state == STATE and (manifest.world_size, manifest.sequence) == (8, 1)
    assert find_damage(checkpoint) == []


def test_the_validation_loss_of_another_step_is_not_the_checkpoints():
    earlier = TrainState(step=20, validated=10, validation_loss=3.25)
    losses = [CheckpointManifest(state, 1, "", "", {}).validation_loss for state in (STATE, earlier, TrainState())]
    assert losses == [3.25, None, None]
