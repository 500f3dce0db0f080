"""How task gradients are computed: the engines, and their names for ``MTLOptimizer(engine=)``."""

from gradbal.jacobian.engines import PRESETS as PRESETS
from gradbal.jacobian.engines import Auto as Auto
from gradbal.jacobian.engines import Batched as Batched
from gradbal.jacobian.engines import Engine as Engine
from gradbal.jacobian.engines import Factored as Factored
from gradbal.jacobian.engines import Representation as Representation
from gradbal.jacobian.engines import Sequential as Sequential
from gradbal.jacobian.engines import Sketched as Sketched
from gradbal.jacobian.engines import Streaming as Streaming
from gradbal.jacobian.engines import make_engine as make_engine
