"""Moving residuals between host and GPU memory, as far as that goes without a GPU; on one: test_linear.py."""

from types import SimpleNamespace

import torch

from decdec import placement


class Rows:
    """Residual rows that a kernel of ``device`` reads, and where they lie."""

    nbytes = 10

    def __init__(self, device, lie):
        self.device, self.lie = torch.device(device), lie

    def cpu(self):
        return Rows("cpu", "pageable")

    def to(self, device):
        return self if self.device == device else Rows(device, "gpu")


def test_residuals_move_between_host_and_gpu_memory(monkeypatch):
    monkeypatch.setattr("decdec.arena.pin", lambda rows, device: [Rows(device, "host") for _ in rows])
    monkeypatch.setattr(placement.torch, "zeros", lambda size, **_: object())
    layer = SimpleNamespace(residual=Rows("cpu", "pageable"), device=torch.device("cuda", 0), workspace=None,
                            residual_in="host", out_features=4)
    for where in ("host", "gpu", "host"):
        placement.place_residuals([layer], where)
        assert (layer.residual_in, layer.residual.lie, layer.residual.device) == (where, where, layer.device)
        placed = layer.residual, layer.workspace
        placement.place_residuals([layer], where)
        assert placed == (layer.residual, layer.workspace)
