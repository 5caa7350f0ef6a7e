"""HTML pages from Jinja2 templates: what is inserted is escaped, and the page needs no other file to be read.

Templates lie beside the module that fills them, as NAME.html.jinja, and extend storage/page.html.jinja, which brings
the style sheet that all pages share: light and dark, from the width of a phone (390 px) up.
"""

from pathlib import Path

import jinja2

from lance_quant.storage.atomic import size_text

_PACKAGE = Path(__file__).parent.parent
_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(_PACKAGE, encoding="utf-8"), autoescape=True,
                                undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                keep_trailing_newline=True)
_TEMPLATES.filters["size"] = size_text


def render(template: str | Path, **values: object) -> str:
    """A page.

    Args:
        template: path of its template inside lance_quant, for example "evaluation/report.html.jinja"; a Path is any
            file's.
        values: what the template names; strings are escaped, a name that is not given is an error.
    """
    if isinstance(template, Path):
        return _TEMPLATES.from_string(template.read_text(encoding="utf-8")).render(values)
    return _TEMPLATES.get_template(template).render(values)
