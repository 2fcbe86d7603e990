"""Servers of a language model: started, watched, restarted, or just found.

SGLang in its own environment, llama.cpp in a process beside, or any OpenAI-compatible URL. It
may import ``gen.client``.
"""
