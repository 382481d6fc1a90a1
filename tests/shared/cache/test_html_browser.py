"""The report in a real browser: headless Chromium, where there is one (Debian: apt-get install chromium)."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tide.shared.cache.html_report import POLICY, write_report
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.plots import Absent, make_plots
from tide.shared.pictures import PALETTE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 120
OWNED = "<script>document.title = 'owned'</script>"
OVERLAPS = """<script>
const boxes = [...document.querySelectorAll('svg')].map(svg => [svg.id, svg.getBoundingClientRect(),
  [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])]);
const found = [];
for (const [id, frame, texts] of boxes) texts.forEach(([name, box], i) => {
  if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
    found.push(`${id}: "${name}" leaves the plot`);
  for (const [other, b] of texts.slice(i + 1))
    if (box.left < b.right - 1 && b.left < box.right - 1 && box.top < b.bottom - 3 && b.top < box.bottom - 3)
      found.push(`${id}: "${name}" on "${other}"`);
});
if (document.documentElement.scrollWidth > innerWidth) found.push('the page is wider than the window');
document.title = `${boxes.length} plots: ${found.join('; ')}`;
</script>"""

ANSWER = """<script>
const chunk = document.querySelector('.words .chunk:last-of-type'), answer = chunk.querySelector('.answer');
const before = getComputedStyle(answer).display;
function look() {
  if (!document.hasFocus()) return setTimeout(look, 20);  // a page may be read before its window has the focus
  chunk.focus();
  const box = answer.getBoundingClientRect(), line = chunk.getClientRects()[0];
  const beside = box.left > document.querySelector('.words').getBoundingClientRect().right && box.right < innerWidth
    && Math.abs(box.top - line.top) < 40;
  document.title = `${before}, then ${getComputedStyle(answer).display}, beside ${beside}`;
}
look();
</script>"""
"""Focus and the mouse share one rule of the style sheet; focus is what a script can give."""


@pytest.fixture
def browse(tmp_path) -> Callable[..., str]:
    """browse(page, "--dump-dom") -> what Chromium prints."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium here ({', '.join(NAMES)}); on Debian: apt-get install chromium")

    def run(page: Path, *options: str) -> str:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def title(dom: str) -> str:
    """The document's title, which the scripts of these tests change."""
    return html.unescape(re.findall(r"<title>(.*?)</title>", dom, re.DOTALL)[0])


def report_of(root: Path, folder: Path) -> Path:
    return write_report(describe_cache(root), folder / "report.html")


def test_a_strangers_page_shows_its_plots_and_runs_nothing(browse, write_hostile, tmp_path):
    root, texts = write_hostile()
    page = report_of(root, tmp_path)
    dom = browse(page, "--dump-dom")
    assert title(dom) == f"{root.name} - tide cache"
    plots = [plot for plot in make_plots(describe_cache(root)) if not isinstance(plot, Absent)]
    assert len(plots) == 8
    for plot in plots:
        assert re.search(rf'<svg [^>]*id="plot-{plot.name}"', dom)
    assert not re.search(r"<(script|img|iframe|a|form|b onclick|svg onload)\b", dom)
    for text in texts:
        assert html.escape(text, quote=False) in dom


def test_the_browser_would_run_a_script_but_for_the_policy(browse, make_cache, tmp_path):
    text = report_of(make_cache("topk"), tmp_path).read_text()
    forbidden, allowed = tmp_path / "forbidden.html", tmp_path / "allowed.html"
    forbidden.write_text(text.replace("</body>", f"{OWNED}</body>"))
    allowed.write_text(text.replace(POLICY, "").replace("</body>", f"{OWNED}</body>"))
    assert title(browse(forbidden, "--dump-dom")) == "cache - tide cache"
    assert title(browse(allowed, "--dump-dom")) == "owned"


@pytest.mark.parametrize("width", [1200, 1000, 520])
def test_labels_do_not_lie_on_each_other(browse, make_cache, signal, width, tmp_path):
    text = report_of(make_cache(signal, samples=12), tmp_path).read_text()
    page = tmp_path / "measured.html"
    page.write_text(text.replace(POLICY, "").replace("</body>", f"{OVERLAPS}</body>"))
    number = {"none": 3, "chunk": 4, "topk": 8}[signal]
    assert title(browse(page, "--dump-dom", f"--window-size={width},2000")) == f"{number} plots: "


def test_an_answer_opens_beside_its_line_and_covers_no_text(browse, make_cache, tmp_path):
    text = report_of(make_cache("topk", samples=12), tmp_path).read_text()
    page = tmp_path / "focused.html"
    page.write_text(text.replace(POLICY, "").replace("</body>", f"{ANSWER}</body>"))
    options = ("--dump-dom", "--virtual-time-budget=5000", "--window-size=1200,2000")
    assert title(browse(page, *options)) == "none, then block, beside true"


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_page_is_painted_light_or_dark_as_its_reader_likes(browse, make_cache, tmp_path, scheme):
    page, picture = report_of(make_cache("topk", samples=12), tmp_path), tmp_path / "page.png"
    dark = f"--blink-settings=preferredColorScheme={1 - scheme}"
    browse(page, dark, f"--screenshot={picture}", "--window-size=1200,3200")
    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    assert pixels.shape[1] == 1200
    painted = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    colours, counts = np.unique(painted, return_counts=True)
    area = dict(zip(colours.tolist(), counts.tolist(), strict=True))
    for role in ("paper", "noise", "teacher", "storage"):
        assert area.get(int(PALETTE[role][scheme][1:], 16), 0) > 500, role
    assert area.get(int(PALETTE["noise"][1 - scheme][1:], 16), 0) < 50
    assert len(colours) > 100
