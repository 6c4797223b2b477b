"""Clips are what their captions say, and depend on the seed alone."""

import numpy as np
import pytest
from demo_model.clips import CAMERAS, DIRECTIONS, draw_batch, draw_spec, render_clip
from demo_model.motion import camera_of, direction_of, track
from demo_model.settings import ClipSettings
from demo_model.sprites import Assets, load_assets, save_assets


def test_same_seed_and_step_give_the_same_clips(assets: Assets, clip_settings: ClipSettings):
    captions, clips = draw_batch(3, 5, 4, assets, "training", clip_settings)
    again, copies = draw_batch(3, 5, 4, assets, "training", clip_settings)
    assert captions == again
    assert np.array_equal(clips, copies)
    assert clips.shape == (4, clip_settings.frames, clip_settings.size, clip_settings.size, 3)
    assert clips.dtype == np.uint8


def test_another_step_gives_other_clips(assets: Assets, clip_settings: ClipSettings):
    _, clips = draw_batch(3, 5, 4, assets, "training", clip_settings)
    _, others = draw_batch(3, 6, 4, assets, "training", clip_settings)
    assert not np.array_equal(clips, others)


def test_a_split_never_draws_from_another(assets: Assets, clip_settings: ClipSettings):
    random = np.random.default_rng(0)
    specs = [draw_spec(random, assets, "evaluation", clip_settings) for _ in range(50)]
    assert {spec.sprite for spec in specs} == {"disc"}
    assert {spec.photo for spec in specs} == {"three"}


def test_the_sprite_stays_inside_the_frame(assets: Assets, clip_settings: ClipSettings):
    random = np.random.default_rng(1)
    for _ in range(200):
        spec = draw_spec(random, assets, "training", clip_settings)
        step = np.array(DIRECTIONS[spec.direction])
        travel = step * clip_settings.sprite_speed * (clip_settings.frames - 1)
        for corner in (np.array(spec.sprite_corner), np.array(spec.sprite_corner) + travel):
            assert (corner >= 0).all()
            assert (corner + spec.sprite_size <= clip_settings.size).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_caption_names_the_direction_that_flow_measures(direction: str, assets: Assets, clip_settings: ClipSettings):
    random = np.random.default_rng(2)
    spec = draw_spec(random, assets, "training", clip_settings, direction=direction, camera="camera static")
    left, top = spec.sprite_corner
    box = [left, top, left + spec.sprite_size, top + spec.sprite_size]
    displacement, _, _ = track(render_clip(spec, assets, clip_settings), box)
    travel = clip_settings.sprite_speed * (clip_settings.frames - 1)
    assert f"moving {direction}," in spec.caption
    assert direction_of(displacement, travel) == direction
    assert np.abs(displacement - np.array(DIRECTIONS[direction]) * travel).max() < 3


@pytest.mark.parametrize("camera", CAMERAS)
def test_caption_names_the_camera_that_flow_measures(camera: str, assets: Assets, clip_settings: ClipSettings):
    random = np.random.default_rng(4)
    spec = draw_spec(random, assets, "training", clip_settings, direction="up", camera=camera)
    left, top = spec.sprite_corner
    box = [left, top, left + spec.sprite_size, top + spec.sprite_size]
    _, flows, backgrounds = track(render_clip(spec, assets, clip_settings), box)
    assert spec.caption.endswith(f", {camera}")
    assert camera_of(flows, backgrounds) == camera


def test_a_frozen_clip_has_no_direction():
    assert direction_of(np.array([1.0, -2.0]), travel=16) is None


def test_assets_survive_a_round_trip(assets: Assets, tmp_path):
    save_assets(assets, tmp_path / "assets.safetensors")
    loaded = load_assets(tmp_path / "assets.safetensors")
    assert loaded.splits == assets.splits
    assert loaded.sprites.keys() == assets.sprites.keys()
    assert all(np.array_equal(loaded.photos[name], photo) for name, photo in assets.photos.items())
