"""What launch/slurm/pretrain.sbatch chooses by itself."""

import re
import subprocess

from harness import ROOT


def test_the_port_of_a_job_is_none_that_linux_hands_out():
    """Ports from 32768 on go to any program that asks for one: the job of such a number would find its port taken."""
    text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
    (line,) = re.findall(r"^export MASTER_PORT=.*$", text, re.MULTILINE)
    jobs = f"for SLURM_JOB_ID in {{1..60000..7}} 4294901759; do unset MASTER_PORT; {line}; echo $MASTER_PORT; done"
    done = subprocess.run(["bash", "-c", jobs], capture_output=True, text=True, check=True)
    ports = [int(port) for port in done.stdout.split()]
    assert min(ports) > 1024 and max(ports) < 32768 and len(set(ports)) > 8000
    given = f"SLURM_JOB_ID=5; MASTER_PORT=99; {line}; echo $MASTER_PORT"
    assert subprocess.run(["bash", "-c", given], capture_output=True, text=True).stdout == "99\n"
