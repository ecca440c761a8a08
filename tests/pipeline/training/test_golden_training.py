"""Ten optimizer steps follow the published loss curve."""

from __future__ import annotations

import pytest
import torch

from pipeline.quality.losses import fusion_loss
from tests.golden import cases


# float64 convolutions have no fast path: a minute and more each. `make test` runs float32 through DeepSpeed.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["64", "32"])
@pytest.mark.parametrize("pair", cases.TRAINING_PAIRS)
def test_ten_steps(pair: str, name: str) -> None:
    dtype, tolerance = {"64": (torch.float64, 1e-6), "32": (torch.float32, 1e-4)}[name]
    golden = cases.load("training")
    model = cases.golden_model(pair, dtype).train()
    optimizer = cases.golden_optimizer(model)
    losses = []
    for step in range(cases.TRAINING_STEPS):
        lr, pan, hr = cases.training_batch(step, dtype)
        loss = fusion_loss(model(lr, pan), hr, cases.TRAINING_LOSS).total.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden[f"{pair}/{name}/loss"].tolist(), abs=tolerance, rel=0)
    with torch.no_grad():
        fused = model.eval()(*cases.golden_inputs(dtype)).fused
    assert cases.distance(fused, golden[f"{pair}/{name}/fused"]) <= 100 * tolerance
    norm = torch.linalg.vector_norm(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert norm.item() == pytest.approx(golden[f"{pair}/{name}/weights_l2"].item(), rel=tolerance)
