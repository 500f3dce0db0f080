"""Compare rules honestly: problems, their figures, and how these are summed up.

Needs the packages of the extra ``compare``; nothing in ``gradbal`` but the command imports this
package.
"""

from gradbal.lab.compare.contest import Contest
from gradbal.lab.compare.report import Report as Report
from gradbal.lab.compare.settings import Settings as Settings


def run(settings: Settings, *, quiet: bool = False) -> Report:
    """Train whatever the output folder does not hold yet, and sum all of it up.

    A run that was stopped goes on where it was when it is started again with the same settings,
    and ends in the same table.

    Args:
        settings: What users may set.
        quiet: Show no progress.

    Raises:
        ValueError: If the problem cannot be loaded, there is no folder, or a task alone cannot be
            learned.
    """
    contest = Contest(settings, quiet=quiet)
    return Report(settings, contest.data, contest.run())
