"""The main job on real images: one small network, three tasks, several rules side by side.

Needs the packages of the extra ``demo``; nothing in ``gradbal`` imports this one.
"""

from gradbal.demo.contest import run as run
from gradbal.demo.plots import draw as draw
from gradbal.demo.report import Report as Report
from gradbal.demo.settings import Settings as Settings
