"""MDS streams -> packed windows -> model -> checkpoints -> losses, fits and figures.

Each sub-package is one part of that way and imports only what comes before it: study -> loop ->
evaluation -> run -> parallel, optim -> model -> data -> config. It may import ``kernels``, never
``gen``; a test holds both.
"""
