"""Hidden states on the host between blocks; on CUDA with copies beside the work."""

import pytest
import torch

from stepquant.calibration import hidden_states
from stepquant.calibration.hidden_states import PinnedHiddenStates, open_hidden_states


def make_chunks(count):
    """Chunks of two calls, the last one of one call, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1 + (n < count - 1), 3, 5, generator=generator).bfloat16() for n in range(count)]


def run_blocks(hidden, blocks, count):
    """What replay does: per block, every chunk is read, changed and written."""
    for block in range(blocks):
        for n in range(count):
            states = hidden.get(n)
            assert states.device == torch.empty(0, device=hidden.device).device
            hidden.put(n, states * 2 + block)
    assert all(hidden.host(n).device.type == "cpu" for n in range(count))
    return [hidden.host(n).clone() for n in range(count)]


def expected_after(chunks, blocks):
    for block in range(blocks):
        chunks = [chunk * 2 + block for chunk in chunks]
    return chunks


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_block_gets_the_output_of_the_block_before(device, count):
    chunks, given = make_chunks(count), make_chunks(count)
    with open_hidden_states(given, device) as hidden:
        assert given == [] and len(hidden) == count
        found = run_blocks(hidden, 4, count)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected_after(chunks, 4), strict=True))


def test_the_given_tensors_are_not_changed():
    """They can be mapped files of the shard before."""
    chunks, given = make_chunks(3), make_chunks(3)
    kept = list(given)
    with open_hidden_states(given, "cpu") as hidden:
        run_blocks(hidden, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(kept, chunks))


class FakeStream:
    """Runs everything at once, and notes what it was made to wait for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_event(self):
        return FakeEvent(self.log)

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))

    def wait_stream(self, stream):
        self.log.append((self.name, "waits for", stream))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class FakeEvent:
    def __init__(self, log):
        self.log = log

    def synchronize(self):
        self.log.append(("host", "waits for", self))


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stands in for torch.cuda: the order of waits is noted, and page-locked memory is registered by address."""
    log, registered, names = [], {}, iter(("upload", "download"))
    work, success = FakeStream(log, "work"), object()

    def check_error(code):
        assert code is success  # torch compares with its own enumeration, to which no number is equal

    calls = {
        "Stream": lambda device: FakeStream(log, next(names)),
        "current_stream": lambda device: work,
        "stream": lambda stream: stream,
        "synchronize": lambda device: log.append(("host", "waits for", "all")),
        "check_error": check_error,
        "cudart": lambda: Cudart(),
    }

    class Cudart:
        def cudaHostRegister(self, address, size, flags):  # noqa: N802
            registered[address] = size
            return success

        def cudaHostUnregister(self, address):  # noqa: N802
            del registered[address]
            return success

    for name, value in calls.items():
        monkeypatch.setattr(hidden_states.torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append((stream.name, "uses", self)))
    return log, registered


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_order_of_copies(fake_cuda, count):
    """On a stand-in for CUDA whose streams do everything at once."""
    log, registered = fake_cuda
    chunks = make_chunks(count)
    hidden = PinnedHiddenStates(make_chunks(count), "cpu")
    assert list(registered.values()) == [2 * sum(chunk.numel() for chunk in chunks)]
    found = run_blocks(hidden, 3, count)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_after(chunks, 3), strict=True))
    stored = list(hidden._stored.values())
    assert log[-count:] == [("host", "waits for", event) for event in stored]
    hidden.close()
    assert registered == {}


def test_a_chunk_is_copied_to_the_device_after_it_was_copied_to_the_host(fake_cuda):
    log, _ = fake_cuda
    hidden = PinnedHiddenStates(make_chunks(3), "cpu")
    hidden.get(0)
    hidden.put(0, make_chunks(3)[0])
    first = hidden._stored[0]
    log.clear()
    hidden.get(0)
    assert log[0] == ("upload", "waits for", first)


def test_the_host_is_at_most_two_chunks_ahead(fake_cuda):
    log, _ = fake_cuda
    hidden = PinnedHiddenStates(make_chunks(4), "cpu")
    for n in range(4):
        hidden.put(n, hidden.get(n).clone())
    waits = [event for who, _, event in log if who == "host"]
    assert waits == [hidden._stored[0], hidden._stored[1]]
