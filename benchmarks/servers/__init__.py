"""Servers that stand in for an engine, where a benchmark asks what all the rest costs.

They import nothing of the project.
"""
