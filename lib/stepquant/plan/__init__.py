"""What a run would take, before it runs: bytes from shapes, work from shapes, time from measured rates and public figures."""
