"""Several processes: DDP and other replicas, shards of FSDP2, tensor parallelism."""

from gradbal.distributed.connect import ALONE as ALONE
from gradbal.distributed.connect import connect as connect
from gradbal.distributed.processes import Processes as Processes
from gradbal.distributed.processes import shared_out as shared_out
