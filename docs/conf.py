"""How the site is built: `nox -s docs`. The pages are plain Markdown; only index.md knows of Sphinx."""

project = "rlhf"
author = "the rlhf authors"
extensions = ["myst_parser", "sphinx_copybutton"]

# Pages read as well in a repository's viewer, so their links are ordinary ones: `page.md#heading`.
myst_heading_anchors = 4
smartquotes = False  # a dash before an option is a dash

pygments_style = "tango"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = "rlhf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
highlight_language = "none"  # a block that names no language is what a terminal shows
html_theme_options = {"navigation_with_keys": True, "footer_icons": []}
