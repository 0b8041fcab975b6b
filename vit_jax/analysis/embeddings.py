"""What a model has learned of places and of patches, read from its parameters. Arrays only; `figures` draws them."""

from typing import Any

import numpy as np

from vit_jax.errors import Absent
from vit_jax.models.vit import VisionTransformer, sincos2d


def position_similarity(model: VisionTransformer, params: Any, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarity of each patch's position embedding with all patches', [h, w, h, w].

    Figure 7 in the middle of the ViT paper (arXiv 2010.11929).

    Raises:
      Absent: the model adds no position to its tokens.
    """
    if model.position_embedding == "sincos2d":
        table = sincos2d(grid, model.width)
    elif model.position_embedding == "learned":
        table = np.asarray(params["Transformer"]["posembed_input"]["pos_embedding"], np.float64)[0]
        table = table[len(table) - grid[0] * grid[1] :]  # without the class token's
    else:
        raise Absent(f"the model has no table of positions (model.position_embedding={model.position_embedding})")
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    return (table @ table.T).reshape(*grid, *grid)


def patch_filters(model: VisionTransformer, params: Any, count: int = 28) -> np.ndarray:
    """The first principal components of the patch embedding's filters, [up to count, P, P, C], each of length 1.

    Figure 7 on the left of the ViT paper. Of a component and its negative the one whose largest element is positive.

    Raises:
      Absent: the embedding does not see the picture itself.
    """
    if model.stem != "patch":
        raise Absent(f"the patch embedding has no filters over pixels (model.stem={model.stem})")
    kernel = np.asarray(params["embedding"]["kernel"], np.float64)  # [P, P, C, D]
    filters = kernel.reshape(-1, kernel.shape[-1]).T  # [D, P * P * C]
    count = min(count, len(filters) - 1)  # D points span no more directions
    components = np.linalg.svd(filters - filters.mean(0), full_matrices=False)[2][:count]
    largest = np.take_along_axis(components, np.abs(components).argmax(1, keepdims=True), axis=1)
    return (components * np.sign(largest)).reshape(-1, *kernel.shape[:3])
