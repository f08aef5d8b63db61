"""Faults of hostfiles and Slurm jobs, met by `cluster` on the login node."""

from __future__ import annotations

from tests.unit.faults.case import Fault, writes

CPUS = "--gpus-per-node 0 --tasks-per-node 1"
SLURM = f"cluster slurm --config run.yaml --set output_dir=new {CPUS}"
HOSTFILE = "cluster hostfile hosts"


def hosts(what: str, text: str | bytes, said: str) -> Fault:
    return Fault(what, HOSTFILE, said, prepare=writes("hosts", text))


FAULTS = [
    hosts("an empty hostfile", "", "hosts: names no host; expected one `host slots=N` per line"),
    hosts("a host without slots", "node-1\n", "hosts:1: 'node-1' is not `host slots=N`"),
    hosts(
        "a host listed twice",
        "a slots=8\na slots=8\n",
        "hosts:2: a is listed twice; give it one line with all its slots",
    ),
    hosts("a host without any slot", "a slots=0\n", "hosts:1: a has no slots; remove the line"),
    hosts("a number of slots beyond bounds", "a slots=2000\n", "hosts:1: a has 2,000 slots; at most 1,024 expected"),
    hosts(
        "a host name that ssh reads as an option",
        "-oProxyCommand=sh slots=1\n",
        "hosts:1: '-oProxyCommand=sh' is not a host name; expected letters, digits and _.-, or USER@HOST,"
        " and no leading '-'",
    ),
    hosts(
        "a host name with a shell command",
        "a$(reboot) slots=1\n",
        "hosts:1: 'a$(reboot)' is not a host name; expected letters, digits and _.-, or USER@HOST, and no leading '-'",
    ),
    hosts(
        "a hostfile that is no UTF-8",
        b"a slots=8\n\xff",
        "hosts: not UTF-8 text ('utf-8' codec can't decode byte 0xff in position 10: invalid start byte);"
        " expected one `host slots=N` per line",
    ),
    Fault(
        "a range that falls",
        "cluster hostfile --hosts a[3-1]:8",
        "'a[3-1]': 3-1 is a descending range; write it as 1-3",
    ),
    Fault(
        "ranges that multiply without bound",
        "cluster hostfile --hosts a[1-9999]b[1-9999]:1",
        "'a[1-9999]b[1-9999]': stands for more than 10,000 hosts; correct the range",
    ),
    Fault(
        "no number of slots",
        "cluster hostfile --hosts a",
        "a: number of ranks is missing; pass a:8, or --slots 8 for all hosts",
    ),
    Fault(
        "a hostfile handed to `maskvr train`",
        "maskvr train --config run.yaml --set output_dir=new --hostfile hosts",
        "hosts:1: '-oProxyCommand=sh' is not a host name; expected letters, digits and _.-, or USER@HOST,"
        " and no leading '-'",
        prepare=writes("hosts", "-oProxyCommand=sh slots=1\n"),
    ),
    Fault(
        "a number of nodes beyond bounds",
        f"{SLURM} --nodes 1-100000000",
        "--nodes '1-100000000': expected N or N-M, 1 ≤ N ≤ M ≤ 10,000",
    ),
    Fault(
        "nodes that the batch does not fit",
        f"{SLURM} --nodes 7",
        "7 nodes: batch.global_size 8 is not a multiple of batch.micro_size 4 × 7 ranks = 28; set "
        "batch.global_size to 28, or to 7 or 14 with a batch.micro_size that divides a rank's share",
    ),
    Fault(
        "a time limit that is no time",
        f"{SLURM} --nodes 1 --time soon",
        "--time soon: expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
    ),
    Fault(
        "a time limit below the last checkpoint's",
        f"{SLURM} --nodes 1 --time 5",
        "--time 5: 300 s, but the last checkpoint starts 300 s before the limit; raise --time or lower "
        "--signal-seconds",
    ),
    Fault(
        "an sbatch option that the job sets itself",
        f"{SLURM} --nodes 1 --sbatch nodes=3",
        "--sbatch nodes=3: nodes cannot be set here: use --nodes",
    ),
    Fault(
        "a job name with a line end",
        f"{SLURM} --nodes 1 --job-name 'a\nb'",
        "--job-name 'a\\nb': a directive in a job script must not be empty, nor contain line breaks, other"
        " control characters or backslashes; use another value",
    ),
    Fault(
        "no virtual environment there",
        f"{SLURM} --nodes 1 --venv nowhere",
        "--venv nowhere: no virtual environment there (…nowhere/bin/python is missing); correct the path,"
        " or create it on a file system that all nodes share",
    ),
    Fault(
        "a corpus that is not built",
        f"{SLURM} --nodes 1 --set data.path=nowhere",
        "…nowhere: no corpus there (manifest.json is missing); correct the path, build it first, or build"
        " it with --build-data",
    ),
    Fault(
        "status of no run",
        "cluster status texts",
        "texts: neither a run's folder (metrics.jsonl is missing) nor a folder of seed-* runs",
    ),
]
