"""Work distributed over processes and MPI ranks."""
