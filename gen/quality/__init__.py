"""Which generations are fit for a stream: gates, their measures, and a page to judge them by.

A generation is counted or left out, never changed without a word. It may import
``gen.generations`` and ``gen.corpus``.
"""
