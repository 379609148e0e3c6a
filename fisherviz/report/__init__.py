"""The page a researcher would show a colleague: what `fisherviz report` and `Comparison.to_html` write.

Everything on it is drawn from saved comparisons; this package sits above results and plots and knows nothing
of models, data or hooks.
"""

from fisherviz.report.against import compare_reports, comparisons_of
from fisherviz.report.page import write_page, write_report
from fisherviz.report.section import Section
from fisherviz.report.words import paragraph, verdict

__all__ = ["Section", "compare_reports", "comparisons_of", "paragraph", "verdict", "write_page", "write_report"]
