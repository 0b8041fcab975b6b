"""Files of arrays: what is written is read, and whatever is wrong with a file is said in one line."""

import errno
import io
import pathlib
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_jax.errors import UserError
from vit_jax.models import archives

ARRAYS = {
    "embedding/kernel": np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2),
    "cls": np.ones((1, 1, 2), np.float32),
}
WRITERS = {".npz": archives.write_npz, ".safetensors": archives.write_safetensors}


def read(path):
    with archives.opened(path) as (arrays, metadata):
        return {name: stored.read() for name, stored in arrays.items()}, metadata


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def headed(header, data=b"\0" * 8):
    """The bytes of a .npy whose header says what it wants."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def zipped(method=zipfile.ZIP_STORED, **members):
    """The bytes of a .npz of those .npy files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name + ".npy", data)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_is_written_is_read_bit_for_bit(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    metadata = {"gelu": "exact", "norm_epsilon": 1e-12, "mean": [0.25, 0.5]}
    with path.open("wb+") as file:
        WRITERS[suffix](file, ARRAYS | {"strided": ARRAYS["embedding/kernel"].transpose(3, 2, 0, 1)}, metadata)
    found, said = read(path)
    assert said == metadata
    assert found.keys() == {*ARRAYS, "strided"}
    np.testing.assert_array_equal(found["strided"], ARRAYS["embedding/kernel"].transpose(3, 2, 0, 1))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.dtype(">f4")])
def test_every_floating_type_is_read_as_float32(tmp_path, dtype):
    values = np.array([[1.5, -2.25], [0.0, 3.0]]).astype(dtype)  # as bfloat16, NumPy writes two raw bytes each
    found, _ = read(npz(tmp_path / "a.npz", x=values))
    assert found["x"].dtype == np.float32
    np.testing.assert_array_equal(found["x"], [[1.5, -2.25], [0.0, 3.0]])


def test_bfloat16_safetensors(tmp_path):
    with (tmp_path / "a.safetensors").open("wb+") as file:
        archives.write_safetensors(file, {"x": np.array([1.5, -2.0], ml_dtypes.bfloat16)}, {})
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors")[0]["x"], np.float32([1.5, -2.0]))


def test_other_programs_metadata_is_none(tmp_path):
    with zipfile.ZipFile(npz(tmp_path / "a.npz", x=np.ones(1, np.float32)), "a") as archive:
        archive.comment = b"made by hand"
    assert read(tmp_path / "a.npz")[1] == {}


def test_arrays_are_read_one_at_a_time(tmp_path):
    size = 2**20
    path = npz(tmp_path / "a.npz", **{f"x{i}": np.full(size, i, np.float32) for i in range(8)})
    with archives.opened(path) as (arrays, _):
        tracemalloc.start()
        total = sum(float(stored.read()[0]) for stored in arrays.values())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == sum(range(8))
    assert peak < 1.3 * 4 * size, f"{peak / (4 * size):.1f} arrays at once"


def bad_files(folder):
    """Name → (file, words of its message)."""
    whole = npz(folder / "whole.npz", x=np.ones((64, 64), np.float32)).read_bytes()
    tensors = io.BytesIO()
    archives.write_safetensors(tensors, {"x": np.ones(64, np.float32)}, {})
    bits = bytearray(whole)
    bits[len(whole) // 2] ^= 0xFF

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile tells of the name that is there twice
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for _ in range(2):
                archive.writestr("x.npy", headed("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"))
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}"
    nan = np.array([1.0, np.nan], np.float32)
    npz(folder / "ints.npz", x=np.arange(3))
    npz(folder / "nan.npz", x=nan)
    npz(folder / "inf.npz", x=np.array([np.inf, 1]))
    npz(folder / "text.npz", x=np.array(["a"]))
    npz(folder / "complex.npz", x=np.ones(2, np.complex64))
    np.savez(folder / "pickle.npz", x=np.array([{"a": 1}], dtype=object))
    made = {
        "truncated.npz": (whole[: len(whole) // 2], "cannot be read"),
        "empty.npz": (b"", "cannot be read"),
        "no zip.npz": (b"hello" * 100, "cannot be read"),
        "pickled.npz": (pickle.dumps({"a": 1}), "cannot be read"),
        "flipped.npz": (bytes(bits), "cannot be read"),
        "no array.npz": (zipped(x=b"hello"), "cannot be read"),
        "longer.npz": (zipped(x=headed(huge)), "shape"),
        "negative.npz": (zipped(x=headed(huge.replace("(1000000,", "(-1,"))), "shape"),
        "code.npz": (zipped(x=headed("__import__('os').abort()")), "cannot be read"),
        "lzma.npz": (zipped(zipfile.ZIP_LZMA, x=headed(huge)), "compression"),
        "twice.npz": (buffer.getvalue(), "twice"),
        "truncated.safetensors": (tensors.getvalue()[:-5], "cannot be read"),
        "empty.safetensors": (b"", "cannot be read"),
        "zeros.safetensors": (b"\0" * 64, "cannot be read"),
        "weights.bin": (whole, ".npz or .safetensors"),
    }
    for name, (data, _) in made.items():
        (folder / name).write_bytes(data)
    (folder / "folder.npz").mkdir()
    words = {name: text for name, (_, text) in made.items()}
    words |= {"ints.npz": "int64", "text.npz": "<U1", "complex.npz": "complex64", "pickle.npz": "pickled"}
    return words | {"nan.npz": "finite", "inf.npz": "finite", "missing.npz": "no weights file", "folder.npz": "no file"}


def test_bad_files_are_named_in_one_line(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        message = str(caught.value)
        assert words in message and name in message and "\n" not in message, (name, message)


@pytest.mark.parametrize("denied", [PermissionError(errno.EACCES, "denied"), OSError(errno.EIO, "broken")])
def test_only_a_file_that_can_be_read_is_called_damaged(tmp_path, monkeypatch, denied):
    path = npz(tmp_path / "a.npz", x=np.ones(1, np.float32))

    def refuse(*_):
        raise denied

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    expected = PermissionError if denied.errno == errno.EACCES else UserError
    with pytest.raises(expected):
        read(path)


@pytest.mark.filterwarnings("error")
def test_numbers_too_large_for_float32_are_an_error_and_no_warning(tmp_path):
    with pytest.raises(UserError, match="not finite in float32"):
        read(npz(tmp_path / "a.npz", x=np.array([1e300])))


def test_a_file_that_changes_while_it_is_open_executes_nothing(tmp_path):
    path, mark = npz(tmp_path / "a.npz", x=np.ones(100_000, np.float32)), tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (mark,)

    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([Touch()], object), allow_pickle=True)
    with archives.opened(path) as (arrays, _):
        path.write_bytes(zipped(x=pickled.getvalue().ljust(zipfile.ZipFile(path).getinfo("x.npy").file_size, b"\0")))
        with pytest.raises(UserError, match="cannot be read"):
            arrays["x"].read()
    assert not mark.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for suffix, write in WRITERS.items():
        with (folder / f"a{suffix}").open("wb+") as file:
            write(file, ARRAYS | {"large": np.ones((200, 100), np.float32)}, {"gelu": "tanh"})
    np.savez_compressed(folder / "b.npz", **ARRAYS)
    return folder


changes = st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=0, max_size=12)), min_size=1, max_size=6)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.npz", "b.npz", "a.safetensors"]), changes=changes, cut=st.integers(0, 40))
def test_a_mutated_file_is_read_or_refused_and_memory_stays_bounded(whole, tmp_path, name, changes, cut):
    """Only UserError comes out, whatever is overwritten, inserted at the end of an archive, or cut off."""
    data = bytearray((whole / name).read_bytes())
    for place, piece in changes:
        start = (
            place % len(data) if place % 3 else len(data) - 1 - place % 600 % len(data)
        )  # the directory is at the end
        data[start : start + len(piece)] = piece
    path = pathlib.Path(tmp_path / name)
    path.write_bytes(data[: len(data) - cut] if cut % 4 == 0 else data)
    tracemalloc.start()
    try:
        read(path)
    except UserError as error:
        assert name in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 * 2**20
