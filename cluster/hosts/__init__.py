"""Runs on hosts reached by ssh or srun: hostfiles, preflight checks, launch, supervision."""
