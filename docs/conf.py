"""How the site is built: `nox -s docs`. The pages are plain Markdown; only index.md knows of Sphinx."""

project = "rlhf"
author = "the rlhf authors"
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Pages read as well in a repository's viewer, so their links are ordinary ones: `page.md#heading`.
myst_heading_anchors = 4
# README.md stands above this folder; index.md includes it, and its links are rewritten.
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = "rlhf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
highlight_language = "none"  # a block that names no language is what a terminal shows
copybutton_exclude = ".linenos, .gp, .go"
