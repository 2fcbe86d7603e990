"""Every setting of the programs: its type, default, meaning, unit and bounds, in one place.

From these come the checks, the errors and ``docs/config.md``. It imports nothing else of
``trainer``, and no torch: ``--help`` must be fast.
"""
