"""Where task gradients go: kept as blocks of the Jacobian, or turned into a Gram matrix at once."""

from gradbal.sinks.gram_only import GramOnly as GramOnly
from gradbal.sinks.gram_only import Represented as Represented
from gradbal.sinks.gram_only import Streamed as Streamed
from gradbal.sinks.keep import Further as Further
from gradbal.sinks.keep import Keep as Keep
