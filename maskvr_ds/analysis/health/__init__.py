"""Health of a training: findings over a run's records, at a checkpoint, and at initialisation."""
