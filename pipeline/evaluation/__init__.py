"""Trained weights measured: `evaluate` scores a checkpoint beside two baselines, `catalogue` prints what models cost."""
