"""`regard look`: the page holds what the model looked at, and a browser shows it."""

import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.lens.look import SMALLEST, look, pack
from tiny import CharTokenizer, tiny_llama

PROMPT = "the cat sat on the mat & the dog </script> sat on the log"


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    with torch.no_grad():  # sharper heads than a fresh model has
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def page(model):
    return look(model, CharTokenizer(), PROMPT, title="a <tiny> model")


def unpack(data, heads, rows):
    raw = zlib.decompress(data)
    counts = np.frombuffer(raw, "<u2", heads * rows).reshape(heads, rows)
    total = int(counts.sum())
    rest = np.frombuffer(raw, np.uint8, offset=2 * heads * rows).reshape(3, total)
    columns, weights = rest[0] + 256 * rest[1].astype(int), (rest[2] / 255) ** 2
    out = np.zeros((heads, rows, rows))
    out[
        np.repeat(np.indices(counts.shape)[0].ravel(), counts.ravel()),
        np.repeat(np.indices(counts.shape)[1].ravel(), counts.ravel()),
        columns,
    ] = weights
    return out


def test_packed_weights_are_the_weights():
    torch.manual_seed(0)
    weights = torch.softmax(torch.randn(3, 300, 300) * 4, -1)
    got = unpack(pack(weights, entries=300), 3, 300)
    drawn = weights.numpy() >= SMALLEST
    assert np.abs(np.sqrt(got) - np.sqrt(weights.numpy()))[drawn].max() <= 0.5 / 255 + 1e-6
    assert (got[~drawn] == 0).all()
    few = unpack(pack(weights, entries=5), 3, 300)
    assert ((few > 0).sum(-1) <= 5).all() and (few.max(-1) == got.max(-1)).all()


def test_page_stands_alone(page):
    assert not re.search(r"(src|href)\s*=|url\(|https?:|import ", page.split('<script type="application/json"')[0])
    assert "<title>a &lt;tiny&gt; model</title>" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert "".join(data["tokens"]) == PROMPT and data["layers"] == [0, 1, 2] and data["heads"] == 4
    assert {"entropy", "sink mass", "locality"} <= set(data["tables"])


def test_bad_input(model):
    with pytest.raises(ValueError, match="prompt: got '1 tokens'"):
        look(model, CharTokenizer(), "x")
    with pytest.raises(ValueError, match="at most 20"):
        look(model, CharTokenizer(), PROMPT, max_tokens=20)
    table = regard.lens.HeadScores(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"scores\['mine'\].*\(3, 4\)"):
        look(model, CharTokenizer(), PROMPT, scores={"mine": table})


def test_command_refuses_a_place_it_cannot_write(tmp_path):
    from regard.cli import app

    result = CliRunner().invoke(app, ["look", "--prompt", "a b", "--html", str(tmp_path)])
    assert isinstance(result.exception, OSError) and str(tmp_path) in str(result.exception)


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromium-driver"
)
def test_in_a_browser(model, page, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    file = tmp_path / "look.html"
    file.write_text(page)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "window-size=1400,900",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(file.as_uri())
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: b.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        browser.find_element(By.CSS_SELECTOR, '#grid button[data-layer="1"][data-head="2"]').click()
        wait.until(lambda b: b.find_element(By.ID, "map").get_attribute("data-ready") == "1-2")
        token = 30
        browser.find_element(By.CSS_SELECTOR, f'#tokens span[data-token="{token}"]').click()
        wait.until(lambda b: f"token {token}" in b.find_element(By.ID, "reader").text)
        rows = [
            row.find_elements(By.TAG_NAME, "td") for row in browser.find_elements(By.CSS_SELECTOR, "#reads tbody tr")
        ]
        shown = [(int(cells[1].text), float(cells[2].text)) for cells in rows]
        probe = browser.find_element(By.ID, "facts").text
    finally:
        browser.quit()
    ids = CharTokenizer()(PROMPT, return_tensors="pt")
    weights = regard.record(model, ids).weights(1, 2, token)[0, 0, 0]
    assert {at for at, _ in shown[:3]} == set(weights.topk(3).indices.tolist())
    for at, weight in shown:
        assert abs(weight - float(weights[at])) < 0.005
    assert "entropy" in probe
