"""M-RoPE positions against values worked out by hand from the papers, not against any transformers version."""

from __future__ import annotations

import numpy as np
import pytest

from qvl_pipeline.media.mrope import mrope_positions

IMAGE, VIDEO, TEXT = 91, 92, 7


def positions(ids: list[int], media: list[dict], tokens_per_second: float | None) -> list[list[int]]:
    return mrope_positions(
        np.array(ids), media, placeholder_ids=(IMAGE, VIDEO), tokens_per_second=tokens_per_second
    ).tolist()


def item(kind: str, t: int, h: int, w: int, seconds: float = 0.0) -> dict:
    return {"type": kind, "grid_t": t, "grid_h": h, "grid_w": w, "seconds_per_grid": seconds}


@pytest.mark.parametrize("tokens_per_second", [None, 2.0])
def test_text_alone_counts_up(tokens_per_second: float | None) -> None:
    assert positions([TEXT] * 3, [], tokens_per_second) == [[0, 1, 2]] * 4


@pytest.mark.parametrize("tokens_per_second", [None, 2.0])
def test_image_between_text(tokens_per_second: float | None) -> None:
    # Two tokens of text, an image of 2 rows x 3 columns after merging, one token of text after its largest position.
    ids = [TEXT, TEXT, *[IMAGE] * 6, TEXT]
    assert positions(ids, [item("image", 1, 4, 6)], tokens_per_second) == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_qwen2_5_video_spaces_frames_by_time_and_text_follows_the_last() -> None:
    # 3 temporal patches 1.5 s apart at 2 positions a second: 0, 3, 6. Text starts after 1 + 6, not inside the video.
    ids = [TEXT, *[VIDEO] * 6, TEXT]
    assert positions(ids, [item("video", 3, 2, 4, seconds=1.5)], 2.0)[1:] == [
        [0, 1, 1, 4, 4, 7, 7, 8],
        [0, 1, 1, 1, 1, 1, 1, 8],
        [0, 1, 2, 1, 2, 1, 2, 8],
    ]


def test_qwen2_5_keeps_half_second_steps() -> None:
    # A version of transformers truncated 0.5 s to 0 and put all frames at one time (huggingface/transformers#48669).
    ids = [VIDEO] * 4
    assert positions(ids, [item("video", 4, 2, 2, seconds=0.5)], 2.0)[1] == [0, 1, 2, 3]


def test_qwen3_video_is_one_block_per_temporal_patch() -> None:
    # Timestamps stand between the blocks as text; every block starts its own t = h = w.
    ids = [TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO, TEXT]
    assert positions(ids, [item("video", 2, 2, 4, seconds=1.0)], None)[1:] == [
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_adjacent_images_are_told_apart() -> None:
    ids = [*[IMAGE] * 1, *[IMAGE] * 4]
    assert positions(ids, [item("image", 1, 2, 2), item("image", 1, 4, 4)], None)[3] == [0, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("ids", "media"),
    [
        ([IMAGE] * 3, [item("image", 1, 4, 4)]),
        ([IMAGE] * 5, [item("image", 1, 4, 4)]),
        ([TEXT], [item("image", 1, 4, 4)]),
        ([IMAGE] * 4, []),
    ],
)
def test_placeholders_that_do_not_fit_are_refused(ids: list[int], media: list[dict]) -> None:
    with pytest.raises(ValueError, match="placeholder"):
        positions(ids, media, None)


def test_image_and_two_clips_with_their_own_pace() -> None:
    # Image of 2 x 2 at 1; clips of one token a temporal patch, 1 s apart (two positions), then 0.5 s apart (one).
    ids = [TEXT, *[IMAGE] * 4, TEXT, *[VIDEO] * 2, TEXT, *[VIDEO] * 2, TEXT]
    media = [item("image", 1, 4, 4), item("video", 2, 2, 2, seconds=1.0), item("video", 2, 2, 2, seconds=0.5)]
    assert positions(ids, media, 2.0)[1:] == [
        [0, 1, 1, 1, 1, 3, 4, 6, 7, 8, 9, 10],
        [0, 1, 1, 2, 2, 3, 4, 4, 7, 8, 8, 10],
        [0, 1, 2, 1, 2, 3, 4, 4, 7, 8, 8, 10],
    ]


def test_image_and_clip_of_qwen3() -> None:
    # The pace of the clip is in the timestamps, which are text: positions do not depend on it.
    ids = [TEXT, *[IMAGE] * 4, TEXT, VIDEO, TEXT, VIDEO, TEXT]
    for seconds in (0.5, 3.0):
        assert positions(ids, [item("image", 1, 4, 4), item("video", 2, 2, 2, seconds=seconds)], None)[1:] == [
            [0, 1, 1, 1, 1, 3, 4, 5, 6, 7],
            [0, 1, 1, 2, 2, 3, 4, 5, 6, 7],
            [0, 1, 2, 1, 2, 3, 4, 5, 6, 7],
        ]
