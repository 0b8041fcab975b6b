"""Files of named arrays, .npz and .safetensors: described first, read array by array; nothing in them is executed."""

import contextlib
import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.errors import DENIED, UserError, one_line

FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16))
DEFLATE_RATIO = 1032  # the most that zlib can expand: a member that claims more lies
NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a file: its shape, and `read`, which gives it whole, raising UserError where it is damaged."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Arrays = Mapping[str, Stored]


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """The arrays of a .npz or .safetensors file by name, and the metadata that the file carries.

    Arrays of any floating type are read as float32; they must be finite.

    Raises:
      UserError: there is no such file, it is damaged, or an array is no array of floating-point numbers.
    """
    openers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise UserError(f"{path} is no file of weights: they end in {' or '.join(openers)}")
    if not path.is_file():
        raise UserError(f"no weights file {path}" if not path.exists() else f"{path} is no file")
    with openers[path.suffix](path) as found:
        yield found


@contextlib.contextmanager
def _damage(path: pathlib.Path, name: str = "") -> Iterator[None]:
    """Whatever the libraries raise of a file is the file's fault: there are a dozen kinds."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DENIED:
            raise
        where = f"{path}, array {name!r}," if name else f"{path}"
        reason = one_line(error, 200)
        raise UserError(f"{where} cannot be read ({type(error).__name__}: {reason}): get the file again") from error


def _checked(path: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):  # no array of booleans in between
        raise UserError(f"{path}, array {name!r}, holds numbers that are not finite in float32")
    return array


def _check_dtype(path: pathlib.Path, name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise UserError(f"{path}, array {name!r}, holds {dtype}, no floating-point numbers: it is no file of weights")


# .npz: a zip of .npy files


@contextlib.contextmanager
def _open_npz(path: pathlib.Path) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        with _damage(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            arrays = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise UserError(f"{path} holds the array {name!r} twice: get the file again")
                arrays[name] = _npz_array(path, archive, member, name)
            metadata = _json(archive.comment)
        yield arrays, metadata


def _npz_array(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Stored:
    most = member.compress_size * (DEFLATE_RATIO if member.compress_type == zipfile.ZIP_DEFLATED else 1)
    if member.compress_type not in NPZ_METHODS or member.file_size > most or most > path.stat().st_size * DEFLATE_RATIO:
        raise ValueError(f"{name} claims a size or compression that no .npz has")
    with archive.open(member) as file:
        shape, dtype = _read_header(file)
        header = file.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path}, array {name!r}, holds pickled objects, which are never loaded: it is no file of weights"
        )
    raw = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None  # how NumPy writes bfloat16
    _check_dtype(path, name, np.dtype(ml_dtypes.bfloat16) if raw else dtype.newbyteorder("="))
    if header + dtype.itemsize * int(np.prod(shape, dtype=object)) != member.file_size:
        raise ValueError(f"{name} is not as long as its shape {shape} says")

    def read() -> np.ndarray:
        with _damage(path, name), archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            return _checked(path, name, array.view(ml_dtypes.bfloat16) if raw else array)

    return Stored(shape, read)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = headers[version](file)
    if any(n < 0 for n in shape):
        raise ValueError(f"a shape {shape}")
    return shape, dtype


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes an .npz; the metadata goes into the zip's comment, which other readers pass over."""
    np.savez(file, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = json.dumps(metadata).encode()


# .safetensors


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        with _damage(path):
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            arrays = {name: _safetensor(path, file, name) for name in file.keys()}
            metadata = _json((file.metadata() or {}).get("vit_jax", ""))
        yield arrays, metadata


def _safetensor(path: pathlib.Path, file: Any, name: str) -> Stored:
    described = file.get_slice(name)
    dtypes = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}
    kind = described.get_dtype()
    _check_dtype(path, name, np.dtype(dtypes[kind]) if kind in dtypes else kind)

    def read() -> np.ndarray:
        with _damage(path, name):
            return _checked(path, name, file.get_tensor(name))

    return Stored(tuple(described.get_shape()), read)


def write_safetensors(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes a .safetensors file that other libraries take for PyTorch's, the metadata as JSON in its header."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    file.write(safetensors.numpy.save(contiguous, {"format": "pt", "vit_jax": json.dumps(metadata)}))


def _json(text: bytes | str) -> dict[str, Any]:
    """What was written as metadata; nothing where it is another program's."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
