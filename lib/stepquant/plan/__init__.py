"""What a run would take, before it runs: bytes and operations from shapes, time from measured and public rates."""
