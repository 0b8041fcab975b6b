"""Fabricated weights, random and not zero in every array, and files of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vit_jax.models.vit import VisionTransformer


class Fabric:
    """Models with random weights; `params` are {path: array}, as an official file holds them."""

    def model(self, **fields):
        small = dict(num_classes=5, patch_size=4, width=12, depth=2, num_heads=3, mlp_dim=20)
        return VisionTransformer(**small | fields)

    def like(self, model, size):
        """{path: ShapeDtypeStruct with a sharding} of a model on pictures of `size`, a side or two."""
        height, width = size if isinstance(size, tuple) else (size, size)
        pictures = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), pictures)["params"]
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        flat = traverse_util.flatten_dict(tree, sep="/")
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in flat.items()}

    def params(self, model, size, seed=0):
        rng = np.random.default_rng(seed)

        def fill(name, leaf):
            if name.endswith("kernel"):
                fan_in = math.prod(leaf.shape[:-1]) if "out/" in name or len(leaf.shape) == 4 else leaf.shape[0]
                return rng.normal(scale=fan_in**-0.5, size=leaf.shape).astype(np.float32)
            return rng.normal(loc=float("scale" in name), scale=0.2, size=leaf.shape).astype(np.float32)

        return {name: fill(name, leaf) for name, leaf in self.like(model, size).items()}

    def logits(self, model, params, pictures):
        tree = traverse_util.unflatten_dict(params, sep="/")
        return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, train=False))(tree, pictures))

    def pictures(self, size, count=2, seed=1):
        height, width = size if isinstance(size, tuple) else (size, size)
        return np.random.default_rng(seed).normal(size=(count, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def fabric():
    return Fabric()
