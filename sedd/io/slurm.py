"""Dask workers that SLURM starts, each a job of its own."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from sedd.errors import UserError

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster

PROGRAM = 1 << 30
"""Bytes that a worker may take beside its share of the memory budget."""


def start_workers(n: int, budget: int) -> SLURMCluster:
    """Ask SLURM for `n` workers of one core; those that have come are used while the others wait in the queue.

    What a cluster asks of every job, an account or a partition, is set as Dask has it: `jobqueue.slurm.account` in its
    configuration, or `DASK_JOBQUEUE__SLURM__ACCOUNT` in the environment. Closing the cluster cancels its jobs.

    Parameters
    ----------
    n : workers
    budget : bytes that all of them together may hold

    Raises
    ------
    UserError
        If there is no SLURM here, or no dask-jobqueue, or SLURM would not take such a job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm_workers: there is no sbatch here. Run it where SLURM is, or leave it out to use this machine's cores.")
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise UserError("--slurm_workers needs dask-jobqueue: pip install 'sedd[slurm]'.") from None
    memory = math.ceil(budget / n) + PROGRAM
    cluster = SLURMCluster(
        cores=1,
        processes=1,
        memory=f"{memory}B",
        python=sys.executable,
        worker_extra_args=["--no-dashboard", "--memory-limit", "0"],  # tasks keep to the budget; Dask would kill at a guess
        scheduler_options={"dashboard": False},
    )
    # Asked first: Dask submits the jobs elsewhere, and would wait for ever for those that were refused.
    asked = subprocess.run(["sbatch", "--test-only"], input=cluster.job_script(), capture_output=True, text=True)
    if asked.returncode:
        cluster.close()
        said = asked.stderr.strip().removeprefix("sbatch: error: ").splitlines()
        raise UserError(
            f"--slurm_workers: SLURM would not take a worker ({said[0] if said else 'it gave no reason'}). Set what it "
            "asks for by DASK_JOBQUEUE__SLURM__ACCOUNT, __QUEUE (the partition) or __WALLTIME, or lower --memory_budget."
        )
    cluster.scale(jobs=n)
    return cluster
