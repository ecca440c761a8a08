"""Pages of the monitor as a headless Chromium shows them, above runs of the real writers and the real command."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from tests.pipeline.monitor.runs import ask, monitoring, with_seed, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package `chromium`)")
PATIENCE_MS = 200_000
"""Ends a hang; every wait is for what the page shows."""
SEEDS = (122938034, 122938035)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was restarted on one, and one configuration with two seeds."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    config = replace(RunConfig(), train=replace(RunConfig().train, learning_rate=0.25))
    write_run(f"{folder}/two-ranks", [1, 2, 3], {2: [1.0, 3.0]}, config=config, ranks=2, retries=2)
    write_run(f"{folder}/two-ranks", [3, 4], config=config, panel=True, retries=2)
    for seed in SEEDS:
        write_run(f"{folder}/sweep/seed-{seed}", [1, 2], config=with_seed(RunConfig(), seed), panel=True, psnr=31.25)
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """The address of the monitor, once it has all runs."""
    with monitoring(str(runs)) as (url, _):
        ask(f"{url}/data/plugin/scalars/tags", has_all_runs)
        yield url


def has_all_runs(tags: object) -> bool:
    """Return whether the monitor has the curves of all runs, of their bands and of the seeds' mean and spread."""
    seeds = (*(f"seed-{seed}" for seed in SEEDS), "seeds-mean", "seeds-low", "seeds-high")
    with_psnr = ("two-ranks", *(f"sweep/{name}" for name in seeds))
    return (
        isinstance(tags, dict)
        and {"two-ranks/min", "two-ranks/max"} <= set(tags)
        and all("quality/psnr" in tags.get(name, ()) for name in with_psnr)
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with (
        sync_api.sync_playwright() as driver,
        contextlib.closing(driver.chromium.launch(executable_path=CHROMIUM)) as browser,
    ):
        yield browser


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    page = browser.new_page(viewport={"width": 1500, "height": 2000})
    page.set_default_timeout(PATIENCE_MS)
    sync_api.expect.set_options(timeout=PATIENCE_MS)
    yield page
    page.close()


def test_images_are_drawn(address: str, page: sync_api.Page) -> None:
    page.goto(f"{address}/#images")
    images = page.locator("tf-image-loader img")
    sync_api.expect(images).to_have_count(3)
    page.wait_for_function(
        "images => images.every(image => image.complete && image.naturalWidth > 0)", arg=images.element_handles()
    )
    # The panels of the runs have 8 x 8 pixels.
    assert images.evaluate_all("all => all.map(image => [image.naturalWidth, image.naturalHeight])") == [[8, 8]] * 3
    sync_api.expect(page.get_by_text("tag: validation/chip 0")).to_have_count(3)


def test_the_operators_layout(address: str, page: sync_api.Page) -> None:
    page.goto(f"{address}/#custom_scalars")
    expect = sync_api.expect
    expect(page.locator(".category-name")).to_have_text(["Is it learning?", "Is it fast?", "Is the store well?"])
    charts = ["loss", "PSNR, dB", "chips a second", "wait for data, s", "retries and damage, counts"]
    expect(page.locator(".heading-label.name")).to_have_text([*charts, "writing checkpoints, s"])
    # Curves that a chart draws: the runs, and their bands over ranks and over seeds.
    matches = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has_text="retries and damage")
    expect(matches).to_contain_text("Matches (1)")
    learning = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has_text="PSNR, dB")
    expect(learning).to_contain_text("Matches (6)")


def test_hyperparameters_with_final_figures(address: str, page: sync_api.Page) -> None:
    page.goto(f"{address}/#hparams")
    for text in (*map(str, SEEDS), "31.250"):  # seeds as they are, not as 1.2294e+8
        sync_api.expect(page.get_by_text(text, exact=True).first).to_be_visible()


def test_texts(address: str, page: sync_api.Page) -> None:
    page.goto(f"{address}/#text")
    for text in ('encoder = "srcnn"', 'torch = "2.13.0"', f'digest = "{"d" * 64}"'):
        sync_api.expect(page.get_by_text(text).first).to_be_visible()


def test_scalars_in_order_and_a_run_that_begins_while_the_page_is_open(
    address: str, page: sync_api.Page, runs: Path
) -> None:
    page.goto(f"{address}/#scalars")
    groups = ["loss", "quality", "quality-adjusted", "speed", "store", "training"]
    sync_api.expect(page.locator(".category-name")).to_have_text(groups)
    later = page.get_by_text("later/one", exact=True)
    assert later.count() == 0
    write_run(f"{runs}/later/one", [1, 2])
    ask(f"{address}/data/plugin/scalars/tags", lambda tags: isinstance(tags, dict) and "later/one" in tags)
    page.locator("app-header-reload button").click()
    sync_api.expect(later.first).to_be_visible()
