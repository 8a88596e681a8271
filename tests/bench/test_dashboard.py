"""The dashboard, built from made-up results and from the committed ones, and looked at in a headless Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import dashboard
from benchmarks.bars import OUT
from benchmarks.published import Commit, History, Regression, Series, read
from tests.helpers.asv_results import RATIO, git, make_repository, write_results
from tests.helpers.processes import ROOT


def build(repository: Path, site: Path) -> None:
    """Without npm asv's scripts come from the net."""
    dashboard.build(repository, site)
    if shutil.which("npm"):
        dashboard.copy_scripts(site / "asv")


COMMITS, SLOW = 12, 8  # the ninth commit takes 1.4 times as long as those before it


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A site of its own repository, in a folder of a folder; the hashes of its commits and the ratios that it got."""
    repository = tmp_path_factory.mktemp("made-up")
    hashes = make_repository(repository, [f"Commit {k} & <b>" for k in range(COMMITS)])
    ratios = {commit: (0.1 if k < SLOW else 0.14) * (1 + 0.01 * (k % 3)) for k, commit in enumerate(hashes)}
    write_results(repository, ratios)
    site = repository / "any" / "path"
    build(repository, site)
    return site, repository, ratios


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A site of the results of this repository, and the repository."""
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("a shallow clone: asv shows results of commits that are there; git fetch --unshallow")
    site = tmp_path_factory.mktemp("committed") / "any" / "path"
    build(ROOT, site)
    return site, ROOT


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1400",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serves the folder of all of pytest's folders: every site is under some path of it."""
    folder = tmp_path_factory.getbasetemp()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda site, page: f"http://localhost:{server.server_port}/{site.relative_to(folder)}/{page}"
        server.shutdown()


def open_page(browser, url: str) -> None:
    browser.get("about:blank")  # or a change behind the # would load nothing
    browser.get(url)


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def read_results(repository: Path, machine: Mapping[str, str]) -> dict[str, tuple[list, list]]:
    """Of each commit that a machine measured the parameters and the values of the ratio, as the result files have them."""
    found = {}
    for file in (repository / json.loads((repository / "asv.conf.json").read_text())["results_dir"]).glob("*/*-*.json"):
        document = json.loads(file.read_text())
        if RATIO in document["results"] and document["params"].items() <= machine.items():
            values, params = document["results"][RATIO][:2]
            found[document["commit_hash"]] = (params, values)
    return found


def expected_points(repository: Path, machine: Mapping[str, str]) -> dict[tuple[str, str, str], float]:
    """Commit, provider and shape -> ratio with all threads; straight from the result files."""
    points = {}
    for commit, ((providers, shapes, threads), values) in read_results(repository, machine).items():
        combinations = ((p, s, t) for p in providers for s in shapes for t in threads)
        for (provider, shape, thread), value in zip(combinations, values, strict=True):
            if thread == "'all'" and value is not None and value == value:
                points[commit, provider.strip("'"), shape.strip("'")] = value
    return points


# Without a browser -----------------------------------------------------------------------------------


def test_the_slow_commit_is_found_and_no_other(made_up):
    site, repository, ratios = made_up
    history = read(site / "asv", repository)
    assert {r.last.hash for r in history.regressions} == {list(ratios)[SLOW]}
    assert {r.first for r in history.regressions} == {None}
    assert len(history.regressions) == 8 and all(1.3 < r.factor < 1.5 for r in history.regressions)
    assert history.newest.subject == f"Commit {COMMITS - 1} & <b>" and history.n_commits == COMMITS


def test_a_level_history_has_no_regression(tmp_path):
    hashes = make_repository(tmp_path, ["same"] * 9)
    write_results(tmp_path, {commit: 0.1 * (1 + 0.02 * (k % 2)) for k, commit in enumerate(hashes)})
    dashboard.build(tmp_path, tmp_path / "site")
    assert read(tmp_path / "site" / "asv", tmp_path).regressions == []
    assert '<td colspan="5">none</td>' in (tmp_path / "site" / "index.html").read_text()


def test_a_chart_marks_the_regressions_of_its_own_shape():
    commits = [Commit(f"{k}" * 40, datetime(2026, 1, 1 + k), f"Commit {k}") for k in range(3)]
    series = [Series(OUT, shape, [(commit, 0.1) for commit in commits]) for shape in ("32 x 10", "4096 x 8192")]
    regression = Regression(f"{RATIO}('fastxent out=', '32 x 10', 'all')", None, commits[1], 0.1, 0.2)
    small, large = (dashboard._chart([s], s.shape, History({}, series, [regression], 3)) for s in series)
    assert small.count('class="regression"') == 1 and 'class="regression"' not in large


def test_ticks_and_scale():
    assert dashboard._ticks(0.04, 3) == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    y = dashboard._log_scale(0.1, 10.0)
    assert y(10.0) == dashboard.TOP and y(0.1) == dashboard.HEIGHT - dashboard.BOTTOM
    assert y(1.0) == pytest.approx((y(10.0) + y(0.1)) / 2)


# In the browser --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["made_up", "committed"])
def test_front_page_draws_the_numbers_of_the_results(name, request, browser, address):
    site, repository, *_ = request.getfixturevalue(name)
    open_page(browser, address(site, "index.html"))
    assert complaints(browser) == []
    expected = expected_points(repository, read(site / "asv", repository).machine)
    assert len({commit for commit, _, _ in expected}) >= 8

    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg [data-value]')].map(e => {"
        " const box = e.getBoundingClientRect();"
        " return [e.dataset.commit, e.dataset.provider, e.dataset.shape, Number(e.dataset.value), box.width, box.top]})"
    )
    assert {tuple(point[:3]): point[3] for point in drawn} == expected
    assert all(width > 3 for *_, width, _ in drawn)
    of_one = sorted((value, -top) for _, provider, shape, value, _, top in drawn if (provider, shape) == tuple(drawn[0][1:3]))
    assert all(a[1] <= b[1] for a, b in pairwise(of_one))  # more is higher

    tiles = browser.execute_script(
        "return [...document.querySelectorAll('.tile')].map(e =>"
        " [e.dataset.provider, e.dataset.shape, Number(e.dataset.ratio), e.querySelector('b').textContent])"
    )
    assert len(tiles) == len({point[1:] for point in expected})
    for provider, shape, ratio, text in tiles:
        assert ratio in {value for (_, p, s), value in expected.items() if (p, s) == (provider, shape)}
        assert float(text.split()[0]) == pytest.approx(1 / ratio, rel=0.01, abs=0.006)  # two digits after the point at most


def test_front_page_names_the_slow_commit(made_up, browser, address):
    site, _, ratios = made_up
    open_page(browser, address(site, "index.html"))
    rows = browser.execute_script(
        "return [...document.querySelectorAll('tr[data-commit]')].map(e => [e.dataset.commit, e.innerText])"
    )
    assert {commit for commit, _ in rows} == {list(ratios)[SLOW]}
    assert len(rows) == 8
    for _, text in rows:
        assert "Commit 8 & <b>" in text and 1.3 < float(text.split()[-2]) < 1.5
    lines = browser.execute_script("return document.querySelectorAll('svg .regression').length")
    assert lines == 2  # one in each chart


def test_asv_draws_the_numbers_of_the_results(made_up, browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    site, _, ratios = made_up
    open_page(browser, address(site, f"asv/index.html#{RATIO}"))
    ready = (
        "return window.jQuery && jQuery('#main-graph').data('plot') && jQuery('#main-graph').data('plot').getData().length == 8"
    )
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(ready))
    drawn = browser.execute_script("return jQuery('#main-graph').data('plot').getData().map(s => s.data.map(p => p[1]))")
    assert sorted(map(sorted, drawn)) == sorted(sorted(r * (1 + i) for r in ratios.values()) for i in range(8))
    coloured = browser.execute_script(
        "const c = document.querySelector('#main-graph canvas.flot-base');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 0; i < d.length; i += 4) {"
        " const rgb = [d[i], d[i + 1], d[i + 2]]; n += d[i + 3] > 200 && Math.max(...rgb) - Math.min(...rgb) > 60 }"
        "return n"
    )
    assert coloured > 2000
    assert complaints(browser) == []


PAGES = {"grid": ("", "track_ratio"), "list": ("#summarylist", RATIO), "regressions": ("#regressions", "Show ignored")}


@pytest.mark.parametrize("name", ["made_up", "committed"])
@pytest.mark.parametrize("page", PAGES)
def test_other_pages_of_asv_load(name, page, request, browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    site = request.getfixturevalue(name)[0]
    fragment, text = PAGES[page]
    open_page(browser, address(site, f"asv/index.html{fragment}"))
    WebDriverWait(browser, 30).until(lambda b: text in b.execute_script("return document.body.innerText"))
    if page == "grid":
        WebDriverWait(browser, 30).until(
            lambda b: b.execute_script("return document.querySelectorAll('canvas.flot-base').length")
        )
    assert complaints(browser) == []


def test_serve_shows_the_site(made_up, capfd):
    """One command; here without the terminal that would end it."""
    from urllib.request import urlopen

    threading.Thread(target=dashboard.serve, args=(made_up[0], 0), daemon=True).start()
    for _ in range(100):
        out = capfd.readouterr().out
        if "http://localhost:" in out:
            break
        threading.Event().wait(0.1)
    with urlopen(out.split()[0], timeout=10) as reply:
        assert b"fastxent over time" in reply.read()
