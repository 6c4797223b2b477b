"""The pretend device itself: it computes as the CPU does and refuses what CUDA refuses."""

import copy

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepquant.models import weights
from tests.pretend_device import Traffic, pretend_device

TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices"


@pytest.fixture
def ledger():
    with pretend_device() as found:
        yield found


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


MIXTURES = {
    "elementwise": lambda x, there: there + x,
    "in place": lambda x, there: there.add_(x),
    "in place on the CPU": lambda x, there: x.add_(there),
    "matrix product": lambda x, there: x.T @ there,
    "concatenation": lambda x, there: torch.cat([there, x]),
    "a number of the device on the CPU": lambda x, there: x * there[0, 0],
    "the device's indices into a CPU tensor": lambda x, there: x[there.argmax(0)],
    "a value that isn't elementwise": lambda x, there: torch.stack([there[0, 0], x[0, 0]]),
    "an output": lambda x, there: torch.maximum(there, there, out=torch.empty(4, 6)),
    "a mask": lambda x, there: torch.where(x > 0, there, 0.0),
    "a layer left behind": lambda x, there: nn.Linear(6, 2)(there),
    "an index of another device": lambda x, there: there[torch.zeros(1, dtype=torch.int64, device="pretend:1")],
    "another device": lambda x, there: there + torch.ones(6, device="pretend:1"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_tensors_of_two_places_are_refused(ledger, x, mixture):
    with pytest.raises(RuntimeError, match=TWO_DEVICES):
        MIXTURES[mixture](x, x.to("pretend"))


MIXTURES_CUDA_ALLOWS = {
    "a CPU number": lambda x, there: there * torch.tensor(2.0),
    "a CPU number first": lambda x, there: torch.tensor(2.0) - there,
    "a CPU number to fill with": lambda x, there: there.clone().fill_(torch.tensor(2.0)),
    "CPU indices": lambda x, there: there[torch.tensor([2, 0])],
    "a list of indices": lambda x, there: there[[2, 0]],
    "a CPU mask": lambda x, there: there[torch.tensor([True, False, True, True])],
    "a value at CPU indices": lambda x, there: there.clone().index_put_((torch.tensor([1]),), torch.tensor(5.0)),
    "a copy across": lambda x, there: there.clone().copy_(torch.ones(4, 6)),
}


@pytest.mark.parametrize("mixture", MIXTURES_CUDA_ALLOWS)
def test_what_cuda_lets_pass_passes(ledger, x, mixture):
    found = MIXTURES_CUDA_ALLOWS[mixture](x, x.to("pretend"))
    assert found.device == torch.device("pretend:0")
    assert torch.equal(found.cpu(), MIXTURES_CUDA_ALLOWS[mixture](x, x))


def test_the_second_device(ledger, x):
    there = x.to("pretend:1")
    assert torch.zeros_like(there).device == there.T.device == (there @ there.T).device == torch.device("pretend:1")
    assert there.to("pretend:1") is there
    assert there.to("pretend").device == torch.device("pretend:0")  # the current device, as for "cuda"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        x.to("pretend:2")


def test_no_way_to_numpy_and_no_cpu_generator(ledger, x):
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        x.to("pretend").numpy()
    with pytest.raises(RuntimeError, match="Expected a 'pretend' device type for generator but found 'cpu'"):
        torch.randn(2, device="pretend", generator=torch.Generator())


def traffic_of(ledger, work) -> Traffic:
    before = ledger.traffic
    work()
    return ledger.traffic - before


def test_what_is_counted(ledger, x):
    there = x.to("pretend")
    assert traffic_of(ledger, lambda: x.to("pretend")) == Traffic(copies=1)
    assert traffic_of(ledger, lambda: torch.tensor([1.0], device="pretend")) == Traffic(copies=1)
    assert traffic_of(ledger, lambda: there.T[1:].unsqueeze(0)) == Traffic()
    assert traffic_of(ledger, lambda: there.cpu()) == Traffic(host_reads=1)
    assert traffic_of(ledger, lambda: there.tolist()) == Traffic(host_reads=1)
    assert traffic_of(ledger, lambda: there.sum().item()) == Traffic(host_reads=1, launches=1)
    assert traffic_of(ledger, lambda: bool(torch.isfinite(there).all())).host_reads == 1
    assert traffic_of(ledger, lambda: there[there > 0]).host_reads == 1  # how many there are
    assert traffic_of(ledger, lambda: there.clone().masked_fill_(there > 0, 0.0)).host_reads == 0
    assert traffic_of(ledger, lambda: there[torch.tensor([0])]) == Traffic(copies=1, launches=1)
    assert traffic_of(ledger, lambda: there.double().add_(1)) == Traffic(launches=2)


def test_in_place_work_through_views(ledger, x):
    found, expected = x.to("pretend"), x.clone()
    for tensor in (found, expected):
        tensor[1:, ::2] *= 3
        tensor.diagonal().copy_(tensor.diagonal() + 1)
        tensor.T[0] = 7
        tensor.view(torch.int32)[2, 3] = 0
        torch.maximum(tensor[0], tensor[1], out=tensor[0])
    assert torch.equal(found.cpu(), expected)


def test_modules_move_copy_and_load(ledger, x):
    """Module.to there and back, deepcopy, and weights taken over as they are."""
    layer = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    layer.register_buffer("count", torch.zeros(1))
    there = copy.deepcopy(layer).to("pretend:1")
    assert {p.device for p in [*there.parameters(), *there.buffers()]} == {torch.device("pretend:1")}
    assert all(isinstance(p, nn.Parameter) for p in there.parameters())
    again = copy.deepcopy(layer).to("meta")
    again.load_state_dict(there.state_dict(), assign=True)
    for module in (there, copy.deepcopy(there), again):
        assert torch.equal(module(x.to("pretend:1")).cpu(), layer(x))
    assert torch.equal(there.to("cpu")(x), layer(x))


@pytest.mark.parametrize("place", ["pretend:0", "pretend:1"])
def test_adam_takes_the_steps_of_the_cpu(ledger, x, place):
    found = {}
    for device in ("cpu", place):
        weight, data = torch.zeros(6, device=device, requires_grad=True), x.to(device)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (data * weight.exp()).square().sum().log().backward()
            optimizer.step()
        found[device] = weight.detach().cpu()
    assert torch.equal(found["cpu"], found[place]) and found["cpu"].all()


def test_attention_convolution_and_decompositions(ledger, x):
    q, image = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 4, 5, 5)
    convolution = nn.Conv3d(2, 3, 3)
    H = x.T @ x + torch.eye(6)
    pairs = [
        (
            nn.functional.scaled_dot_product_attention(q, q, q),
            nn.functional.scaled_dot_product_attention(*[q.to("pretend")] * 3),
        ),
        (convolution(image), copy.deepcopy(convolution).to("pretend")(image.to("pretend"))),
        (torch.linalg.svd(x).S, torch.linalg.svd(x.to("pretend")).S),
        (torch.linalg.qr(x).Q, torch.linalg.qr(x.to("pretend")).Q),
        (torch.linalg.cholesky_ex(H).L, torch.linalg.cholesky_ex(H.to("pretend")).L),
        (x.to(torch.float8_e4m3fn).view(torch.uint8), x.to("pretend").to(torch.float8_e4m3fn).view(torch.uint8)),
        (
            torch.view_as_complex(x.unflatten(1, (3, 2))).abs(),
            torch.view_as_complex(x.to("pretend").unflatten(1, (3, 2))).abs(),
        ),
    ]
    for expected, found in pairs:
        assert torch.equal(expected, found.cpu())


def test_safetensors(ledger, x, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": x.to("pretend:1")}, file)
    assert torch.equal(load_file(file)["x"], x)
    there = load_file(file, device="pretend:1")["x"]
    assert there.device == torch.device("pretend:1") and torch.equal(there.cpu(), x)


def test_other_libraries_are_left_as_they_were(x, tmp_path):
    before = safetensors.safe_open, weights.safe_open, safetensors.torch.safe_open
    with pretend_device():
        assert weights.safe_open is safetensors.safe_open is not before[0]
    assert (safetensors.safe_open, weights.safe_open, safetensors.torch.safe_open) == before
    save_file({"x": x}, tmp_path / "x.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        load_file(tmp_path / "x.safetensors", device="pretend:1")


def test_memory_runs_out(x):
    """A storage counts once, however many tensors show it, and no longer than one of them lives."""
    with pretend_device(limit=1000) as ledger:
        kept = torch.zeros(100, device="pretend")  # 400 bytes
        kept = [kept, kept.view(10, 10), kept[5:]]
        torch.zeros(100, device="pretend")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory. Tried to allocate 800 bytes"):
            torch.zeros(200, device="pretend")
        torch.zeros(200, device="pretend:1")
        del kept
        torch.zeros(200, device="pretend")
        assert ledger.peak == {0: 800, 1: 800}
