"""Tasks of a job work with the weights and the dataset that its driver has found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.jobs import verb_job
from sharding.errors import UserError


def test_weights_that_changed_meanwhile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = SimpleNamespace(fusion=SimpleNamespace(digest="new"), predict_one=str.upper)
    monkeypatch.setattr(verb_job, "_predictor", lambda text: predictor)
    assert verb_job._predict_aoi("", "new", "aoi") == "AOI"
    with pytest.raises(UserError, match=r"the weights have changed meanwhile: name the checkpoint's step"):
        verb_job._predict_aoi("", "old", "aoi")


def test_a_dataset_that_changed_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = SimpleNamespace(name="step-9", dataset=SimpleNamespace(index=SimpleNamespace(digest="new")))
    monkeypatch.setattr(verb_job, "_evaluation", lambda text: (None, [job]))
    for inputs in (("step-9", "old"), ("step-6", "new")):
        with pytest.raises(UserError, match=r"the weights or the dataset have changed meanwhile: name the checkpoint"):
            verb_job._score_aoi("", 0, inputs, 3, 1)
