"""`camserve demo`, as `make demo` runs it."""

from __future__ import annotations

from html.parser import HTMLParser

from click.testing import CliRunner
from PIL import Image

from camserve.server.demo.command import demo


class Tags(HTMLParser):
    """Counts what the report shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        """Keeps every picture's source."""
        if tag == "img":
            self.sources.append(dict(attrs)["src"])


def test_demo_ends_with_the_report(tmp_path, samples):
    """It writes an overlay a sample and method, one report with every picture inside, and prints where it is."""
    done = CliRunner().invoke(demo, ["--out", str(tmp_path / "out"), "--picture", str(tmp_path / "strip.jpg")])

    assert 0 == done.exit_code, done.output
    assert done.output.rstrip().endswith("report.html")
    assert 3 * len(samples) == len(list((tmp_path / "out").glob("*.png")))
    tags = Tags()
    tags.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert 4 * len(samples) == len(tags.sources)
    assert all(source.startswith("data:image/") for source in tags.sources)
    with Image.open(tmp_path / "strip.jpg") as strip:
        assert (4 * 160, 4 * 160) == strip.size
    assert "wrong" not in done.output


def test_unknown_method_is_a_usage_error(tmp_path):
    """A mistyped method is told before a server is started."""
    done = CliRunner().invoke(demo, ["--out", str(tmp_path), "-m", "grad-cat"])

    assert 2 == done.exit_code
    assert "grad-cam" in done.output
