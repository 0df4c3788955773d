"""Tools around the workflow: the benchmark, executing main.ipynb, and its stamp."""
