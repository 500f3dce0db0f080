"""Ways to take the cotangents of several tasks down through a piece of the graph."""

from gradbal.crossing.factored import factored as factored
from gradbal.crossing.factored import find_layers as find_layers
from gradbal.crossing.layers import Layer as Layer
from gradbal.crossing.layers import Sketch as Sketch
from gradbal.crossing.loop import loop as loop
from gradbal.crossing.products import Product as Product
from gradbal.crossing.products import product_gram as product_gram
from gradbal.crossing.segment import Cotangent as Cotangent
from gradbal.crossing.segment import Cotangents as Cotangents
from gradbal.crossing.segment import Rows as Rows
from gradbal.crossing.segment import RowStream as RowStream
from gradbal.crossing.segment import Segment as Segment
from gradbal.crossing.segment import pull as pull
from gradbal.crossing.vmap import Batch as Batch
