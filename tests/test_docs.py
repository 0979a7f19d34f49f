"""The documentation: its examples run, and it is built without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import python

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of a page.
BOUND_SECS = 45


def script_of(page: Path) -> str:
    """All python blocks of a page, at the lines where they stand there; a traceback leads back."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


# What a page shows may be for users of another package.
NEEDS = {"docs/howto/prometheus.md": "prometheus_client"}
SCRIPTS = {
    name: script
    for name, page in PAGES.items()
    if (script := script_of(page)).strip()
    and importlib.util.find_spec(NEEDS.get(name, "async_barriers")) is not None
}


@pytest.mark.processes
@pytest.mark.bound(2 * BOUND_SECS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_page_shows_runs(tmp_path: Path, name: str) -> None:
    """The python blocks of a page, one after another, are a program that ends well."""
    (tmp_path / "page.py").write_text(SCRIPTS[name])
    ended = subprocess.run(
        [python(), "page.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::RuntimeWarning"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_SECS,
    )
    assert ended.returncode == 0, ended.stdout


def test_every_block_says_what_it_is() -> None:
    """A block in no language would neither be run nor be known to be nothing to run."""
    for name, page in PAGES.items():
        if name == "README.md":
            continue
        openings = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
        known = {"python", "shell", "text", "toml", "{toctree}", "{eval-rst}"}
        assert set(openings) <= known, name


def test_what_is_read_on_the_web_leads_somewhere() -> None:
    """Pages that Sphinx does not read link to files, and show pictures, that are there."""
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{name}: {target}"


# How a sentence begins that has no subject; a question ends in another mark.
HEADLESS = re.compile(r"(?:^|[.:;|*] )(?:Who|Whoever|Whatever|What is|What was)\b[^.?]*[.;]", re.M)


def test_sentences_have_a_subject() -> None:
    """Pages say "A rank that enters ...", not "Who enters ...", save where the rule is given."""
    for name in (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"):
        prose = re.sub(r"^```.*?^```$|^#.*?$", "", (ROOT / name).read_text(), flags=re.M | re.S)
        found = [each for each in HEADLESS.findall(prose) if 'not "Who' not in each]
        assert not found, f"{name}: {found}"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo"))),
    reason="needs the extra docs",
)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links lead somewhere, every page is in a table of contents, docstrings are understood."""
    strictly = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *strictly, "docs", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BOUND_SECS,
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    for promised in ("Barrier.execute_barrier", "testing.FaultyStore.hang"):
        assert f'id="async_barriers.{promised}"' in reference
    # What stands for "nothing was given" is no part of a signature.
    for inner in ("Configured", "StoreBarrierT", "ObserverT", "&lt;function", " object at ", "~"):
        assert inner not in reference, inner


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Each page in a frame of a phone's width, and what is wider than it.
MEASURE = """<body><pre id="wide"></pre><script>
const pages = PAGES, frames = pages.map(page => {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width:390px;height:844px;border:0";
  frame.src = page;
  document.body.append(frame);
  return new Promise(loaded => frame.onload = () => loaded([page, frame.contentDocument]));
});
Promise.all(frames).then(all => {
  const said = all.flatMap(([page, inside]) => [...inside.querySelectorAll(
      "table.docutils, article :is(h1, h2, h3, p, li, dt, pre, .c1)")]
    .filter(part => part.getBoundingClientRect().right > 390.5 - 16 * part.matches(".c1")
      || part.matches("table, h1, h2, h3") && part.scrollWidth > part.clientWidth + 1)
    .map(part => page + ": " + part.innerText.slice(0, 60)));
  document.getElementById("wide").textContent = "measured " + all.length + "\\n" + said.join("\\n");
});
</script>"""


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    """At 390 pixels tables, headings, paragraphs and comments fit; code and timelines scroll."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "docs", str(site)], cwd=ROOT, check=True)
    pages = [str(page.relative_to(site)) for page in sorted(site.rglob("*.html"))]
    pages = [page for page in pages if not page.startswith(("_", "genindex", "search"))]
    measure = site / "measure.html"
    measure.write_text(MEASURE.replace("PAGES", json.dumps(pages)))
    assert CHROMIUM is not None
    # The site is our own and read from the disk alone, so that a container needs no sandbox.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    shown = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
         "--virtual-time-budget=20000", "--dump-dom", measure.as_uri()],
        check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    said = re.search(r'<pre id="wide">(.*?)</pre>', shown, re.DOTALL)
    assert said is not None, shown
    assert said[1].strip() == f"measured {len(pages)}"
