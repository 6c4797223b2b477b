"""The hidden states of a shard's chunks of calls, kept on the host between blocks.

At the size of Wan2.2-I2V-A14B one call takes 0.34 GB, so a shard does not fit on the GPU beside a block. On CUDA the
copies overlap the block's work: the host memory is page-locked, the next chunk is copied to the device while a block
works on this one, and outputs are copied back meanwhile. Elsewhere, copies are plain.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HiddenStates:
    """Hidden states [B, T, D] by index of the chunk, on the host.

    Args:
        chunks: the hidden states of every chunk, on the host. The list is emptied, so that no chunk exists twice.
        device: device of the work, to which `get` copies.
    """

    def __init__(self, chunks: list[torch.Tensor], device: torch.device | str):
        self.device = torch.device(device)
        self._chunks = chunks.copy()
        chunks.clear()

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, n: int) -> torch.Tensor:
        """Chunk n on the device."""
        return self._chunks[n].to(self.device)

    def put(self, n: int, states: torch.Tensor) -> None:
        """Replace chunk n by a tensor of the same shape and dtype, once the result of `get(n)` is no longer needed."""
        self._chunks[n] = states.cpu()

    def host(self, n: int) -> torch.Tensor:
        """Chunk n on the host."""
        return self._chunks[n]


class PinnedHiddenStates(HiddenStates):
    """Hidden states in page-locked memory, copied on two CUDA streams beside the one of the work.

    `get(n)` makes the host wait for the output of chunk n - 2. So the device always has a chunk to work on, and at most
    three inputs and two outputs are on it.
    """

    def __init__(self, chunks: list[torch.Tensor], device: torch.device | str):
        # One buffer for all chunks: page-locked memory must not overlap, and torch's own would be rounded up to a power
        # of two.
        parts = torch.empty(sum(chunk.numel() for chunk in chunks), dtype=chunks[0].dtype)
        views = [part.view(chunk.shape) for part, chunk in zip(parts.split([c.numel() for c in chunks]), chunks)]
        for view in views:
            view.copy_(chunks.pop(0))
        super().__init__(views, device)
        self._buffer = parts
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(parts.data_ptr(), parts.nbytes, 0))
        self._upload, self._download = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._fetched: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._stored: dict[int, torch.cuda.Event] = {}

    def get(self, n: int) -> torch.Tensor:
        if n - 2 in self._stored:
            self._stored[n - 2].synchronize()
        states, fetched = self._fetched.pop(n) if n in self._fetched else self._fetch(n)
        if n + 1 < len(self):
            self._fetched[n + 1] = self._fetch(n + 1)
        work = torch.cuda.current_stream(self.device)
        work.wait_event(fetched)
        states.record_stream(work)  # it was allocated on the upload stream
        return states

    def put(self, n: int, states: torch.Tensor) -> None:
        self._download.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._download):
            self._chunks[n].copy_(states, non_blocking=True)
            self._stored[n] = self._download.record_event()
        states.record_stream(self._download)

    def host(self, n: int) -> torch.Tensor:
        if n in self._stored:
            self._stored[n].synchronize()
        return super().host(n)

    def close(self) -> None:
        """Wait for the copies and release the memory; hidden states are lost."""
        torch.cuda.synchronize(self.device)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
        self._chunks.clear()

    def _fetch(self, n: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start to copy chunk n to the device, after its last copy to the host."""
        if n in self._stored:
            self._upload.wait_event(self._stored[n])
        with torch.cuda.stream(self._upload):
            return self._chunks[n].to(self.device, non_blocking=True), self._upload.record_event()


@contextmanager
def open_hidden_states(chunks: list[torch.Tensor], device: torch.device | str) -> Iterator[HiddenStates]:
    """Hidden states of a shard for work on a device.

    Args:
        chunks: the hidden states [B, T, D] of every chunk, on the host; the list is emptied.
        device: device of the work.

    Yields:
        The hidden states; on CUDA with copies that overlap the work.
    """
    if torch.device(device).type != "cuda":
        yield HiddenStates(chunks, device)
        return
    pinned = PinnedHiddenStates(chunks, device)
    try:
        yield pinned
    finally:
        pinned.close()
