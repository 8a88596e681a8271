"""`fastxent demo --language-model`: the two trainings agree, a wrong gradient is seen, and what the command says and draws."""

from __future__ import annotations

import email
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib  # noqa: F401  the command draws with it
import numpy as np
import pytest
import torch

from fastxent import cli
from fastxent._cli import language_model
from fastxent._cli.language_model import OURS, PLAIN, Result, Sizes, Training, our_loss, plain_loss, read, train

SOURCES = Path(email.__file__).parent  # a part of the standard library that all Pythons have
SIZES = Sizes(steps=6, tokens=64, words=500, context=2, features=8)  # past 320 classes, as the head of 32000


@pytest.fixture(scope="module")
def text():
    return read(SOURCES, SIZES.words)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Trainings seed PyTorch's generator: other tests get theirs back."""
    with torch.random.fork_rng(devices=[]):
        yield


def losses_with(loss, text) -> list[float]:
    return list(itertools.islice(train(loss, text, SIZES), SIZES.steps))


def compared(plain: list[float], ours: list[float]) -> Result:
    return Result(SIZES, Training(PLAIN, plain), Training(OURS, ours))


class Scaled(torch.autograd.Function):
    """A tensor with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        grad_output = grad_output.clone()
        grad_output[0] *= ctx.factor
        return grad_output, None


def one_row_wrong(head, hidden, target):
    """The right loss. The gradient of one row of the head's input, 64 of them, is wrong."""
    return our_loss(head, Scaled.apply(hidden, 0.5), target)


def one_class_wrong(head, hidden, target):
    """The right loss. The gradient of the most frequent word's weight is wrong, of 500 words."""
    return our_loss(SimpleNamespace(weight=Scaled.apply(head.weight, -1.0), bias=head.bias), hidden, target)


def test_the_text_is_numbered_by_frequency(tmp_path):
    (tmp_path / "a.py").write_text("red = red + red  # blue = ü", encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("green")
    assert read(tmp_path, 3).tolist() == [0, 1, 0, 2, 0, 2, 2, 1, 2]
    assert read(tmp_path, 32000).max() == 5


def test_a_text_is_the_same_each_time_and_uses_all_words(text):
    assert np.array_equal(text, read(SOURCES, SIZES.words))
    assert np.array_equal(np.unique(text), np.arange(SIZES.words))
    counts = np.bincount(text)[:-1]
    assert (np.diff(counts) <= 0).all()


def test_both_losses_train_alike(text):
    plain = losses_with(plain_loss, text)
    assert plain == losses_with(plain_loss, text)
    assert plain[0] == pytest.approx(math.log(SIZES.words), rel=0.05)
    assert plain[-1] < plain[0]
    assert compared(plain, losses_with(our_loss, text)).passed


@pytest.mark.parametrize("wrong", [one_row_wrong, one_class_wrong])
def test_a_wrong_gradient_is_seen(wrong, text):
    plain, ours = (losses_with(loss, text) for loss in (plain_loss, wrong))
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)  # by then no gradient was used
    assert not compared(plain, ours).passed


def test_a_loss_that_is_nan_is_seen():
    assert not compared([1.0, 1.0], [1.0, math.nan]).passed


@pytest.mark.thorough
def test_from_end_to_end(monkeypatch, tmp_path, capsys):
    run = language_model.run
    monkeypatch.setattr(language_model, "run", lambda sizes, progress: run(SIZES, folder=SOURCES, progress=progress))
    assert cli.main(["demo", "--language-model", str(tmp_path / "a.png"), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and result["passed"] is True and result["difference"] <= result["limit"] == 1e-5
    for name in ("plain", "ours"):
        assert len(result[name]["losses"]) == len(result[name]["seconds"]) == SIZES.steps
        assert result[name]["peak_memory"] is None or result[name]["peak_memory"] > 50e6  # PyTorch alone has more
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ours", "code"), [(2.0, 0), (2.1, 1), (math.nan, 1)])
def test_what_is_printed(ours, code, monkeypatch, tmp_path, capsys):
    made = Result(SIZES, Training(PLAIN, [4.0, 2.0], [9.0, 0.2], 3e9), Training(OURS, [4.0, ours], [9.0, 0.1], 1e9))
    monkeypatch.setattr(language_model, "run", lambda sizes, progress: made)
    assert cli.main(["demo", "--language-model", str(tmp_path / "a.svg")]) == code
    out = capsys.readouterr().out
    for words in ("500", "200", "100", "0.50 x", "3000", "1000", "0.33 x", f"drawn in {tmp_path}"):
        assert words in out.replace("\n", "")
    assert ("FAILED" in out) == bool(code)
    assert ("NOT within" in (tmp_path / "a.svg").read_text()) == bool(code)


def test_a_training_that_ends_early(monkeypatch, capsys):
    def run(*arguments, **options):
        raise EOFError

    monkeypatch.setattr(language_model, "run", run)
    assert cli.main(["demo", "--language-model"]) == 2
    assert "a training ended early" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "error"), [("a.gif", "does not end in .png"), ("no/a.png", "there is no folder")])
def test_a_file_that_cannot_be_drawn_is_an_error_at_once(file, error, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--language-model", file]) == 2
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 1


def test_options_of_two_demos():
    with pytest.raises(SystemExit):
        cli.main(["demo", "--keep", "here", "--language-model"])


@pytest.mark.parametrize("missing", ["matplotlib", "torch"])
def test_a_missing_extra_is_named(missing, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fastxent._cli.language_model")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(f"fastxent._cli.{name.rpartition('.')[2]}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "--language-model"]) == 2
    assert capsys.readouterr().err.endswith(f"error: {missing} is missing: pip install 'fastxent[bench]'\n")
