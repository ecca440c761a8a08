"""Trained weights measured: `evaluate` scores a checkpoint beside baselines, `catalogue` prints what models cost."""
