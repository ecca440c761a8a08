"""Evaluation of trained weights: `evaluate` scores a checkpoint beside baselines, `catalogue` prints models' costs."""
