"""Documents -> generations -> megadocs -> MDS streams.

``pipeline.py`` is the whole way; each sub-package is one part of it. It may import of ``trainer``
only the contract of the streams, files, errors and the fields of configs, and never ``kernels``.
"""
