"""Several GPUs in one process: each call runs on its tensors' device and that device's current stream."""

import pytest
import torch

from decdec import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.device_count() > 1 and torch.ops.decdec.has_cuda()), reason="needs two CUDA GPUs"
)


def place(device, base, residual):
    """A compensated GEMV with its own weights, pinned residual and workspace on ``device``."""
    from decdec import arena

    args = tuple(tensor.to(device) for tensor in base.args)
    rows = arena.pin([residual.args[0]], device)[0]
    scale = residual.args[1].to(device)
    space = torch.zeros(8 * base.dense.shape[0], dtype=torch.uint8, device=device)
    return lambda x: ops.codebook_gemv_compensated(x, *args, None, rows, scale, 4, False, 16, n_tb=4, workspace=space)


def test_two_gpus_run_at_once_and_agree(make_base, make_residual):
    base, residual = make_base("codebook", 2048, 512, 3), make_residual(2048, 512, 4)
    devices = [torch.device("cuda", index) for index in range(2)]
    calls = [place(device, base, residual) for device in devices]
    x = torch.randn(1, 2048).half()
    inputs = [x.to(device) for device in devices]
    expected = calls[0](inputs[0]).cpu()
    streams = [torch.cuda.Stream(device) for device in devices]
    for device in devices:
        torch.cuda.synchronize(device)
    results = [[], []]
    for _ in range(100):
        for call, x, stream, result in zip(calls, inputs, streams, results):
            with torch.cuda.stream(stream):
                result.append(call(x))
    for device in devices:
        torch.cuda.synchronize(device)
    assert torch.cuda.current_device() == 0
    for device, result in zip(devices, results):
        assert all(out.device == device and torch.equal(out.cpu(), expected) for out in result)


def test_a_graph_on_the_second_gpu_while_the_first_is_current(make_base, make_residual):
    device = torch.device("cuda", 1)
    call = place(device, make_base("codebook", 2048, 512, 3), make_residual(2048, 512, 4))
    x = torch.randn(1, 2048).half().to(device)
    expected = call(x)
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            out = call(x)
    assert torch.cuda.current_device() == 0
    x.neg_()
    graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(out, -expected)


def test_tensors_of_two_gpus_are_refused(make_base):
    base = make_base("codebook", 128, 64, 3)
    args = tuple(tensor.to("cuda:1") for tensor in base.args)
    with pytest.raises(RuntimeError, match="codebook_gemv: codebook: expected|codebook_gemv: qweight: expected"):
        ops.codebook_gemv(torch.randn(1, 128, device="cuda:0").half(), *args)
