"""Slurm jobs: sbatch options, job scripts, checks before submission."""
