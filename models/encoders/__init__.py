"""Multi-frame encoders: low-resolution revisits to features on the low-resolution grid."""
