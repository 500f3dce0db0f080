"""All rules; importing this package fills the registry. One line per rule, one module per rule."""

from gradbal.rules.auto_lambda import AutoLambda as AutoLambda
from gradbal.rules.cagrad import CAGrad as CAGrad
from gradbal.rules.cr_mogm import CRMOGM as CRMOGM
from gradbal.rules.db_mtl import DBMTL as DBMTL
from gradbal.rules.dwa import DWA as DWA
from gradbal.rules.ew import EW as EW
from gradbal.rules.excess_mtl import ExcessMTL as ExcessMTL
from gradbal.rules.famo import FAMO as FAMO
from gradbal.rules.forum import FORUM as FORUM
from gradbal.rules.gls import GLS as GLS
from gradbal.rules.graddrop import GradDrop as GradDrop
from gradbal.rules.gradnorm import GradNorm as GradNorm
from gradbal.rules.gradvac import GradVac as GradVac
from gradbal.rules.imtl import IMTL as IMTL
from gradbal.rules.imtl_g import IMTLG as IMTLG
from gradbal.rules.imtl_l import IMTLL as IMTLL
from gradbal.rules.mgda import MGDA as MGDA
from gradbal.rules.moco import MoCo as MoCo
from gradbal.rules.modo import MoDo as MoDo
from gradbal.rules.moml import MOML as MOML
from gradbal.rules.nash_mtl import NashMTL as NashMTL
from gradbal.rules.pcgrad import PCGrad as PCGrad
from gradbal.rules.rlw import RLW as RLW
from gradbal.rules.sdmgrad import SDMGrad as SDMGrad
from gradbal.rules.upgrad import UPGrad as UPGrad
from gradbal.rules.uw import UW as UW
