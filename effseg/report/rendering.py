"""Templates to pages, by jinja2, which is imported when a page is written and not before."""

import importlib.resources
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from effseg import __version__
from effseg.errors import EffsegError
from effseg.plans import format_bytes
from effseg.report.wording import write_number, write_share


def check_jinja2() -> ModuleType:
    """Jinja2, asked for before anything is read for a page.

    Raises:
        EffsegError: if it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise EffsegError(
            'a report needs jinja2, which is not installed; pip install "effseg[report]"'
        ) from error
    return jinja2


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page; all that a template is given is escaped, and what it lacks is an error.

    Args:
        template: a file of this package.
        context: what the template is given; `version` is added.

    Raises:
        EffsegError: if jinja2 is not installed.
    """
    jinja2 = check_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "number": write_number, "share": write_share}
    page: str = environment.get_template(template).render({**context, "version": __version__})
    return page


def _read_template(name: str) -> str:
    folder = importlib.resources.files("effseg.report")
    return folder.joinpath(name).read_text(encoding="utf-8")
