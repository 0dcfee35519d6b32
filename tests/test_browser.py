"""The report and TensorBoard in a real browser, as a user sees them, without a network."""

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.processes import run_command
from tests.test_cli import SHAPES, tiny_overrides

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1300,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})

    def start() -> webdriver.Chrome:
        options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
        return webdriver.Chrome(options=options, service=Service(DRIVER))

    try:
        driver = start()
    except WebDriverException:  # on a busy machine the first start may take too long
        driver = start()  # the new --user-data-dir replaces the old one
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def workdir(shapes_npz, tmp_path_factory) -> pathlib.Path:
    """The work directory of the README's first command, with a run that takes seconds."""
    overrides = tiny_overrides(shapes_npz)
    overrides |= {
        "log.tensorboard": True, "log.figures_every_epochs": 5.0, "log.report": True,
        "eval.every_epochs": 0.2,
    }  # fmt: skip
    flags = [f"--config.{field}={value}" for field, value in overrides.items()]
    path = tmp_path_factory.mktemp("runs") / "run"
    result = run_command("hjepa_jax.main", SHAPES, *flags, f"--workdir={path}")
    assert result.returncode == 0, result.stderr
    assert str(path / "report.html") in result.stdout, "the printed summary must name the report"
    return path


def requests(browser) -> list[str]:
    """Returns the addresses requested since the last call, without data inside the page."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events
            if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    return [url for url in sent if not url.startswith(("data:", "blob:", "chrome"))]


def open_page(browser, address: str) -> None:
    """Opens a page from scratch, even if the browser already shows another part of it."""
    browser.get("about:blank")
    requests(browser), errors(browser)  # discards entries of the previous page
    browser.get(address)


def errors(browser) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]


def test_the_report_opens_without_errors_or_requests_light_and_dark(browser, workdir):
    address = (workdir / "report.html").as_uri()
    open_page(browser, address)
    assert requests(browser) == [address]
    assert errors(browser) == []
    assert browser.title == "Run " + workdir.name
    heads = [e.text for e in browser.find_elements("css selector", "h2")]
    assert heads[0] == "What was reached"
    assert "Next steps" in heads
    complete = "return [...document.images].every(i => i.complete && i.naturalWidth > 50)"
    assert browser.execute_script(complete)
    assert browser.execute_script("return document.images.length") >= 15
    wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not browser.execute_script(wide), "the page must not be wider than the window"

    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    cut = """return [...document.querySelectorAll('tr')].filter(row =>
      [...row.children].slice(0, 3).some(c => c.getBoundingClientRect().right > 390)).length"""
    assert browser.execute_script("return innerWidth") == 390
    assert browser.execute_script(cut) == 0, (
        "a phone must show the first three columns of every table"
    )
    assert not browser.execute_script(wide)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    background = "return getComputedStyle(document.body).backgroundColor"
    picture = browser.find_elements("css selector", "picture img")[0]
    light = picture.get_property("currentSrc")
    assert browser.execute_script(background) == "rgb(255, 255, 255)"
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    deadline = time.monotonic() + 60  # the browser changes the pictures later
    while time.monotonic() < deadline and picture.get_property("currentSrc") == light:
        time.sleep(0.1)
    assert browser.execute_script(background) == "rgb(13, 17, 23)"
    assert picture.get_property("currentSrc") != light, "dark pages must have dark pictures"


@pytest.fixture(scope="module")
def tensorboard(workdir):
    """The address of a TensorBoard server for the work directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", f"--logdir={workdir}", f"--port={port}",
         "--host=127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 300
    while time.monotonic() < deadline:  # the server loads TensorFlow first
        try:
            urllib.request.urlopen(address, timeout=30).close()
            break
        except OSError:
            time.sleep(1)
    yield address
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# JavaScript that returns all text of a page, including shadow trees of web components.
ALL_TEXT = """
const texts = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return texts.join(' ');
"""


@pytest.mark.parametrize(
    ("tab", "words"),
    [
        # Only the first groups are unfolded; the train/ group needs a click.
        ("scalars", ["eval/knn_top1", "perf/images_per_sec"]),
        ("images", ["masks", "attention"]),
        ("hparams", ["optim.learning_rate", "train/loss"]),
        ("text", ["environment", "parameters"]),
    ],
)
def test_tensorboard_tabs_show_the_run(browser, tensorboard, tab, words):
    open_page(browser, f"{tensorboard}#{tab}")
    text = ""
    for second in range(180):
        time.sleep(1)
        text = browser.execute_script(ALL_TEXT)
        if all(word in text for word in words):
            break
        if second % 20 == 19:  # the page may load before the server has read the run
            browser.refresh()
    assert not [word for word in words if word not in text]


def test_tensorboards_projector_loads_the_features(browser, tensorboard):
    """The projector is two frames deep. Its tab appears only after TensorBoard has found files."""
    from selenium.common.exceptions import WebDriverException

    deadline, offered, text = time.monotonic() + 180, False, ""
    while time.monotonic() < deadline and not offered:
        time.sleep(1)
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{tensorboard}data/plugins_listing", timeout=30) as answer,
        ):
            offered = json.load(answer)["projector"]["enabled"]
    open_page(browser, f"{tensorboard}#projector")
    while time.monotonic() < deadline and "Points: 48" not in text:
        time.sleep(1)
        with contextlib.suppress(WebDriverException):  # raised while the page is loading
            browser.switch_to.frame(0)
            browser.switch_to.frame(0)
            text = " ".join(browser.execute_script(ALL_TEXT).split())
        browser.switch_to.default_content()
    for words in ("level_0", "Points: 48", "Dimension: 16"):
        assert words in text
