"""One module a question; measured results lie in ``results/``."""
