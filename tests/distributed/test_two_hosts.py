"""Two hosts, as two connected network namespaces: `deepspeed --hostfile`, by ssh and one launcher on each host."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, TINY, environment

from infini_ds.metrics.metric_writers import read_metrics

HOSTS = {"infini-a": "10.77.31.1", "infini-b": "10.77.31.2"}
CABLE = "infini0"
# Each host has a /dev/shm of its own.
ON_HOST = 'exec ip netns exec {host} unshare --mount sh -c \'mount -t tmpfs tmpfs /dev/shm && exec "$@"\' -- "$@"'


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def on_host(host: str, *command: str | Path) -> list[str]:
    """Return the command line that runs `command` on a host."""
    return ["bash", "-c", ON_HOST.format(host=host), "--", *map(str, command)]


@pytest.fixture(scope="module")
def hosts():
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        a, b = HOSTS
        ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", CABLE, "up")
        yield HOSTS
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be created: {error.stderr.strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def training_command(shards: Path, folder: Path, *options: str, sequence: int = 1) -> list[str]:
    """Write a hostfile of both hosts, and return the command that trains on them."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--log_level", "error"]
    where = [f"data.path={shards}", f"output={folder}", "name=hosts", "batch.micro_rows=1"]
    master = ["--master_addr", HOSTS["infini-a"], "--master_port", "29531"]
    return [
        *map(str, launcher),
        *options,
        *master,
        "launch/pretrain.py",
        *TINY,
        *where,
        "validation.every=10",
        f"parallel.sequence={sequence}",
    ]


def assert_losses_of_one_host(folder: Path, runs: Path, tolerance: float = 1e-6) -> None:
    """Compare with two ranks of one host."""
    ours, theirs = (
        [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
        for run in (folder / "hosts", runs / "two")
    )
    assert len(ours) == 20 and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < tolerance


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_launcher_on_each_of_two_hosts(sequence, hosts, shards, runs, tmp_path):
    """The two ranks read rows of their own, or share each row."""
    variables = environment(GLOO_SOCKET_IFNAME=CABLE, OMP_NUM_THREADS="1")
    launchers = [
        subprocess.Popen(
            on_host(
                host, *training_command(shards, tmp_path, "--no_ssh", "--node_rank", str(number), sequence=sequence)
            ),
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]
    try:
        outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "2 ranks" in outputs[0]
    assert_losses_of_one_host(tmp_path, runs, tolerance=1e-6 if sequence == 1 else 1e-4)


def test_one_launcher_reaches_two_hosts_by_ssh(hosts, shards, runs, tmp_path):
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if not sshd or not shutil.which("pdsh"):
        pytest.skip("needs sshd and pdsh")
    if " " in f"{ROOT}{sys.executable}":
        pytest.skip("DeepSpeed's command for pdsh does not quote paths, and this one has a space")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(f"{key}.pub", tmp_path / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd does not start without it
    options = {"AuthorizedKeysFile": tmp_path / "authorized", "StrictModes": "no", "Port": 2231, "PidFile": "none"}
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    servers = [subprocess.Popen(on_host(host, sshd, "-D", "-f", "/dev/null", "-h", key, *settings)) for host in hosts]
    client = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    variables = environment(PDSH_SSH_ARGS_APPEND=client, DS_ENV_FILE=str(tmp_path / "variables"))
    exported = {
        "GLOO_SOCKET_IFNAME": CABLE,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    (tmp_path / "variables").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    command = training_command(shards, tmp_path, "--ssh_port", "2231", "--no_ssh_check")
    try:
        done = subprocess.run(
            on_host("infini-a", *command), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240
        )
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    assert_losses_of_one_host(tmp_path, runs)
