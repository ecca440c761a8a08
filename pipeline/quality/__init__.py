"""Distance of an image to its target: the training loss, the metrics, and the registration that both start with.

Pure functions of tensors; training and evaluation import them.
"""
