"""`--report`: one page that needs no network, true to what was written, which it does not change."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from browsers import CHROMIUM, browse, console
from converter.cli import main
from converter.cli.report.figures import heat, spectra
from converter.cli.report.grid import Grid, grid_of, place_of, sizes
from converter.cli.report.of_reading import calibrated
from converter.cli.report.page import Page, Picture, Section, Table, Verbatim, as_html
from converter.core.compute.spectra import singular_values
from places import REPOSITORY

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
ADAPTER = REPOSITORY / "fixtures" / "tiny-reward-adapter"
BROKEN = REPOSITORY / "fixtures" / "tiny-reward-run" / "checkpoint-4"
HOSTILE = '"><script>alert(1)</script>$\\frac{a}{b}$\u202e&amp;'
VOID = {"meta", "img", "br", "link"}


class Strict(html.parser.HTMLParser):
    """Tags that are closed in their order, attributes as they are, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with a report, and the same without."""
    root = tmp_path_factory.mktemp("reports")
    line = ["merge-lora", str(ADAPTER), "--base", str(BASE), "-q", "--out"]
    assert main([*line, str(root / "rm"), "--report", str(root / "merge.html")]) == 0
    assert main([*line, str(root / "plain")]) == 0
    assert main(["doctor", str(BROKEN), "-q", "--report", str(root / "doctor.html")]) == 1
    assert main(["diff", str(BASE), str(root / "rm"), "-q", "--report", str(root / "diff.html")]) == 1
    assert main(["verify", str(root / "rm"), "-q", "--report", str(root / "verify.html")]) == 0
    return root


PAGES = ("merge", "doctor", "diff", "verify")


def test_what_is_written_is_the_same_with_and_without_a_report(place: Path) -> None:
    files = sorted(p.name for p in (place / "plain").iterdir())
    assert sorted(p.name for p in (place / "rm").iterdir()) == files
    assert [f for f in files if (place / "rm" / f).read_bytes() != (place / "plain" / f).read_bytes()] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_small_and_needs_nothing_from_anywhere(name: str, place: Path) -> None:
    raw = (place / f"{name}.html").read_bytes()
    assert len(raw) < 2_000_000
    page = Strict(raw.decode())
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert [a["src"] for a in page.all("img") if not str(a["src"]).startswith("data:image/svg+xml;base64,")] == []
    assert all(len(str(a.get("alt") or "")) > 10 for a in page.all("img"))
    assert "default-src 'none'" in str(page.all("meta")[1]["content"])
    named = {a["aria-labelledby"] for a in page.all("section")}
    assert named == {a["id"] for a in page.all("h2")}
    style = "".join(page.text)
    assert "prefers-color-scheme:dark" in style
    assert "@media print" in style


@pytest.mark.parametrize("name", ["merge", "doctor", "diff"])
def test_a_picture_is_xml_of_its_own_without_script_and_takes_the_readers_colours(name: str, place: Path) -> None:
    images = Strict((place / f"{name}.html").read_text()).all("img")
    assert images
    for each in images:
        svg = base64.b64decode(str(each["src"]).partition(",")[2])
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert [e.tag for e in root.iter() if e.tag.endswith(("script", "foreignObject"))] == []
        assert b"currentColor" in svg
        assert b"prefers-color-scheme:dark" in svg
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert [v for v in links if not v.startswith(("#", "data:"))] == []


def test_the_sections_of_a_merge_are_there(place: Path) -> None:
    text = (place / "merge.html").read_text()
    headings = ("What was made of what", "Tensors by fate", "How far each layer moved", "The spectrum of each update")
    for heading in (*headings, "The head", "Findings", "Memory and time", "Again, and what next"):
        assert f">{heading}</h2>" in text
    receipt = json.loads((place / "rm" / "rlhf-convert.json").read_text())
    assert str(receipt["counts"]["computed"]) in text
    assert "merge-lora" in text


def test_the_grid_is_torchs_size_of_each_update(place: Path) -> None:
    receipt = json.loads((place / "rm" / "rlhf-convert.json").read_text())
    found = {(row, layer): value for row, layer, value in sizes(receipt["tensors"]).known}
    factors = load_file(ADAPTER / "adapter_model.safetensors")
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    weights = {n: t for f in BASE.glob("*.safetensors") for n, t in load_file(f).items()}
    assert len(found) == 14
    for (row, layer), value in found.items():
        name = f"model.layers.{layer}.{row}"
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        update = b @ a * (config["lora_alpha"] / config["r"])
        assert value == pytest.approx(float(update.norm() / weights[f"{name}.weight"].double().norm()), rel=1e-4)


def test_a_spectrum_from_the_factors_is_that_of_the_whole_matrix() -> None:
    noise = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 40, generator=noise), torch.randn(70, 5, generator=noise)
    whole = torch.linalg.svdvals(-2.5 * b.double() @ a.double())[:5]
    assert singular_values(a, b, -2.5) == pytest.approx(whole.tolist(), rel=1e-9)
    a, b = torch.randn(3, 8, 2, 2, generator=noise), torch.randn(9, 3, 1, 1, generator=noise)
    whole = torch.linalg.svdvals(b.double().reshape(9, 3) @ a.double().reshape(3, -1))
    assert singular_values(a, b, 1.0) == pytest.approx(whole[:3].tolist(), rel=1e-9)


def test_experts_of_a_layer_are_one_cell_and_what_is_in_no_layer_has_none() -> None:
    assert place_of("model.layers.12.self_attn.q_proj.weight") == ("self_attn.q_proj", 12)
    assert place_of("transformer.h.3.attn.c_attn.weight") == ("attn.c_attn", 3)
    assert place_of("model.layers.2.mlp.experts.7.up_proj.weight") == ("mlp.experts.*.up_proj", 2)
    assert place_of("lm_head.weight") is None
    names = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": float(n) for n in range(4)}
    assert grid_of(names, sum).values == [[6.0]]


def test_calibration_is_bradleys_and_terrys() -> None:
    (one,) = calibrated([math.log(3), math.log(3), math.log(3), -math.log(3)], groups=1)
    assert one == pytest.approx((0.75, 0.75, 4))


def test_hostile_names_are_text(tmp_path: Path) -> None:
    svg = heat(Grid([HOSTILE], [0], [[1.0]]), HOSTILE)
    page = Page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [
        Section(HOSTILE, [Picture(svg, HOSTILE, HOSTILE), Table((HOSTILE,), [(HOSTILE,)]), Verbatim(HOSTILE, HOSTILE)])
    ])  # fmt: skip
    found = Strict(as_html(page))
    assert found.all("script") == []
    assert "<script>alert(1)</script>" in "".join(found.text)
    assert "\u202e" not in as_html(page)
    root = ElementTree.fromstring(svg)
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")]
    assert any("$\\\\frac" in t or "$\\frac" in t for t in texts)
    assert not any(e.tag.endswith("}script") for e in root.iter())


def test_a_page_of_a_large_model_stays_small() -> None:
    layers = range(126)
    grid = Grid(
        [f"block.projection_{n}" for n in range(16)], layers, [[n + 1e-3 * m for m in layers] for n in range(16)]
    )
    lines = [(n % 126, [1 / (m + 1) for m in range(64)]) for n in range(400)]
    assert len(heat(grid, "size", log=True)) + len(heat(grid, "lost")) + len(spectra(lines, "value")) < 1_400_000


@pytest.mark.parametrize(
    "report",
    ["page.pdf", "no/such/folder/page.html", "out/page.html", "out/deep.png"],
    ids=["kind", "folder", "in", "png"],
)
def test_a_report_that_can_not_be_written_is_refused_before_the_work(
    report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge-lora", str(ADAPTER), "out", "--base", str(BASE), "--report", report]) == 2
    assert "report" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_fails_is_a_line_and_no_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.html").symlink_to("/dev/full")
    assert main(["doctor", str(BASE), "--report", str(tmp_path / "page.html")]) == 0
    assert "the report was not written" in capsys.readouterr().err


def test_a_card_is_a_png_of_1200_by_630(tmp_path: Path) -> None:
    line = ["merge-lora", str(ADAPTER), str(tmp_path / "rm"), "--base", str(BASE), "-q", "--dry-run"]
    assert main([*line, "--report", str(tmp_path / "card.png")]) == 0
    content = (tmp_path / "card.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 630)


def test_matplotlib_is_imported_for_a_report_alone() -> None:
    run = f"main(['doctor', {str(BASE)!r}])"
    code = f"import sys; from converter.cli import main; {run}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# In a browser


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; set CHROMIUM to one")


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_a_page_and_has_nothing_to_complain_of(name: str, place: Path, tmp_path: Path) -> None:
    done = browse(place / f"{name}.html", tmp_path / "home", "--dump-dom")
    assert console(done) == []
    assert "<h1>" in done.stdout


@needs_browser
def test_a_browser_runs_nothing_of_a_hostile_folder(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=document.title=1><script>document.title='ran'<"
    shutil.copytree(BASE, folder)
    assert main(["doctor", str(folder), "-q", "--report", str(tmp_path / "page.html")]) == 0
    done = browse(tmp_path / "page.html", tmp_path / "home", "--dump-dom")
    assert console(done) == []
    assert "<title>doctor: " in done.stdout
    assert "document.title='ran'" in done.stdout


@needs_browser
def test_a_browser_draws_dark_and_light_pages_of_the_same_shape(place: Path, tmp_path: Path) -> None:
    import matplotlib.image

    means = {}
    for theme, more in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{theme}.png"
        browse(place / "merge.html", tmp_path / theme, "--window-size=900,2400", f"--screenshot={shot}", *more)
        drawn = matplotlib.image.imread(shot)
        assert drawn.shape[:2] == (2400, 900)
        means[theme] = float(drawn[..., :3].mean())
    assert means["light"] > 0.8
    assert means["dark"] < 0.3
