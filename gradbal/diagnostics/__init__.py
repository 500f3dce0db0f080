"""Seeing what a rule does: recorded steps, a report in words, and conflict layer by layer."""

from gradbal.diagnostics.course import Course as Course
from gradbal.diagnostics.layers import Layers as Layers
from gradbal.diagnostics.layers import layer_conflicts as layer_conflicts
from gradbal.diagnostics.recorder import Recorder as Recorder
from gradbal.diagnostics.step import Step as Step
