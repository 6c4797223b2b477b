import numpy as np
import pytest

from stepquant.errors import UserError
from stepquant.evaluate.temporal import motion, temporal_flickering


def greys(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    "values, flickering, moved",
    [
        ((100, 100, 100), 1, 0),  # frozen: perfect flicker, and motion gives it away
        ((0, 255, 0), 0, 127.5),  # black and white by turns: (255 - 255) / 255; |255 - 0| and |0 - 0|
        ((0, 51, 102, 153), 0.8, 102),  # a steady ramp: (255 - 51) / 255; (51 + 102 + 153) / 3
        ((200, 190), 245 / 255, 10),  # falling values do not wrap around
    ],
)
def test_known_sequences(values, flickering, moved):
    assert temporal_flickering(greys(*values)) == pytest.approx(flickering)
    assert motion(greys(*values)) == pytest.approx(moved)


def test_part_of_the_picture_counts_by_its_share():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    video[1, :2] = 100  # half of the pixels move by 100
    assert temporal_flickering(video) == pytest.approx((255 - 50) / 255)
    assert motion(video) == pytest.approx(50)


@pytest.mark.parametrize("metric", [temporal_flickering, motion])
def test_one_frame_has_no_time(metric):
    with pytest.raises(UserError, match="set sampling.num_frames to at least 2"):
        metric(greys(7))
