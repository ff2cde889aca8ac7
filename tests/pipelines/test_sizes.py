import pytest

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.sizes import (
    ASPECTS,
    RESOLUTIONS,
    Size,
    adaptive_size,
    check_frames,
    check_size,
    latent_frames,
    parse_size,
)


def test_named_sizes_are_the_published_ones() -> None:
    assert parse_size("480p") == Size(832, 480)
    assert parse_size("480") == Size(768, 432)  # another row, not another spelling
    assert parse_size("720p", "9:16") == Size(720, 1280)
    assert parse_size("720", "4:3") == Size(960, 704)
    assert parse_size("512", "1:1") == Size(512, 512)


@pytest.mark.parametrize("name", RESOLUTIONS)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_every_named_size_has_its_aspect_and_fits(name: str, aspect: str) -> None:
    size = check_size(parse_size(name, aspect), 16)
    wanted = float(aspect.split(":")[0]) / float(aspect.split(":")[1])
    # 640x512 for 4:3 is the farthest the published table goes, 6.25 %
    assert size.width / size.height == pytest.approx(wanted, rel=0.07)


@pytest.mark.parametrize("text", ["480P", "832", "832x", "x480", "832x-480", "8.5x4", "", "832x480x3"])
def test_a_size_that_is_none_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(UserError, match="480p, 720p"):
        parse_size(text)


def test_an_unknown_aspect_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="16:9, 9:16"):
        parse_size("480p", "2:1")


def test_a_size_that_does_not_divide_names_the_nearest_that_do() -> None:
    with pytest.raises(UserError, match="832x480, 848x496"):
        check_size(Size(833, 481), 16)
    with pytest.raises(UserError, match="1280x704, 1280x736"):  # TI2V-5B: 720 rows are no multiple of 32
        check_size(Size(1280, 720), 32)
    with pytest.raises(UserError, match="16x16"):
        check_size(Size(0, 3), 16)


def test_frame_counts_are_one_more_than_a_multiple_of_four() -> None:
    assert [f for f in range(1, 20) if not _refused(f)] == [1, 5, 9, 13, 17]
    with pytest.raises(UserError, match="77, 81"):
        check_frames(80)
    with pytest.raises(UserError, match=r"nearest: 1\."):
        check_frames(0)
    assert [latent_frames(f) for f in (1, 5, 81, 121)] == [1, 2, 21, 31]


def _refused(frames: int) -> bool:
    try:
        check_frames(frames)
    except UserError:
        return True
    return False


def test_adaptive_size_keeps_area_and_shape_within_rounding() -> None:
    area = Size(1280, 720)
    for image in (Size(1000, 1000), Size(300, 1700), Size(1920, 1080), Size(641, 479)):
        size = adaptive_size(area, image, 16)
        assert size.width % 16 == size.height % 16 == 0
        # each side is off by half a multiple, 8, at most: 2 % of the shortest, 403
        assert size.width * size.height == pytest.approx(area.width * area.height, rel=0.04)
        assert size.width / size.height == pytest.approx(image.width / image.height, rel=0.04)


def test_adaptive_size_rounds_half_to_even_as_the_reference_does() -> None:
    # sqrt(40 * 40) / 16 = 2.5 -> 2
    assert adaptive_size(Size(40, 40), Size(7, 7), 16) == Size(32, 32)
