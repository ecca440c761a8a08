"""The SatFusion family in pure torch: tensors in, tensors out; it has no access to ranks, files or other configuration.

`registry` builds a model of a `config`: an encoder (`encoders`), a head (`heads`), or both joined by `satfusion`.
"""
