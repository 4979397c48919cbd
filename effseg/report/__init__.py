"""One self-contained HTML page a run: what was planned, how it went, what came out.

`write_report` is the door; `write_comparison` sets several runs side by side. A page needs no
network, no server and no script library; jinja2, the extra `report`, is imported when a page is
written and not before.
"""

from effseg.report.comparison import write_comparison
from effseg.report.page import write_report
from effseg.report.suspects import write_suspects

__all__ = ["write_comparison", "write_report", "write_suspects"]
