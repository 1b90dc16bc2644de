"""One self-contained HTML page from a template and plotly figures; what the pages of runs and of comparisons share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def render_page(
    template: Path, figures: Sequence[dict[str, Any]], filters: dict[str, Callable[..., Any]], **values: Any
) -> str:
    """The page's text. `figures` are plain plotly figures, which the template places by their number."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        **values,
        css=Markup((here / "style.css").read_text(encoding="utf-8")),
        charts_js=Markup((here / "charts.js").read_text(encoding="utf-8")),
        plotly_js=Markup(get_plotlyjs()),
        charts_json=Markup(script_json(figures)),
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script>: nothing in it can close the element or start a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
