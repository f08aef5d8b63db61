"""A process and its process group: collectives, files, terminal, Slurm's environment."""
