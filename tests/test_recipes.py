"""The recipes of .github/RECIPES.md: each is run, and what it says is measured."""

from __future__ import annotations

import copy
import doctest
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastxent
from tests.helpers.processes import run_script

TEXT = (Path(__file__).parents[1] / ".github" / "RECIPES.md").read_text()
RECIPES = dict(re.findall(r"^## (.+)\n(?:(?!^## ).*\n)*?^```python\n((?:.*\n)*?)^```$", TEXT, flags=re.MULTILINE))
SHARDED = [  # scripts for torchrun
    "torch.distributed: classes in several processes",
    "torch.distributed: a linear layer in several processes",
]
LIBRARIES = {
    "torch.compile": ["torch"],
    "transformers: Trainer": ["torch", "transformers", "accelerate"],
    "transformers: training without logits": ["torch", "transformers"],
    "transformers: bfloat16 logits": ["torch", "transformers"],
    "transformers: gradient accumulation": ["torch", "transformers", "accelerate"],
    "TRL: log-probability and entropy": ["torch"],
    "Lightning": ["torch", "sklearn", "pytorch_lightning"],
    "skorch and scikit-learn": ["torch", "sklearn", "skorch"],
    "XGBoost": ["xgboost", "sklearn"],
    "LightGBM": ["lightgbm", "sklearn"],
    "Dask": ["dask.array"],
}
# Numbers of bytes are read from Linux, and compared with those of the logits: 8 x 128 tokens, 32000 words.
memory = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory as Linux reports it")
MB = 1_000_000


class Played(NamedTuple):
    """A recipe that has been run: the names that it leaves, and the kernels that ran."""

    names: dict[str, Any]
    kernels: list[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some write a folder for results."""
    monkeypatch.chdir(tmp_path)


@cache
def play(name: str) -> Played:
    for library in LIBRARIES[name]:
        pytest.importorskip(library)
    with_torch = "torch" in LIBRARIES[name]
    if with_torch:
        import torch

        from tests.helpers.launches import counted

        torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(RECIPES[name], {}, name, "RECIPES.md", 0)
    assert test.examples
    with warnings.catch_warnings(), counted() if with_torch else nullcontext([]) as kernels:
        warnings.simplefilter("ignore")  # PyTorch's compiler and Lightning warn of themselves
        warnings.filterwarnings("error", module="fastxent")
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
    assert result.failed == 0
    return Played(test.globs, kernels)


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """The models and logits that the recipes leave."""
    yield
    play.cache_clear()


def peak(work: Callable[[], Any]) -> int:
    """The bytes that `work` takes at its peak."""

    def status(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    fastxent.release_buffers()  # of gradients and blocks
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM") - before


def step(model: Any, tokens: Any) -> tuple[Any, list[Any]]:
    """The loss of a language model, and the gradients of its parameters."""
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def stock(names: dict[str, Any]) -> Any:
    """The recipe's model as the library makes it, with the library's loss."""
    model = names["LlamaForCausalLM"](names["config"]).to(names["model"].dtype)
    model.load_state_dict(names["model"].state_dict())
    return model


def test_each_recipe_has_a_test():
    assert list(RECIPES) == re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE) == [*LIBRARIES, *SHARDED]
    assert TEXT.count("```python") == len(RECIPES)


def test_contents():
    assert re.findall(r"^ *- \[(.+)\]\(#", TEXT, flags=re.MULTILINE) == list(RECIPES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_recipe(name):
    if name == "torch.compile" and not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        pytest.skip("torch.compile needs a C++ compiler")
    assert play(name).kernels or "torch" not in LIBRARIES[name]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded(name, tmp_path):
    pytest.importorskip("torch")
    (script := tmp_path / "script.py").write_text(RECIPES[name])
    arguments = ["torchrun", "--standalone", "--nproc-per-node=2", str(script)]
    code = f"import sys; sys.argv = {arguments!r}; from torch.distributed.run import main; main()"
    printed = run_script(code, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    losses = re.findall(r"\d\.\d{6}", printed)  # both may come before the end of either line
    assert len(losses) == 2 and losses[0] == losses[1] and float(losses[0]) < 2


# ----------------------------------------------------------------------------------------------------
# What the recipes say
# ----------------------------------------------------------------------------------------------------


def test_trainer_takes_our_loss_in_each_step():
    assert play("transformers: Trainer").kernels.count("value_and_grad") == 20


@memory
def test_training_without_logits():
    """The library's loss and gradients, in less memory than the logits alone have: 131 MB."""
    import torch

    names = play("transformers: training without logits").names
    model, tokens = names["model"], names["tokens"]
    torch.testing.assert_close(step(model, tokens), step(stock(names), tokens), rtol=1e-4, atol=1e-6)
    assert peak(lambda: step(model, tokens)) < 80 * MB < 300 * MB < peak(lambda: step(stock(names), tokens))
    assert model.eval().generate(tokens[:1, :3], max_new_tokens=2, pad_token_id=0).shape == (1, 5)


def test_trainer_counts_the_tokens_of_the_model_without_logits():
    import torch

    names = play("transformers: training without logits").names
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    tokens = names["tokens"]
    rows = [dict(input_ids=row, attention_mask=torch.ones_like(row), labels=row.clone()) for row in tokens]
    for k, row in enumerate(rows):
        row["labels"][5 : 5 + 10 * k] = -100
        row["attention_mask"][100 + k :] = 0
    arguments = TrainingArguments(
        "output", max_steps=2, optim="sgd", learning_rate=1.0, use_cpu=True, save_strategy="no", report_to="none",
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    models = [copy.deepcopy(names["model"]), stock(names)]
    for model in models:
        model.train()
        Trainer(model, arguments, train_dataset=rows).train()
    torch.testing.assert_close(*([*model.parameters()] for model in models), rtol=1e-4, atol=1e-6)


@memory
def test_bfloat16_logits():
    """Beside the logits, 66 MB, no array but their gradient; the library takes several of twice that size."""
    import torch

    names = play("transformers: bfloat16 logits").names
    model, tokens = names["model"], names["tokens"]
    (ours, gradients), (theirs, want) = step(model, tokens), step(stock(names), tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, want, rtol=2e-2, atol=1e-4)
    assert peak(lambda: step(model, tokens)) < 180 * MB < 300 * MB < peak(lambda: step(stock(names), tokens))


def test_means_of_micro_batches_are_no_mean_of_all():
    """What the sum mends: each micro-batch, alone, has another number of tokens."""
    import torch

    names = play("transformers: gradient accumulation").names

    def mean_of_means(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        kept = labels[:, 1:].ne(-100).sum()
        return names["given"](outputs, labels, kept) * len(labels) / 8

    names["given"], names["loss_function"] = names["loss_function"], mean_of_means
    assert not torch.allclose(names["trained"](8, 1), names["trained"](2, 4), atol=1e-6)
    names["loss_function"] = names["given"]


@memory
def test_policy():
    """The results of the definition; no array of the logits' size, 131 MB, but the gradient."""
    import torch

    names = play("TRL: log-probability and entropy").names
    ours = names["selective_log_softmax_and_entropy"]

    def definition(logits: Any, index: Any, temperature: float, row_mask: Any) -> tuple[Any, Any]:
        log_p = (logits / temperature).log_softmax(-1)
        log_prob = torch.gather(log_p, -1, index.unsqueeze(-1)).squeeze(-1)
        return log_prob * row_mask, -(log_p.exp() * log_p).sum(-1) * row_mask

    index, row_mask = torch.randint(5000, (4, 50)), (torch.arange(200) % 7 > 0).reshape(4, 50)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(4, 50, 5000)).to(dtype).requires_grad_()
        want = definition(logits.float(), index, 0.7, row_mask)
        got = ours(logits, index, temperature=0.7, row_mask=row_mask)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.to(dtype))
            torch.testing.assert_close(*(torch.autograd.grad(t.sum(), logits, retain_graph=True)[0] for t in (a, b)))
    assert not ours(logits, index, entropy_requires_grad=False)[1].requires_grad

    index = torch.randint(32000, (8, 128))
    logits = torch.randn(8, 128, 32000)
    assert peak(lambda: definition(logits, index, 1.0, 1)) > 200 * MB
    assert peak(lambda: ours(logits, index)) < 10 * MB
    logits.requires_grad_()
    assert peak(lambda: ours(logits, index)[0].sum().backward()) < 150 * MB
    hidden, head = torch.randn(8, 128, 32).requires_grad_(), torch.randn(32000, 32).requires_grad_()
    assert peak(lambda: sum(names["linear_log_prob_and_entropy"](hidden, head, index)).sum().backward()) < 80 * MB
