"""The named sizes of the literature: "B/16" is the base model on patches of 16 x 16 pixels."""

from typing import Any

from vit_jax.errors import UserError

# width, depth, num_heads, mlp_dim. S, Ti: DeiT (arXiv 2012.12877); B, L, H: ViT (arXiv 2010.11929, table 1).
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}
# The ViT and the units in each stage of the ResNet before it (arXiv 2010.11929 and 2106.10270).
HYBRIDS = {
    "R+Ti/16": ("Ti/32", ()),  # its name says 16, but its patches are 8x8 places behind a root that shrinks 4 times
    "R26+S/32": ("S/32", (2, 2, 2, 2)),
    "R26+B/32": ("B/32", (2, 2, 2, 2)),
    "R50+B/16": ("B/16", (3, 4, 9)),  # no fourth stage, which would make it 32: its units are in the third
    "R50+L/32": ("L/32", (3, 4, 6, 3)),
}


def preset(name: str) -> dict[str, Any]:
    """patch_size, width, depth, num_heads and mlp_dim of `SIZE/PATCH`, as in "Ti/16" or "H/14".

    Of a published hybrid, as "R50+B/16", also stem and resnet_blocks.

    Raises:
      UserError: no such name.
    """
    vit, blocks = HYBRIDS.get(name, (name, None))
    size, _, patch = vit.partition("/")
    if size not in SIZES or not (patch.isascii() and patch.isdigit() and int(patch) > 0):
        raise UserError(
            f"unknown preset {name!r}: use SIZE/PATCH with a size of {', '.join(SIZES)}, as in B/16 or S/4, "
            f"or a hybrid of {', '.join(HYBRIDS)}"
        )
    width, depth, num_heads, mlp_dim = SIZES[size]
    fields = dict(patch_size=int(patch), width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
    return fields if blocks is None else fields | dict(stem="resnet", resnet_blocks=blocks)


def size_named(width: int, depth: int, num_heads: int | None, mlp_dim: int) -> str | None:
    """The size, as "B", that has these numbers; None where none has. `num_heads` None: not known."""
    for size, (*numbers, heads, hidden) in SIZES.items():
        if (*numbers, hidden) == (width, depth, mlp_dim) and num_heads in (None, heads):
            return size
    return None
