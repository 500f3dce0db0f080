"""Architectures that share parameters between tasks, as plain modules on any backbone.

Every model is a :class:`MultiTaskModel`: called on a batch, or on one batch per task, it returns
outputs by task, and it says of every parameter which tasks reach it. Axes are
(batch, channels, positions ...) or, when there are three, (batch, tokens, channels), unless
``layout`` says otherwise or the last layer of a stage shows otherwise.
"""

from arch_zoo.adapted import Adapted as Adapted
from arch_zoo.adapted import bottleneck as bottleneck
from arch_zoo.adapted import film as film
from arch_zoo.adapted import lora as lora
from arch_zoo.adapted import norm_per_task as norm_per_task
from arch_zoo.adapted import squeeze_excite as squeeze_excite
from arch_zoo.adashare import AdaShare as AdaShare
from arch_zoo.adashare import RunOrSkip as RunOrSkip
from arch_zoo.aitm import AITM as AITM
from arch_zoo.aitm import AITMDecoder as AITMDecoder
from arch_zoo.automtl import AutoMTL as AutoMTL
from arch_zoo.backbones import Stages as Stages
from arch_zoo.backbones import stages as stages
from arch_zoo.cgc import CGC as CGC
from arch_zoo.cross_stitch import CrossStitch as CrossStitch
from arch_zoo.dbmtl import DBMTL as DBMTL
from arch_zoo.dbmtl import DBMTLDecoder as DBMTLDecoder
from arch_zoo.decoders import Decoded as Decoded
from arch_zoo.decoders import Decoder as Decoder
from arch_zoo.decoders import Prediction as Prediction
from arch_zoo.decoders import Result as Result
from arch_zoo.decoders import task_losses as task_losses
from arch_zoo.dselect_k import DSelectK as DSelectK
from arch_zoo.esmm import ESCM2 as ESCM2
from arch_zoo.esmm import ESMM as ESMM
from arch_zoo.esmm import ESMMDecoder as ESMMDecoder
from arch_zoo.esmm import counterfactual_loss as counterfactual_loss
from arch_zoo.experts import ExpertBank as ExpertBank
from arch_zoo.gates import Gate as Gate
from arch_zoo.grouping import TaskAffinity as TaskAffinity
from arch_zoo.grouping import group_tasks as group_tasks
from arch_zoo.grouping import grouped as grouped
from arch_zoo.grouping import lookahead_affinity as lookahead_affinity
from arch_zoo.heads import ASPP as ASPP
from arch_zoo.heads import FPN as FPN
from arch_zoo.heads import DeepLabHead as DeepLabHead
from arch_zoo.heads import FPNHead as FPNHead
from arch_zoo.heads import Resized as Resized
from arch_zoo.hps import HPS as HPS
from arch_zoo.inputs import OneBatch as OneBatch
from arch_zoo.inputs import PerTask as PerTask
from arch_zoo.invpt import InvPT as InvPT
from arch_zoo.invpt import InvPTDecoder as InvPTDecoder
from arch_zoo.learning_to_branch import LearningToBranch as LearningToBranch
from arch_zoo.learning_to_branch import Schedule as Schedule
from arch_zoo.mmoe import MMoE as MMoE
from arch_zoo.model import Features as Features
from arch_zoo.model import MultiTaskModel as MultiTaskModel
from arch_zoo.mtan import MTAN as MTAN
from arch_zoo.mtinet import MTINet as MTINet
from arch_zoo.mtinet import MTINetDecoder as MTINetDecoder
from arch_zoo.padnet import PADNet as PADNet
from arch_zoo.padnet import PADNetDecoder as PADNetDecoder
from arch_zoo.pepnet import PEPNet as PEPNet
from arch_zoo.ple import PLE as PLE
from arch_zoo.sparse_moe import SparseMoE as SparseMoE
from arch_zoo.sparse_moe import TaskRouted as TaskRouted
from arch_zoo.sparse_moe import task_dependence as task_dependence
from arch_zoo.stem import STEM as STEM
from arch_zoo.tree import Tree as Tree
