"""Several processes: DDP and other replicas, shards of FSDP2, tensor parallelism."""

from gradbal.distributed.processes import ALONE as ALONE
from gradbal.distributed.processes import Processes as Processes
from gradbal.distributed.processes import shared_out as shared_out
from gradbal.distributed.replicas import connect as connect
