"""Architectures that share parameters between tasks, as plain modules on any backbone.

Every model is a :class:`MultiTaskModel`: called on a batch, or on one batch per task, it returns
outputs by task, and it says of every parameter which tasks reach it. Axes are
(batch, channels, positions ...) or, when there are three, (batch, tokens, channels), unless
``layout`` says otherwise or the last layer of a stage shows otherwise.
"""

from arch_zoo.automtl import AutoMTL as AutoMTL
from arch_zoo.backbones import Stages as Stages
from arch_zoo.backbones import stages as stages
from arch_zoo.cgc import CGC as CGC
from arch_zoo.cross_stitch import CrossStitch as CrossStitch
from arch_zoo.decoders import Decoded as Decoded
from arch_zoo.decoders import Decoder as Decoder
from arch_zoo.decoders import Prediction as Prediction
from arch_zoo.decoders import Result as Result
from arch_zoo.decoders import task_losses as task_losses
from arch_zoo.dselect_k import DSelectK as DSelectK
from arch_zoo.experts import ExpertBank as ExpertBank
from arch_zoo.gates import Gate as Gate
from arch_zoo.hps import HPS as HPS
from arch_zoo.inputs import OneBatch as OneBatch
from arch_zoo.inputs import PerTask as PerTask
from arch_zoo.learning_to_branch import LearningToBranch as LearningToBranch
from arch_zoo.learning_to_branch import Schedule as Schedule
from arch_zoo.mmoe import MMoE as MMoE
from arch_zoo.model import Features as Features
from arch_zoo.model import MultiTaskModel as MultiTaskModel
from arch_zoo.mtan import MTAN as MTAN
from arch_zoo.ple import PLE as PLE
from arch_zoo.tree import Tree as Tree
