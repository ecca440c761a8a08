"""How close an image is to its target: the training loss, the metrics, and the registration both begin with.

Pure functions of tensors; training and evaluation import them.
"""
