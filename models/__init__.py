"""The SatFusion family: pure torch modules, tensors in and tensors out."""
