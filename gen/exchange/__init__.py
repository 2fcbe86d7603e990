"""Generations and documents from files of others, and ours as files for others.

May import ``gen.corpus``, ``gen.generations``, ``gen.quality`` and ``gen.megadocs``, and of
``gen.client`` what an answer says.
"""
