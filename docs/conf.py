"""Builds the documentation: sphinx-build -W --keep-going -b html docs docs/_build/html"""

project = "vit_jax"
extensions = ["myst_nb"]  # MyST's Markdown; pages that are notebooks run while they are built
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "vit_jax"
html_sidebars = {"**": ["navbar-logo.html", "sbt-sidebar-nav.html"]}  # the search is above
html_theme_options = {"footer_content_items": "", "pygments_light_style": "friendly"}  # which colours diffs
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
myst_heading_anchors = 3
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell: one trains
