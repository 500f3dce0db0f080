"""The main job on real images: one small network, three tasks, several rules side by side.

Needs the packages of the extra ``demo``; nothing in ``gradbal`` imports this one.
"""

from gradbal.lab.demo.contest import run as run
from gradbal.lab.demo.plots import draw as draw
from gradbal.lab.demo.report import Report as Report
from gradbal.lab.demo.settings import Settings as Settings
