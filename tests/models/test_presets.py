import pytest

from vit_jax.errors import UserError
from vit_jax.models.presets import HYBRIDS, SIZES, preset, size_named


def test_sizes_of_the_papers():
    assert preset("B/16") == dict(patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072)
    assert preset("Ti/16") == dict(patch_size=16, width=192, depth=12, num_heads=3, mlp_dim=768)
    assert preset("H/14") == dict(patch_size=14, width=1280, depth=32, num_heads=16, mlp_dim=5120)
    assert [preset(name)["patch_size"] for name in ("S/4", "L/32", "Ti/1")] == [4, 32, 1]


def test_hybrids_are_their_vit_behind_a_resnet():
    assert preset("R50+B/16") == preset("B/16") | dict(stem="resnet", resnet_blocks=(3, 4, 9))
    assert preset("R50+L/32") == preset("L/32") | dict(stem="resnet", resnet_blocks=(3, 4, 6, 3))
    assert preset("R26+S/32") == preset("S/32") | dict(stem="resnet", resnet_blocks=(2, 2, 2, 2))
    assert preset("R26+B/32") == preset("B/32") | dict(stem="resnet", resnet_blocks=(2, 2, 2, 2))
    assert preset("R+Ti/16") == preset("Ti/32") | dict(stem="resnet", resnet_blocks=())  # 8x8 places, 4 pixels each


def test_numbers_have_a_name():
    for size, (width, depth, num_heads, mlp_dim) in SIZES.items():
        assert size_named(width, depth, num_heads, mlp_dim) == size_named(width, depth, None, mlp_dim) == size
        assert size_named(width, depth, 2 * num_heads, mlp_dim) is None
        assert size_named(width + 1, depth, None, mlp_dim) is None
        assert size_named(width, depth + 1, None, mlp_dim) is None
        assert size_named(width, depth, None, mlp_dim + 1) is None


@pytest.mark.parametrize("size", SIZES)
def test_heads_divide_the_width(size):
    values = preset(f"{size}/16")
    assert values["width"] % values["num_heads"] == 0


@pytest.mark.parametrize(
    "name",
    ["", "B", "B/", "B/0", "B/-4", "B/1.5", "B/²", "b/16", "XL/16", "/16", "B/16/2", "R50+B/32", "R50+B", "R+/16"],
)
def test_unknown_names_are_told_the_known_ones(name):
    with pytest.raises(UserError, match="Ti, S, B, L, H") as error:
        preset(name)
    assert repr(name) in str(error.value) and all(hybrid in str(error.value) for hybrid in HYBRIDS)
