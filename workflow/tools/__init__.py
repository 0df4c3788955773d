"""Tools: benchmark, execution of main.ipynb, and its stamp."""
