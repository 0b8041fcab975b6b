"""Brings pictures that vit_jax drew into the documentation, in 128 colours: a third of the size.

python docs/pictures/make.py runs/digits/curves.png curves.png ...
"""

import pathlib
import sys

from PIL import Image

for source, name in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    Image.open(source).convert("RGB").quantize(128).save(pathlib.Path(__file__).parent / name, optimize=True)
