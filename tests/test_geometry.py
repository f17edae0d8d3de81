"""How many tiles and positions an image takes."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ft.errors import UserError
from llava_ft.geometry import (
    DEFAULT_GRIDS,
    ImageGeometry,
    fitted_size,
    parse_grid_pinpoints,
    parse_s2_scales,
    unpadding,
)
from tests.conftest import read_recording

FACTS = read_recording("forward/index.json")
IMAGES = read_recording("images/index.json")
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 3000), st.integers(60_000, 65_535))
SIZES = st.tuples(SIDES, SIDES)
TINY = {"image_size": 56, "tokens_per_side": 4, "tokens_per_tile": 16, "features_per_tile": 16}
LLAVA_16 = ImageGeometry(
    image_size=336,
    tokens_per_side=24,
    tokens_per_tile=576,
    features_per_tile=576,
    aspect_ratio="anyres",
    merge_type="spatial_unpad",
    grid_pinpoints=parse_grid_pinpoints("(1x2),(2x1),(2x2),(3x1),(1x3)", 336),
)
ONEVISION = ImageGeometry(
    image_size=384,
    tokens_per_side=27,
    tokens_per_tile=729,
    features_per_tile=729,
    aspect_ratio="anyres_max_9",
    merge_type="spatial_unpad",
    grid_pinpoints=parse_grid_pinpoints("(1x1),...,(6x6)", 384),
)


class TestRecordings:
    @pytest.mark.parametrize("name", IMAGES["images"])
    @pytest.mark.parametrize("side", [56, 336])
    def test_resolution_and_tiles(self, name, side):
        recorded, size_wh = IMAGES["images"][name], tuple(IMAGES["images"][name]["size"])
        pinpoints = parse_grid_pinpoints(IMAGES["grid_pinpoints"][str(side)], side)
        geometry = ImageGeometry(
            side, side // 14, (side // 14) ** 2, (side // 14) ** 2, aspect_ratio="anyres", grid_pinpoints=pinpoints
        )
        facts = recorded[f"{side}/anyres"]
        assert geometry.best_resolution(size_wh) == tuple(facts["best_resolution"])
        assert geometry.grid(size_wh) == tuple(facts["grid_shape"])
        assert geometry.num_tiles(size_wh) == facts["shape"][0]

    @pytest.mark.parametrize("facts", FACTS["unpad_image"], ids=str)
    def test_unpadding(self, facts):
        top, left = unpadding(facts["h"], facts["w"], tuple(facts["original_size"]))
        assert [facts["h"] - 2 * top, facts["w"] - 2 * left] == facts["out"]
        if facts["first"] is not None:
            assert top * facts["w"] + left == facts["first"]

    def test_the_default_grids_are_llava_1_6_s(self):
        grids = tuple((columns * 336, rows * 336) for columns, rows in DEFAULT_GRIDS)
        assert [list(size) for size in grids] == IMAGES["grid_pinpoints"]["336"]


class TestCounts:
    def test_one_tile(self):
        for ratio in ("square", "pad"):
            geometry = ImageGeometry(336, 24, 576, 576, aspect_ratio=ratio, merge_type="spatial_unpad")
            assert not geometry.needs_image_sizes
            assert geometry.num_tokens() == geometry.num_tokens((1, 9)) == geometry.max_tokens == 576
            assert geometry.num_tiles() == geometry.max_tiles == 1
            assert geometry.largest_size is None

    @pytest.mark.parametrize(
        ("size_wh", "flat", "unpad"),
        [
            ((672, 672), 5 * 576, 576 + 48 * 49),
            ((1344, 672), 3 * 576, 576 + 24 * 49),
            ((336, 1008), 4 * 576, 576 + 72 * 25),
            ((4000, 3000), 5 * 576, 576 + 36 * 49),
            ((1, 1), 3 * 576, 576 + 24 * 25),
            ((1000, 1), 4 * 576, 576),  # of a grid 24 high a picture this flat keeps no row
            ((1, 1000), 4 * 576, 576 + 72),  # and here no column: each row is a newline alone
            ((2000, 1), 3 * 576, 576),  # no resolution keeps anything of it, so the first of the smallest is taken
        ],
    )
    def test_llava_1_6(self, size_wh, flat, unpad):
        for merge_type in ("flat", "spatial"):
            assert replace(LLAVA_16, merge_type=merge_type).num_tokens(size_wh) == flat
        assert LLAVA_16.num_tokens(size_wh) == unpad

    def test_class_tokens_of_all_tiles(self):
        geometry = replace(LLAVA_16, merge_type="flat", tokens_per_side=None, tokens_per_tile=577)
        assert geometry.num_tokens((672, 672)) == 5 * 577

    def test_the_size_is_needed(self):
        for count in (LLAVA_16.num_tokens, LLAVA_16.num_tiles):
            with pytest.raises(ValueError, match="depends on the image: its size is needed"):
                count()

    def test_s2_keeps_the_count_and_takes_larger_pictures(self):
        geometry = ImageGeometry(336, 24, 576, 576, s2_scales=(336, 672, 1008))
        assert (geometry.num_tokens(), geometry.num_tiles(), geometry.input_size) == (576, 1, 1008)

    @pytest.mark.parametrize("geometry", [LLAVA_16, replace(LLAVA_16, merge_type="flat"), ONEVISION], ids=str)
    def test_the_largest_image_takes_most(self, geometry):
        assert geometry.num_tokens(geometry.largest_size) == geometry.max_tokens

        @settings(max_examples=300, deadline=None)
        @given(SIZES)
        def check(size_wh):
            assert geometry.num_tokens(size_wh) <= geometry.max_tokens
            assert geometry.num_tiles(size_wh) <= geometry.max_tiles

        check()

    @pytest.mark.parametrize("limit", [2927, 2000, 1200, 600])
    def test_the_largest_image_within_a_limit(self, limit):
        size_wh = LLAVA_16.largest_size_within(limit)
        assert limit * 0.9 < LLAVA_16.num_tokens(size_wh) <= limit
        assert LLAVA_16.largest_size_within(500) is None


class TestReduction:
    def test_llava_next_s_arithmetic(self):
        # 36 tiles of 27 x 27: times = sqrt(162 * 162 / (9 * 27 * 27)) = 2, so 81 rows and columns are left.
        assert ONEVISION.feature_grid((2304, 2304)) == (81, 81)
        assert ONEVISION.num_tokens((2304, 2304)) == 729 + 81 * 82
        # 10 tiles are sqrt(10 / 9) = 1.05 times too many along a side: left alone below 1.1.
        assert ONEVISION.feature_grid((768, 1920)) == (135, 54)

    @settings(max_examples=300, deadline=None)
    @given(SIZES)
    def test_bounds_and_continuity(self, size_wh):
        rows, columns = ONEVISION.feature_grid(size_wh)
        limit = 9 * 27 * 27
        assert rows * columns <= 1.1**2 * limit
        free = replace(ONEVISION, aspect_ratio="anyres").feature_grid(size_wh)
        if free[0] * free[1] <= limit:
            assert (rows, columns) == free
        else:
            assert rows <= free[0]
            assert columns <= free[1]
            # What is left keeps the proportions up to one row or column, and uses the room there is.
            assert abs(rows * free[1] - columns * free[0]) <= 2 * max(free)
            assert (rows + 1) * (columns + 1) >= min(limit, free[0] * free[1])

    def test_at_least_one_row_is_left(self):
        geometry = ImageGeometry(
            14, 1, 1, 1, aspect_ratio="anyres_max_1", merge_type="spatial_unpad", grid_pinpoints=((14 * 40, 14),)
        )
        assert geometry.feature_grid((560, 14)) == (1, 6)


class TestLaws:
    @settings(max_examples=300, deadline=None)
    @given(SIZES, st.sampled_from(LLAVA_16.grid_pinpoints))
    def test_unpadding_inverts_fitting(self, size_wh, target_wh):
        """What fitting covers is what unpadding keeps, up to the patch in which the picture ends."""
        fitted = fitted_size(size_wh, target_wh)
        assert fitted[0] == target_wh[0] or fitted[1] == target_wh[1]
        top, left = unpadding(target_wh[1] // 14, target_wh[0] // 14, size_wh)
        kept = (target_wh[0] - 2 * 14 * left, target_wh[1] - 2 * 14 * top)
        for kept_side, fitted_side in zip(kept, fitted, strict=True):
            assert abs(kept_side - fitted_side) < 2 * 14

    @settings(max_examples=300, deadline=None)
    @given(SIZES, st.sampled_from([LLAVA_16, ONEVISION]))
    def test_turning_an_image_turns_its_features(self, size_wh, geometry):
        turned = replace(geometry, grid_pinpoints=tuple((h, w) for w, h in geometry.grid_pinpoints))
        if size_wh[0] != size_wh[1]:
            assert geometry.feature_grid(size_wh) == turned.feature_grid(size_wh[::-1])[::-1]

    @settings(max_examples=200, deadline=None)
    @given(SIZES)
    def test_the_best_resolution_wastes_least_of_those_that_keep_most(self, size_wh):
        width, height = size_wh

        def kept(target):
            scale = min(target[0] / width, target[1] / height)
            return min(int(width * scale) * int(height * scale), width * height)

        best = LLAVA_16.best_resolution(size_wh)
        for other in LLAVA_16.grid_pinpoints:
            area_best, area = best[0] * best[1], other[0] * other[1]
            assert (kept(best), -area_best) >= (kept(other), -area)


class TestPinpoints:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("[[336, 672], [672, 336]]", ((336, 672), (672, 336))),
            ("[(336, 672), (672, 336)]", ((336, 672), (672, 336))),
            ([[336, 672]], ((336, 672),)),
            (((336, 672), (336, 672)), ((336, 672),)),
            ("(1x2), (2x1)", ((336, 672), (672, 336))),
            ("(1x1),...,(2x3)", ((336, 336), (336, 672), (336, 1008), (672, 336), (672, 672), (672, 1008))),
        ],
    )
    def test_every_form(self, value, expected):
        assert parse_grid_pinpoints(value, 336) == expected

    @pytest.mark.parametrize(
        "value",
        [
            *("", "336", "[]", "[336, 672]", "[[336]]", "[[336, 0]]", "[[336, -1]]", "[[336, 'a']]", "[[336.0, 672]]"),
            *(
                "(1x2",
                "(1x2),",
                "(0x1)",
                "(2x2),...,(1x1)",
                "(1x1),...",
                "__import__('os')",
                "[[True, 336]]",
                None,
                336,
            ),
        ],
    )
    def test_anything_else_is_refused(self, value):
        with pytest.raises(UserError, match=r"image_grid_pinpoints is .*; it must be sizes of width and height"):
            parse_grid_pinpoints(value, 336)

    @pytest.mark.parametrize("value", ["", "336,", "336;672", "0,336", "-336", "a", "336.5"])
    def test_scales(self, value):
        assert parse_s2_scales(" 672,336") == (336, 672)
        with pytest.raises(UserError, match=r"s2_scales is .* with commas, such as 336,672,1008"):
            parse_s2_scales(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aspect_ratio": "round"}, "image_aspect_ratio is 'round'; it can be 'square', 'pad', 'anyres'"),
        ({"merge_type": "unpad"}, "mm_patch_merge_type is 'unpad'; it can be 'flat', 'spatial', 'spatial_unpad'"),
        ({"aspect_ratio": "anyres"}, "image_grid_pinpoints holds nothing"),
        ({"aspect_ratio": "anyres", "grid_pinpoints": ((56, 50),)}, "holds 56 x 50.* such as 56 x 112"),
        (
            {"aspect_ratio": "anyres", "grid_pinpoints": ((56, 56),), "merge_type": "spatial"}
            | {"tokens_per_side": None, "tokens_per_tile": 17},
            "the 17 tokens of a tile form no square.*Use mm_vision_select_feature=patch",
        ),
        (
            {"aspect_ratio": "anyres_max_2", "grid_pinpoints": ((56, 56),), "merge_type": "spatial"},
            "image_aspect_ratio=anyres_max_2 .* needs mm_patch_merge_type=spatial_unpad, which is spatial",
        ),
        ({"s2_scales": (112, 224)}, "s2_scales is 112,224; .* must start with 56 .* such as 56,112,168"),
        ({"s2_scales": (56, 100)}, "s2_scales is 56,100"),
        ({"s2_scales": (56, 56)}, "s2_scales is 56,56"),
        (
            {"s2_scales": (56, 112), "aspect_ratio": "anyres", "grid_pinpoints": ((56, 56),)},
            "s2_scales=56,112 and image_aspect_ratio=anyres exclude each other",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ImageGeometry(**(TINY | fields))


def test_geometries_can_be_sent_to_workers():
    assert pickle.loads(pickle.dumps(LLAVA_16)) == LLAVA_16
