"""One HTML file with everything in it: it opens from a disk, asks no network for anything, and runs no text as code.

Texts are the output of models. They travel as JSON, packed, and are put on the page as text; a content security policy
lets the browser run the two scripts named by their hashes and nothing else, and fetch nothing.
"""

import base64
import gzip
import hashlib
import json
from importlib.resources import files
from typing import Any

import altair
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def page(title: str, shown: dict[str, Any], data: dict[str, Any]) -> str:
    """The page.

    Args:
        title: of the page.
        shown: what the template names.
        data: what the page's script draws, as JSON.
    """
    folder = files("spl.reporting") / "template"
    scripts = [_library(), (folder / "page.js").read_text(encoding="utf-8")]
    environment = Environment(
        loader=PackageLoader("spl.reporting", "template"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        data=packed(data),
        **shown,
    )


def packed(data: dict[str, Any]) -> str:
    """JSON, gzipped, in letters that mean nothing to HTML."""
    raw = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def vega_lite() -> str:
    """The version of Vega-Lite that Altair writes, as vl-convert names it."""
    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite()).replace("</script", "<\\/script")


def _hash(script: str) -> str:
    """As a content security policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
