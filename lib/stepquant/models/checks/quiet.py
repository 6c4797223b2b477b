"""Silences libraries while their classes are asked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of diffusers and transformers; the checks say what is wrong."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        import transformers

        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        yield
        if bars:
            transformers.utils.logging.enable_progress_bar()
    finally:
        logging.disable(level)
