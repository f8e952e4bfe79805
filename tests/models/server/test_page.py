"""A person teaches the page a voice: Chromium, with a microphone that is fed from a file.

With `SAML_SCREENSHOTS=FOLDER` it shows the real tiny.en a LibriSpeech reader, who says one sentence
again and again, and leaves a picture of each state: those of the documentation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
from serving import Talker, noise, served

from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.settings import Settings
from saml_models.speakers.pretrained import load_adaptable

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

PICTURES = os.environ.get("SAML_SCREENSHOTS")
TOKEN = "twenty-characters-and-more"
SPOKEN = 1500  # milliseconds of a recording


@dataclass
class Stage:
    """A browser's page, where it came from, and what is said into its microphone."""

    page: Any
    url: str
    says: str | None
    milliseconds: int
    folder: Path

    def picture(self, name: str) -> None:
        """Of a state, where pictures are asked for."""
        if PICTURES:
            self.page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def reader() -> tuple[Any, str]:
    """A sentence of a LibriSpeech reader."""
    root = Path(os.environ.get("SAML_SPEECH", "../shared/data")) / "LibriSpeech" / "test-other"
    said = min(load_corpus(root, ["1688"]), key=lambda u: abs(len(u.load()) - 80_000))
    return said.load(), said.text.capitalize() + "."


@pytest.fixture(scope="module")
def model() -> Any:
    """What the learner loads too."""
    return load_adaptable("tiny.en")


@pytest.fixture
def tokens() -> dict[str, str]:
    """Owners by the digests of their tokens; none lets everybody in."""
    return {}


@pytest.fixture
def stage(tmp_path: Path, model: Any, tokens: dict[str, str]) -> Iterator[Stage]:
    speech: Any = bind(*model) if PICTURES else Talker(network=model[0])
    samples, says = reader() if PICTURES else (noise(30), None)
    microphone, store = tmp_path / "microphone.wav", tmp_path / "store"
    soundfile.write(microphone, samples, 16000, "PCM_16")
    epochs = 8 if PICTURES else 1
    settings = Settings("tiny.en", tokens=tokens, store=store, load="tiny.en", epochs=epochs)
    flags = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    with (
        Engine(speech) as engine,
        served(create_app(engine, settings)) as url,
        playwright.sync_playwright() as library,
    ):
        browser = library.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_context(viewport={"width": 800, "height": 900}).new_page()
        page.set_default_timeout(30_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        if tokens:  # the browser's own note of the answer 401
            page.on("console", lambda m: faults.remove(m.text) if "401" in m.text else None)
        page.goto(url)
        milliseconds = round(len(samples) / 16) + 300 if PICTURES else SPOKEN
        yield Stage(page, url, says, milliseconds, store)
        browser.close()
        assert not faults


def test_a_voice_is_taught_and_heard(stage: Stage) -> None:
    page, expect = stage.page, playwright.expect
    expect(page.get_by_text("Model: tiny.en")).to_be_visible()
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    stage.picture("start")
    page.get_by_label("Name").fill("Ann")
    page.keyboard.press("Enter")  # all of it can be done without a mouse
    prompt, key = page.locator("#prompt"), page.locator("#record")
    expect(prompt).to_be_focused()
    first = prompt.inner_text()
    page.get_by_role("button", name="Skip").click()
    expect(prompt).not_to_have_text(first)

    def record(number: int, while_it_does: Callable[[], None] = lambda: None) -> None:
        if stage.says:
            page.get_by_label("Or a phrase of your own").fill(stage.says)
            page.get_by_role("button", name="Use it").click()
        key.focus()
        page.keyboard.press("Space")
        expect(key).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(stage.milliseconds)
        expect(page.locator("#level")).not_to_have_js_property("value", 0)
        while_it_does()
        page.keyboard.press("Space")
        expect(page.locator("#clips li")).to_have_count(number)

    record(1, lambda: stage.picture("recording"))
    for number in (2, 3):
        record(number)
    said = prompt.inner_text()
    page.reload()  # midway: nothing is lost
    expect(page.locator("#clips li")).to_have_count(3)
    if not stage.says:
        assert prompt.inner_text() == said
        page.get_by_label("Or a phrase of your own").fill("Kettle, biscuits & <b>jam</b>")
        page.get_by_role("button", name="Use it").click()
        expect(prompt).to_have_text("Kettle, biscuits & <b>jam</b>")
    record(4)
    expect(page.get_by_role("button", name="Learn this voice")).to_be_disabled()
    record(5)

    again = page.locator("#clips li").nth(1)
    text = again.locator("span").inner_text()
    folder = stage.folder / "enrolment" / "Ann"
    before = (folder / "clips" / "0002.flac").stat().st_mtime_ns
    again.get_by_role("button", name="Record again").click()
    expect(prompt).to_have_text(text)
    page.keyboard.press("Space")
    page.wait_for_timeout(stage.milliseconds)
    page.keyboard.press("Space")
    expect(prompt).not_to_have_text(text)
    expect(page.locator("#clips li")).to_have_count(5)
    assert (folder / "clips" / "0002.flac").stat().st_mtime_ns > before
    stage.picture("recorded")

    page.get_by_role("button", name="Learn this voice").click()
    expect(page.get_by_role("heading", name="3. Learning")).to_be_visible()
    page.reload()  # it learns on, and the page shows how far it is
    expect(page.get_by_role("heading", name="3. Learning")).to_be_visible()
    expect(page.locator("#progress-text")).to_contain_text("Step", timeout=120_000)
    stage.picture("learning")
    expect(page.get_by_role("heading", name="Before and after")).to_be_focused(timeout=180_000)
    expect(page.locator("#held tbody tr")).to_have_count(1)
    expect(page.locator("#rates")).to_contain_text("% before")
    stage.picture("learnt")

    status = folder / "status.json"  # as it is where the guard turned down what was learnt
    status.write_text(json.dumps(json.loads(status.read_text()) | {"adapted": False}))
    page.reload()
    expect(page.locator("#rates")).to_contain_text("it is not used")

    page.get_by_label("Heard as").select_option("Ann")
    dictate = page.locator("#dictate")
    dictate.click()
    page.wait_for_timeout(stage.milliseconds)
    dictate.click()
    expect(page.get_by_label("Text", exact=True)).not_to_have_value("", timeout=60_000)
    expect(page.locator("#status")).to_have_text("Done.")
    with page.expect_download() as download:
        page.get_by_role("link", name="Subtitles (SRT)").click()
    subtitles = download.value.path().read_text()
    assert subtitles.startswith("1\n00:00:00,000 --> 00:00:0")
    stage.picture("transcribed")

    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete this voice").click()
    expect(page.locator("#status")).to_contain_text("Everything of Ann is deleted.")
    assert not [path for path in stage.folder.rglob("*") if path.is_file()]


def test_where_the_browser_withholds_the_microphone_the_page_says_so(stage: Stage) -> None:
    page = stage.page
    page.add_init_script(
        "Object.defineProperty(window, 'isSecureContext', {value: false});"
        "Object.defineProperty(navigator, 'mediaDevices', {value: undefined});"
    )
    page.reload()
    page.get_by_label("Name").fill("Ann")
    page.get_by_role("button", name="Create").click()
    playwright.expect(page.locator("#no-microphone")).to_contain_text("plain http")
    playwright.expect(page.locator("#record")).to_be_disabled()
    stage.picture("withheld")
    file = stage.folder.parent / "microphone.wav"
    page.locator("#file").set_input_files(file)
    playwright.expect(page.get_by_label("Text", exact=True)).not_to_have_value("")


@pytest.mark.parametrize("tokens", [{hashlib.sha256(TOKEN.encode()).hexdigest(): "ann"}])
def test_with_tokens_the_page_asks_for_one(stage: Stage) -> None:
    page, expect = stage.page, playwright.expect
    expect(page.locator("#token")).to_be_focused()
    expect(page.locator("#inside")).to_be_hidden()
    stage.picture("token")
    for token, is_right in (("x" * 20, False), (TOKEN, True)):
        page.locator("#token").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("#inside")).to_be_visible(visible=is_right)
        expect(page.locator("#door")).to_be_visible(visible=not is_right)
    expect(page.get_by_text("Model: tiny.en")).to_be_visible()
    page.reload()  # the tab remembers it
    expect(page.get_by_text("Model: tiny.en")).to_be_visible()
