"""The SatFusion family in pure torch: tensors in, tensors out; it knows no rank, file or configuration of others.

`registry` builds a model of a `config`: an encoder (`encoders`), a head (`heads`), or both joined by `satfusion`.
"""
