"""The two-parameter toy problem of CAGrad, Nash-MTL and FAMO."""
