"""Around the project: the benchmark, executing the notebook, the stamp."""
