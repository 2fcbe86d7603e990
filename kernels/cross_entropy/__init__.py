"""The loss of a linear output layer, without ever holding all logits.

``interface.py`` checks the arguments and holds the operators; ``chunked.py`` sweeps over chunks of
tokens or of the vocabulary with the steps of PyTorch (``torch_steps.py``) or Triton (``triton/``).
It may import nothing of the other packages.
"""
