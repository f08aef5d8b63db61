"""Tools for login nodes: Slurm jobs, launches on hosts, run status. Imports neither torch nor deepspeed."""
