"""The command line: its numbers against the reference, its exit codes, and files that mean harm.

Most tests call ``main(argv)``, which is what the console script calls; a few start a process of their own.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, make_case, make_rng

import fastxent
from fastxent import _evaluate, cli
from fastxent import reference as ref

ROOT = Path(__file__).parents[1]
TOLERANCE = {FLOAT16: 1e-6, BFLOAT16: 1e-6, FLOAT32: 1e-6, FLOAT64: 1e-13}  # of sums of float32 (64) losses


def run_process(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastxent", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def save(folder: Path, **arrays: np.ndarray) -> list[str]:
    """Write each array as NAME.npy and return the file names."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [str(folder / f"{name}.npy") for name in arrays]


def evaluate(capsys, *args) -> dict:
    """The JSON object that ``fastxent evaluate`` prints."""
    assert cli.main(["evaluate", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def error_of(capsys, *args) -> str:
    """The one line of ``fastxent evaluate`` on stderr where it fails, which it must."""
    assert cli.main(["evaluate", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastxent evaluate: error: ")
    assert err.count("\n") == 1 and err.endswith("\n") and err[:-1].isprintable()
    return err


def expected(logits, target, **options) -> dict:
    """Every number of ``evaluate``, row by row as the books have it; classes on the last axis."""
    stats = ref.cross_entropy_stats(logits, target, **options)
    keep = stats.target_rank >= 0
    p = ref.softmax(logits, -1)[keep]
    confidence, hit = p.max(-1), stats.target_rank[keep] == 0
    calibration = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            calibration += inside.sum() / keep.sum() * abs(hit[inside].mean() - confidence[inside].mean())
    loss = ref.cross_entropy(logits, target, **options)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "top1_accuracy": hit.mean(),
        "top5_accuracy": (stats.target_rank[keep] < 5).mean(),
        "entropy": stats.entropy[keep].mean(),
        "calibration_error": calibration,
        "rows": keep.size,
        "kept_rows": keep.sum(),
        "nonfinite_rows": 0,
        "classes": logits.shape[-1],
    }


def assert_matches(result: dict, truth: dict, tolerance: float = 1e-6) -> None:
    assert {k: result[k] for k in truth} == pytest.approx(truth, rel=tolerance, abs=tolerance)


# The command as such --------------------------------------------------------------------------------------


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom fastxent import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'numba', 'torch', 'rich', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("evaluate", "demo", "info", "warmup"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["evaluate", "--help"], 0),
        ([], 2),
        (["train"], 2),
        (["evaluate", "logits.npy"], 2),
        (["evaluate", "x", "t", "--axis", "last"], 2),
        (["warmup", "--dtype", "int8"], 2),
    ],
)
def test_usage(args, code, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_process_ends_with_the_exit_code_and_one_line():
    done = run_process("evaluate", "no-such-file.npy", "t.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("fastxent evaluate: error: no-such-file.npy cannot be read: No such file or directory\n")


@pytest.mark.parametrize("args", [["evaluate", "x.npy", "t.npy"], ["info"], ["demo"]])
def test_a_missing_extra_is_named(args, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(args) == 2
    assert capsys.readouterr().err.endswith("error: rich is missing: pip install 'fastxent[cli]'\n")


def test_json_needs_no_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    files = save(tmp_path, logits=np.zeros((2, 4)), targets=np.zeros(2, int))
    assert evaluate(capsys, *files)["loss"] == pytest.approx(math.log(4))


def test_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(fastxent, "show_config", interrupted)
    assert cli.main(["info", "--json"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "fastxent", "info", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


# evaluate: the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "option",
    [
        "index",
        "weight",
        "ignore",
        "smoothing",
        "weight ignore smoothing",
        "probabilities",
        "probabilities weight smoothing",
    ],
)
def test_numbers_are_the_references(tmp_path, capsys, dtype, option):
    case = make_case(dtype, (300, 17), option)
    files = save(tmp_path, logits=case.logits, targets=case.target)
    flags = []
    if "weight" in case.options:
        flags += ["--weight", *save(tmp_path, weight=case.options["weight"])]
    if "label_smoothing" in case.options:
        flags += ["--label-smoothing", case.options["label_smoothing"]]
    result = evaluate(capsys, *files, *flags)
    assert_matches(result, expected(case.logits, case.target, **case.options), TOLERANCE[dtype])
    assert result["dtype"] == dtype.name
    assert result["n_bytes"] == case.logits.nbytes + case.target.nbytes
    assert result["seconds"] > 0 and result["gb_per_s"] > 0


def test_ignore_index(tmp_path, capsys):
    case = make_case(FLOAT64, (50, 5))
    files = save(tmp_path, logits=case.logits, targets=case.target)
    truth = expected(case.logits, case.target, ignore_index=3)
    assert_matches(evaluate(capsys, *files, "--ignore-index", 3), truth, 1e-13)
    assert truth["kept_rows"] < truth["rows"] == 50


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("how", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("option", ["index", "probabilities"])
@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_any_axis_order_file_and_block(tmp_path, capsys, monkeypatch, axis, order, how, option, block_rows):
    monkeypatch.setattr(_evaluate, "BLOCK_ROWS", block_rows)
    case = make_case(FLOAT64, (3, 5, 4, 6), option)
    target = case.target if option == "index" else np.moveaxis(case.target, -1, axis)
    arrays = {"logits": np.moveaxis(case.logits, -1, axis), "targets": target}
    arrays = {name: np.array(array, order=order) for name, array in arrays.items()}
    if how == "npy":
        files = save(tmp_path, **arrays)
    else:
        file = tmp_path / "both.npz"
        (np.savez if how == "npz" else np.savez_compressed)(file, **arrays)
        files = [f"{file}:{name}" for name in arrays]
    result = evaluate(capsys, *files, "--axis", axis)
    assert_matches(result, expected(case.logits, case.target), 1e-13)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_other_byte_order(tmp_path, capsys, dtype):
    case = make_case(np.dtype(dtype[1:]), (20, 7))
    files = save(tmp_path, logits=case.logits.astype(dtype), targets=case.target.astype(">i2"))
    assert_matches(evaluate(capsys, *files), expected(case.logits, case.target))


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_targets_of_any_integer_type(tmp_path, capsys, dtype):
    case = make_case(FLOAT64, (20, 7))
    files = save(tmp_path, logits=case.logits, targets=case.target.astype(dtype))
    flags = ["--weight", *save(tmp_path, weight=np.arange(1, 8))]
    truth = expected(case.logits, case.target, weight=np.arange(1, 8))
    assert_matches(evaluate(capsys, *files, *flags), truth, 1e-13)


def test_a_single_row(tmp_path, capsys):
    logits, target = np.array([1.0, 2.0, 0.5]), np.array(1)
    assert_matches(
        evaluate(capsys, *save(tmp_path, logits=logits, targets=target)),
        {"loss": ref.cross_entropy(logits, target), "top1_accuracy": 1.0, "rows": 1, "kept_rows": 1},
    )


def test_a_npz_with_one_array_needs_no_key(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", np.zeros((2, 4)))
    np.savez(tmp_path / "t.npz", targets=np.zeros(2, int))
    assert evaluate(capsys, tmp_path / "x.npz", tmp_path / "t.npz")["rows"] == 2


def test_rows_that_hold_nan_are_counted_and_are_no_hits(tmp_path, capsys):
    logits = np.zeros((4, 3))
    logits[1, 2] = np.nan  # the target's logit is finite
    logits[2, 0] = np.nan  # the target's logit is nan, which nothing beats
    logits[3, 0] = -np.inf  # a masked target: the loss is inf
    files = save(tmp_path, logits=logits, targets=np.array([0, 0, 0, 0]))
    result = evaluate(capsys, *files)
    assert (result["rows"], result["nonfinite_rows"], result["top1_accuracy"]) == (4, 3, 0.25)
    assert result["loss"] is result["perplexity"] is result["calibration_error"] is None  # nan is not JSON
    assert cli.main(["evaluate", *files]) == 0
    assert "the loss of 3 rows" in capsys.readouterr().out


def test_with_every_row_ignored_the_means_are_nan(tmp_path, capsys):
    files = save(tmp_path, logits=np.full((4, 3), np.nan), targets=np.full(4, -100))
    result = evaluate(capsys, *files)
    assert (result["rows"], result["kept_rows"], result["nonfinite_rows"]) == (4, 0, 0)
    assert all(result[k] is None for k in ("loss", "top1_accuracy", "entropy", "calibration_error"))


def test_perfect_calibration_and_none(tmp_path, capsys):
    right = np.where(np.eye(4), 100.0, 0.0)
    for target, error in ([0, 1, 2, 3], 0.0), ([1, 2, 3, 0], 1.0):
        files = save(tmp_path, logits=right, targets=np.array(target))
        assert evaluate(capsys, *files)["calibration_error"] == pytest.approx(error, abs=1e-12)


def test_the_table_says_the_same(tmp_path, capsys):
    case = make_case(FLOAT32, (1234, 10), "ignore")
    files = save(tmp_path, logits=case.logits, targets=case.target)
    assert cli.main(["evaluate", *files]) == 0
    out, err = capsys.readouterr()
    truth = expected(case.logits, case.target)
    assert err == ""
    for text in (
        f"{truth['loss']:.6f}"[:-2],
        f"{truth['top5_accuracy']:.2%}",
        f"1,234, {truth['kept_rows']:,} kept",
    ):
        assert text in out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_the_progress_bar_goes_to_a_terminal_and_only_there(tmp_path):
    import pty

    files = save(tmp_path, logits=np.zeros((100, 4), np.float32), targets=np.zeros(100, int))
    terminal, stderr = pty.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal with an error
            while text := os.read(terminal, 4096):
                shown.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "fastxent", "evaluate", *files, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"TERM": "xterm"})
    os.close(stderr)
    reader.join()
    os.close(terminal)
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 100
    assert b"\x1b[" in b"".join(shown)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
@pytest.mark.parametrize("how", ["npy", "npz"])
def test_memory_is_bounded(tmp_path, how):
    """Logits of 2 GiB, in a sparse file or packed a thousandfold, take little more than logits of 1 MiB."""
    small = save(tmp_path, small=np.zeros((256, 1024), np.float32), small_targets=np.zeros(256, int))
    rows = 1 << 19
    if how == "npy":
        logits = str(tmp_path / "large.npy")
        np.lib.format.open_memmap(logits, "w+", np.float32, (rows, 1024)).flush()
    else:
        logits = str(tmp_path / "large.npz")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
        with zipfile.ZipFile(logits, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("x.npy", "w", force_zip64=True) as stream:
                stream.write(header.getvalue())
                for _ in range(64):
                    stream.write(bytes(rows * 1024 * 4 // 64))
    large = [logits, *save(tmp_path, large_targets=np.zeros(rows, int))]
    code = (
        "import resource, sys; from fastxent import cli; assert cli.main(['evaluate', *sys.argv[1:]]) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(files: list[str]) -> int:
        done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) << 10

    assert peak(large) - peak(small) < 400 << 20


# evaluate: files that are wrong ---------------------------------------------------------------------------


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
    monkeypatch.setattr(_evaluate, "BLOCK_ROWS", 2)  # rows are counted through the file, not the block
    assert words in error_of(capsys, *files)


def test_a_bad_target_in_more_dimensions_is_named_by_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_evaluate, "BLOCK_ROWS", 2)
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
    monkeypatch.setattr(_evaluate, "WHOLE_BYTES", 100)
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


# demo, info, warmup ---------------------------------------------------------------------------------------


def test_demo_end_to_end(tmp_path):
    done = run_process("demo", "--keep", tmp_path / "new" / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("train accuracy", "loss with fastxent", "coefficients", "perplexity", "kept in"):
        assert words in done.stdout
    assert "FAILED" not in done.stdout
    logits = np.load(tmp_path / "new" / "folder" / "logits.npy")
    targets = np.load(tmp_path / "new" / "folder" / "targets.npy")
    assert logits.shape == (450, 10) and targets.shape == (450,)
    assert (logits.argmax(1) == targets).mean() > 0.95


def test_demo_json(capsys):
    assert cli.main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert [check["name"] for check in result["checks"] if check["passed"]] == [
        "coefficients",
        "intercepts, centred",
        "training loss",
        "test loss, from the files",
    ]
    assert abs(result["loss"] - result["sklearn_loss"]) < 1e-8
    losses = [step["loss"] for step in result["steps"]]
    assert np.diff(losses).max() < 1e-12
    assert result["evaluation"]["top1_accuracy"] > 0.95


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize(("difference", "code"), [(1e-4, 0), (1e-2, 1), (math.nan, 1)])
def test_demo_fails_with_a_check(monkeypatch, capsys, flags, difference, code):
    from fastxent import _demo

    def run(folder, on_step=None):
        files = save(folder, logits=np.zeros((2, 3)), targets=np.zeros(2, int))
        checks = [_demo.Check("coefficients", difference, 1e-3)]
        return _demo.Result([], 1.0, 1.0, checks, _evaluate.evaluate(*files))

    monkeypatch.setattr(_demo, "run", run)
    assert cli.main(["demo", *flags]) == code
    out = capsys.readouterr().out
    assert ('"passed": false' in out) if flags and code else ("FAILED" in out) == bool(code)


def test_demo_cannot_write(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--json", "--keep", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_info_shows_whatever_there_is(monkeypatch, capsys):
    config = {
        "version": "1.2",
        "cpu": {"name": "a [b]c[/b]", "cores": [0, 2]},
        "cache": "/x" * 100,
        "no": None,
    }
    monkeypatch.setattr(fastxent, "show_config", lambda: config)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "a [b]c[/b]" in out and "0, 2" in out and "1.2" in out
    assert "/x" * 100 in "".join(out.split())  # folded, not cut
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == config


def test_info_is_real(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastxent.show_config()))


def test_warmup_passes_its_dtypes_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(fastxent, "warmup", lambda *args, progress=None: calls.append(args))
    assert cli.main(["warmup"]) == 0
    assert cli.main(["warmup", "--dtype", "float16", "bfloat16", "float16"]) == 0
    assert calls == [(), (("float16", "bfloat16"),)]
    assert "kernels are ready" in capsys.readouterr().out


def test_warmup_is_real():
    done = run_process("warmup", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")


# README and .ci/run ---------------------------------------------------------------------------------------


def test_readme_example():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 5 and result.failed == 0


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` greps the command out of README.md, so it must stand there once, on a line of its own."""
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "-m pytest" in line]
    assert commands == ["python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest"]
