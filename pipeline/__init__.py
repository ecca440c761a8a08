"""One run from end to end: data, training, evaluation, monitoring."""
