"""The namespace of the operators that torch registers: one for every copy of this package.

One process may hold both ``kernels`` (a script of the clone) and ``megadocs.kernels`` (a library
beside it); torch lets the second registration of a name silently replace the first.
"""

NAMESPACE = "megadocs" if __package__ == "kernels" else str(__package__).replace(".", "_")
