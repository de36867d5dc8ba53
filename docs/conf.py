"""Settings of the site: `sphinx-build -W docs outputs/site`. It loads nothing from elsewhere: no
fonts, no scripts.
"""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import hf_intervene


project = "hf-intervene"
author = "the authors of hf-intervene"
version = release = hf_intervene.__version__
html_title = f"{project} {version}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are stored: python docs/notebooks/make.py

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False


def mathml(self, node: nodes.Node) -> None:
    """Formulas as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="formula">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def markdown_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """The docstrings are written for readers of the source, with Markdown's code; this makes
    reStructuredText of them.
    """
    text = "\n".join(lines)
    text = re.sub(
        r"^( *)```(\w+)\n(.*?)\n *```$",
        lambda m: f"{m[1]}.. code-block:: {m[2]}\n\n" + re.sub(r"(?m)^", "    ", m[3]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    # diagrams and formulas, set off by indentation
    text = re.sub(r"(?m)^(\S.*)\n\n(?= {4}\S)", r"\1\n\n::\n\n", text)
    text = re.sub(r"(?<![`:])`([^`\n]+)`(?!`)", r"``\1``", text)
    parts = re.split(r"(``[^`]+``)", text)
    parts[::2] = [
        re.sub(r"(?<!\w)[*|]+(?=\w)", lambda m: re.sub(r"(.)", r"\\\1", m[0]), part)
        for part in parts[::2]
    ]
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None)
    )
    app.connect("autodoc-process-docstring", markdown_docstring, priority=100)  # before napoleon
