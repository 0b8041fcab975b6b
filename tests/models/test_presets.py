import pytest

from vit_jax.errors import UserError
from vit_jax.models.presets import SIZES, preset


def test_sizes_of_the_papers():
    assert preset("B/16") == dict(patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072)
    assert preset("Ti/16") == dict(patch_size=16, width=192, depth=12, num_heads=3, mlp_dim=768)
    assert preset("H/14") == dict(patch_size=14, width=1280, depth=32, num_heads=16, mlp_dim=5120)
    assert preset("S/4")["patch_size"] == 4 and preset("L/32")["patch_size"] == 32


@pytest.mark.parametrize("size", SIZES)
def test_heads_divide_the_width(size):
    values = preset(f"{size}/16")
    assert values["width"] % values["num_heads"] == 0


@pytest.mark.parametrize("name", ["", "B", "B/", "B/0", "B/-4", "B/1.5", "B/²", "b/16", "XL/16", "/16", "B/16/2"])
def test_unknown_names_are_told_the_known_ones(name):
    with pytest.raises(UserError, match="Ti, S, B, L, H"):
        preset(name)
