"""The named sizes of the literature: "B/16" is the base model on patches of 16 x 16 pixels."""

from vit_jax.errors import UserError

# width, depth, num_heads, mlp_dim. S, Ti: DeiT (arXiv 2012.12877); B, L, H: ViT (arXiv 2010.11929, table 1).
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def preset(name: str) -> dict[str, int]:
    """patch_size, width, depth, num_heads and mlp_dim of `SIZE/PATCH`, as in "Ti/16" or "H/14"."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not (patch.isascii() and patch.isdigit() and int(patch) > 0):
        raise UserError(f"unknown preset {name!r}: use SIZE/PATCH with a size of {', '.join(SIZES)}, as in B/16 or S/4")
    width, depth, num_heads, mlp_dim = SIZES[size]
    return dict(patch_size=int(patch), width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
