"""One module a question; measured results lie in ``results/``.

Each is a program, ``python -m benchmarks.NAME --help``, and says machine, versions and date in what
it writes. They may import everything; nothing imports them.
"""
