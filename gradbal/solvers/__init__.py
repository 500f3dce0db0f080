"""Solvers: one module per mathematical problem; they know no rule."""

from gradbal.solvers.cagrad import cagrad_point as cagrad_point
from gradbal.solvers.combined_min_norm import combined_min_norm as combined_min_norm
from gradbal.solvers.equal_projection import equal_projection as equal_projection
from gradbal.solvers.equilibrate import equilibrate as equilibrate
from gradbal.solvers.equilibrate import ridged as ridged
from gradbal.solvers.min_norm import min_norm as min_norm
from gradbal.solvers.min_norm import touches_zero as touches_zero
from gradbal.solvers.nash import nash_point as nash_point
from gradbal.solvers.nonnegative_qp import nonnegative_qp as nonnegative_qp
from gradbal.solvers.ray_descent import ray_descent as ray_descent
from gradbal.solvers.reference import cvxpy_cagrad as cvxpy_cagrad
from gradbal.solvers.reference import cvxpy_min_norm as cvxpy_min_norm
from gradbal.solvers.reference import cvxpy_nash as cvxpy_nash
from gradbal.solvers.reference import cvxpy_nonnegative_qp as cvxpy_nonnegative_qp
from gradbal.solvers.reference_preferences import cvxpy_ray_descent as cvxpy_ray_descent
from gradbal.solvers.reference_preferences import cvxpy_simplex_lp as cvxpy_simplex_lp
from gradbal.solvers.simplex import project_simplex as project_simplex
from gradbal.solvers.simplex_lp import simplex_lp as simplex_lp
from gradbal.solvers.simplex_qp import simplex_qp as simplex_qp
from gradbal.solvers.solution import Solution as Solution
from gradbal.solvers.spectral import gram_eigen as gram_eigen
from gradbal.solvers.spectral import symmetric_eigen as symmetric_eigen
