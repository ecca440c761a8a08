"""Jobs on a Ray cluster: `submit` sends a job and follows it; `train_job` and `verb_job` run on the cluster."""
