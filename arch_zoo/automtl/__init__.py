"""AutoMTL: any network that `torch.fx` traces becomes a search for what its tasks should share."""

from arch_zoo.automtl.lowered import Lowered as Lowered
from arch_zoo.automtl.policy import Policy as Policy
from arch_zoo.automtl.policy import Temperature as Temperature
from arch_zoo.automtl.recalibration import recalibrate as recalibrate
from arch_zoo.automtl.regularisers import DepthWeighted as DepthWeighted
from arch_zoo.automtl.regularisers import ExpectedCost as ExpectedCost
from arch_zoo.automtl.sharing import effective_sharing as effective_sharing
from arch_zoo.automtl.sharing import partners as partners
from arch_zoo.automtl.sharing import split_at as split_at
from arch_zoo.automtl.supermodel import AutoMTL as AutoMTL
from arch_zoo.automtl.tracing import trace as trace
