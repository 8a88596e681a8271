"""`fastxent evaluate` on files that are wrong, or mean harm: one line that says what, and exit code 2."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastxent import cli
from fastxent._cli import evaluate as evaluation
from fastxent._cli import files
from tests.helpers.cases import BFLOAT16, make_case, make_rng
from tests.helpers.cli_cases import assert_matches, error_of, evaluate, expected, save


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def header_bytes(shape: object, descr: object = "<f4", fortran: object = False) -> bytes:
    """A .npy header of version 1.0 that says whatever it is told to say."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


GOOD = header_bytes((2, 3)) + bytes(24)  # zeros, (2, 3), float32

HOSTILE = {  # bytes of LOGITS, words of the message
    "empty": (b"", "is empty: 0 bytes"),
    "text": (b"1.0 2.0 3.0\n", "is not a .npy or .npz file"),
    "magic only": (GOOD[:6], "cannot be read"),
    "version only": (GOOD[:8], "cannot be read"),
    "half a header": (GOOD[:40], "cannot be read"),
    "header only": (header_bytes((2, 3)), "is cut short"),
    "one byte short": (GOOD[:-1], "is cut short"),
    "version 3": (GOOD.replace(b"\x01\x00", b"\x03\x00", 1), "format (3, 0)"),
    "version 77": (GOOD.replace(b"\x01\x00", b"\x4d\x07", 1), "format (77, 7)"),
    "header not a dictionary": (GOOD.replace(b"{", b"["), "cannot be read"),
    "header that calls": (header_bytes((2, 3)).replace(b"False", b"exit("), "cannot be read"),
    "deep header": (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "cannot be read"),
    "deep minus": (b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 9_999 + b"1", "cannot be read"),
    "header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 30_000, "cannot be read"),
    "header of 15 KB": (b"\x93NUMPY\x01\x00\x98\x3a" + b" " * 30_000, "cannot be read"),
    "huge shape": (header_bytes((1 << 40, 1 << 10)) + bytes(24), "is cut short"),
    "overflowing shape": (header_bytes((1 << 62, 1 << 62)) + bytes(24), "is cut short"),
    "overflow to zero": (header_bytes((1 << 70, 0)) + bytes(24), "logits.npy"),
    "negative shape": (header_bytes((-2, -3)) + bytes(24), "damaged header"),
    "text shape": (header_bytes(("2", "3")) + bytes(24), "cannot be read"),
    "too many axes": (header_bytes((1,) * 100) + bytes(24), "logits.npy"),
    "no rows": (header_bytes((0, 3)), "is empty: shape (0, 3)"),
    "no classes": (header_bytes((2, 0)), "is empty: shape (2, 0)"),
    "scalar": (header_bytes(()) + bytes(4), "axis -1 does not exist"),
    "unknown type": (header_bytes((2, 3), "<q9") + bytes(24), "cannot be read"),
    "pickled objects": (header_bytes((2, 3), "|O") + pickle.dumps([None] * 6), "pickled Python objects"),
    "structured": (header_bytes((2,), [("a", "<f4")]) + bytes(24), "logits are float16, bfloat16"),
    "objects in a structure": (header_bytes((2,), [("a", "|O")]) + bytes(24), "pickled Python objects"),
    "subarray": (header_bytes((2,), ("<f4", (3,))) + bytes(24), "logits"),
    "integers": (header_bytes((2, 3), "<i4") + bytes(24), "holds int32: logits are float16"),
    "booleans": (header_bytes((2, 3), "|b1") + bytes(24), "holds bool"),
    "complex": (header_bytes((2, 3), "<c8") + bytes(48), "holds complex64"),
    "long double": (header_bytes((2, 3), "<f16") + bytes(96), "logits.npy"),
    "strings": (header_bytes((2, 3), "<U1") + bytes(24), "holds <U1"),
    "dates": (header_bytes((2, 3), "<M8[s]") + bytes(48), "holds datetime64"),
    "nothing": (header_bytes((2, 3), "|V0") + bytes(24), "holds |V0"),
    "three bytes": (header_bytes((2, 3), "|V3") + bytes(24), "holds |V3"),
    "pickle": (pickle.dumps(np.zeros((2, 3))), "a pickle? they are never loaded"),
    "zip of nothing": (b"PK\x05\x06" + bytes(18), "not just one array but none"),
    "half a zip": (b"PK\x03\x04" + bytes(100), "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_logits(tmp_path, capsys, name):
    content, words = HOSTILE[name]
    (tmp_path / "logits.npy").write_bytes(content)
    assert words in error_of(capsys, tmp_path / "logits.npy", *save(tmp_path, t=np.zeros(2, int)))
    # As targets and as weights the same bytes are refused as well.
    files = save(tmp_path, x=np.zeros((5, 7)), t=np.zeros(5, int))
    error_of(capsys, files[0], tmp_path / "logits.npy")
    error_of(capsys, *files, "--weight", tmp_path / "logits.npy")
    # And inside an archive, packed or not.
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "logits.npz", "w", packing) as archive:
            archive.writestr("x.npy", content)
        error_of(capsys, tmp_path / "logits.npz", files[1])


def test_the_good_file_is_good(tmp_path, capsys):
    (tmp_path / "logits.npy").write_bytes(GOOD)
    files = save(tmp_path, t=np.zeros(2, int))
    assert evaluate(capsys, tmp_path / "logits.npy", *files)["loss"] == pytest.approx(math.log(3))


def test_nothing_is_unpickled(tmp_path, capsys):
    trap = Trap(tmp_path / "sprung")
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(trap))
    np.save(tmp_path / "object.npy", np.array([trap, trap]), allow_pickle=True)
    np.savez(tmp_path / "object.npz", np.array([trap, trap]))
    (good,) = save(tmp_path, x=np.zeros((2, 3)))
    for name in ("raw.npy", "object.npy", "object.npz"):
        assert "never loaded" in error_of(capsys, tmp_path / name, good)
        assert "never loaded" in error_of(capsys, good, tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "raw.npy").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (np.array([0, 1, 3, 1, 4]), "target[2] = 3 is outside [0, 3); 2 of 5 rows are out of range"),
        (np.array([0, 1, -1, 1, 0]), "target[2] = -1 is outside [0, 3); 1 of 5 rows is out of range"),
        (np.array([0, 1, 0, 1, 200], np.uint8), "target[4] = 200 is outside"),
        (np.array([0, 1, 0, 1, -100 % 2**64], np.uint64), "target[4] = 18446744073709551516 is outside"),
        (np.array([0, 1, 0, 1, -(2**63)]), "target[4] = -9223372036854775808 is outside"),
        (np.zeros(4, int), "holds int64 of shape (4,); for logits of shape (5, 3) with classes on axis 1"),
        (np.zeros((5, 1), int), "targets are integers of shape (5,)"),
        (np.zeros((5, 3), int), "or class probabilities of shape (5, 3)"),
        (np.zeros(5), "holds float64 of shape (5,)"),
        (np.zeros(5, bool), "holds bool: targets are integers"),
        (np.zeros(5, complex), "holds complex128: targets are integers"),
        (np.array(list("abcde")), "holds <U1: targets are integers"),
    ],
)
def test_hostile_targets(tmp_path, capsys, monkeypatch, target, words):
    files = save(tmp_path, logits=np.zeros((5, 3)), t=target)
    assert words in error_of(capsys, *files)
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 2)  # rows are counted through the file, not the block
    assert words in error_of(capsys, *files)


def test_a_bad_target_in_more_dimensions_is_named_by_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 2)
    target = np.zeros((4, 5), int)
    target[2, 3] = 7
    files = save(tmp_path, logits=np.zeros((4, 6, 5)), t=target)
    assert "target[2, 3] = 7 is outside [0, 6)" in error_of(capsys, *files, "--axis", 1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--axis", "2"], "axis 2 does not exist"),
        (["--axis", "-3"], "axis -3 does not exist"),
        (["--label-smoothing", "1.5"], "label_smoothing"),
        (["--label-smoothing", "-0.1"], "label_smoothing"),
        (["--label-smoothing", "nan"], "label_smoothing"),
    ],
)
def test_wrong_options(tmp_path, capsys, args, words):
    files = save(tmp_path, logits=np.zeros((5, 3)), t=np.zeros(5, int))
    assert words in error_of(capsys, *files, *args)


def test_an_ignored_class_makes_no_sense_with_probabilities(tmp_path, capsys):
    files = save(tmp_path, logits=np.zeros((5, 3)), t=np.full((5, 3), 1 / 3))
    assert "ignore_index" in error_of(capsys, *files, "--ignore-index", 1)


def test_an_ignore_index_past_64_bits_ignores_nothing_or_is_refused(tmp_path, capsys):
    files = save(tmp_path, logits=np.zeros((5, 3)), t=np.zeros(5, int))
    assert cli.main(["evaluate", *files, "--ignore-index", str(10**30)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("weight", [np.ones(2), np.ones((1, 3)), np.ones(3, bool), np.array(1.0)])
def test_wrong_weights(tmp_path, capsys, weight):
    files = save(tmp_path, logits=np.zeros((5, 3)), t=np.zeros(5, int))
    assert "weight.npy" in error_of(capsys, *files, "--weight", *save(tmp_path, weight=weight))


def test_swapped_files(tmp_path, capsys):
    logits, target = save(tmp_path, logits=np.zeros((5, 3)), t=np.zeros(5, int))
    assert "LOGITS and TARGETS swapped?" in error_of(capsys, target, logits)


@pytest.mark.skipif(os.name != "posix", reason="special files of POSIX systems")
def test_things_that_are_no_files(tmp_path, capsys):
    (good,) = save(tmp_path, t=np.zeros(5, int))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")  # must not wait for somebody to write
    assert "is not a regular file" in error_of(capsys, tmp_path, good)
    assert "is not a regular file" in error_of(capsys, tmp_path / "fifo", good)
    assert "is not a regular file" in error_of(capsys, "/dev/zero", good)
    assert "cannot be read" in error_of(capsys, tmp_path / "loop", good)
    assert "cannot be read" in error_of(capsys, "", good)
    assert "cannot be read" in error_of(capsys, "\0", good)
    assert "cannot be read" in error_of(capsys, "x" * 5000, good)
    assert "No such file" in error_of(capsys, tmp_path / "no.npz:key", good)
    assert "\\x1b[31m\\udc80" in error_of(capsys, "\x1b[31m\udc80", good)


def test_archives(tmp_path, capsys):
    (good,) = save(tmp_path, t=np.zeros(5, int))
    file = tmp_path / "many.npz"
    np.savez(file, **{f"a{i}": np.zeros((5, 3)) for i in range(20)})
    assert "holds not just one array but a0, a1," in error_of(capsys, file, good)
    assert "holds no array 'b' but a0, a1," in error_of(capsys, f"{file}:b", good)
    assert evaluate(capsys, f"{file}:a7", good)["rows"] == 5


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_found_out(tmp_path, capsys, packing):
    (good,) = save(tmp_path, t=np.zeros(100, int))
    file = tmp_path / "x.npz"
    stream = io.BytesIO()
    np.save(stream, make_rng("damage").standard_normal((100, 30)))
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("x.npy", stream.getvalue())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "cannot be read" in error_of(capsys, file, good)


def test_scattered_rows_in_a_large_archive_are_refused(tmp_path, capsys, monkeypatch):
    (good,) = save(tmp_path, t=np.zeros(5, int))
    np.savez(tmp_path / "x.npz", np.zeros((5, 3), order="F"))
    assert evaluate(capsys, tmp_path / "x.npz", good)["rows"] == 5
    monkeypatch.setattr(files, "WHOLE_BYTES", 100)
    assert "use a .npy file" in error_of(capsys, tmp_path / "x.npz", good)


def test_bfloat16_is_read_as_numpy_saves_it(tmp_path, capsys):
    case = make_case(BFLOAT16, (40, 9))
    np.save(tmp_path / "x.npy", case.logits)
    assert np.load(tmp_path / "x.npy").dtype == "|V2"  # NumPy forgets what it was
    result = evaluate(capsys, tmp_path / "x.npy", *save(tmp_path, t=case.target))
    assert result["dtype"] == "bfloat16"
    assert_matches(result, expected(case.logits.astype(np.float32), case.target))
    assert case.logits.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_flipped_bytes_give_a_result_or_one_line(tmp_path, capsys, kind):
    """A plain fuzzer: a few bytes of the file changed, or its end cut off."""
    rng = make_rng("flip", kind)
    (good,) = save(tmp_path, t=np.zeros(20, int))
    stream = io.BytesIO()
    x = rng.standard_normal((20, 10)).astype(np.float32)
    {"npy": np.save, "npz": np.savez, "compressed": np.savez_compressed}[kind](stream, x)
    content, refused = stream.getvalue(), 0
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        where = rng.integers(0, min(len(content), 160) if rng.random() < 0.7 else len(content), rng.integers(1, 4))
        damaged[where] = rng.integers(0, 256, len(where))
        cut = len(content) if rng.random() < 0.8 else rng.integers(0, len(content))
        (tmp_path / "x.npy").write_bytes(damaged[:cut].tobytes())
        code = cli.main(["evaluate", str(tmp_path / "x.npy"), good, "--json"])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        assert (out if code == 0 else err).count("\n") == 1
        refused += code == 2
    assert refused > 100  # the fuzzer bites
